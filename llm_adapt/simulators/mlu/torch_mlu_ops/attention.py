"""flash_attention of torch_mlu_ops. Legend: q [B, S, H, D] or packed [T, H, D], k and v with KV heads."""

from __future__ import annotations

import math
from typing import Any

import torch

from .arguments import check_tensors, refuse_given

__all__ = ["flash_attention"]

_MODELLED: dict[str, Any] = {
    "alibi_slope": None, "attn_bias": None, "window_size_left": -1, "window_size_right": -1,
    "compute_dtype": torch.float32, "block_tables": None, "k_quant_scale": None, "v_quant_scale": None,
    "q_quant_scale": None, "out_quant_scale": None, "q2k_block_idx": None, "q2k_block_num": None,
    "variable_block_sizes": None, "q_block_size": 256, "k_block_size": 128, "sink": None,
}  # fmt: skip


@torch.no_grad()
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None,
    cu_seq_lens_kv: torch.Tensor | None,
    alibi_slope: torch.Tensor | None,
    attn_bias: torch.Tensor | None,
    max_seq_len_q: int,
    max_seq_len_kv: int,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    compute_dtype: torch.dtype = torch.float32,
    return_lse: bool = False,
    block_tables: torch.Tensor | None = None,
    k_quant_scale: torch.Tensor | None = None,
    v_quant_scale: torch.Tensor | None = None,
    q_quant_scale: torch.Tensor | None = None,
    out_quant_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    q2k_block_idx: torch.Tensor | None = None,
    q2k_block_num: torch.Tensor | None = None,
    variable_block_sizes: torch.Tensor | None = None,
    q_block_size: int = 256,
    k_block_size: int = 128,
    sink: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T) v, each query head with the KV head of its group; into out where it is given.

    With return_lse the log of the sum too: [H, T] packed, [B, H, S] otherwise. out_dtype is for quantised inputs.

    Raises:
        NotImplementedError: an argument is given whose meaning is not public; causal with other lengths of q and k.
    """
    given = locals()
    refuse_given("flash_attention", **{name: (given[name], modelled) for name, modelled in _MODELLED.items()})
    packed = cu_seq_lens_q is not None
    check_tensors("flash_attention", 3 if packed else 4, q, k, v)
    if cu_seq_lens_q is not None:
        if cu_seq_lens_kv is None or torch.int32 not in {cu_seq_lens_q.dtype} & {cu_seq_lens_kv.dtype}:
            raise RuntimeError("torch_mlu_ops.flash_attention takes both cu_seq_lens, in int32.")
        _check_longest(cu_seq_lens_q, max_seq_len_q, "q")
        _check_longest(cu_seq_lens_kv, max_seq_len_kv, "kv")
        y, lse = _packed(q, k, v, cu_seq_lens_q.tolist(), cu_seq_lens_kv.tolist(), softmax_scale, is_causal)
    else:
        pairs = [_one(*sequence, softmax_scale, is_causal) for sequence in zip(q, k, v, strict=True)]
        y, lse = torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])
    y = y.to(q.dtype) if out is None else out.copy_(y)
    return (y, lse) if return_lse else y


def _check_longest(cu_seq_lens: torch.Tensor, max_seq_len: int, name: str) -> None:
    longest = int(cu_seq_lens.diff().max())
    if longest > max_seq_len:
        raise RuntimeError(
            f"torch_mlu_ops.flash_attention was asked with max_seq_len_{name}={max_seq_len}; a sequence has {longest}."
        )


def _packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: list[int], columns: list[int], scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = []
    for index in range(len(rows) - 1):
        part, keys = slice(rows[index], rows[index + 1]), slice(columns[index], columns[index + 1])
        pairs.append(_one(q[part], k[keys], v[keys], scale, causal))
    return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs], -1)


def _one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence: output [S, H, D] and log of the sum [H, S], in float32."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.float().transpose(0, 1) for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    scores = scale * (q @ k.transpose(1, 2))
    if causal:
        if q.shape[1] != k.shape[1]:
            raise NotImplementedError(
                "torch_mlu_ops.flash_attention was asked for causal attention of "
                f"{q.shape[1]} queries and {k.shape[1]} keys; which corner it aligns is not public."
            )
        later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1), scores.logsumexp(-1)
