"""flash_attn.flash_attn_interface of DTK: two functions with their arguments, and the names of the others.

q [B, S, H, D], k and v [B, K, G, D], G divides H; packed: q [T, H, D], k and v [U, G, D]. float16 and bfloat16,
computed in float32. Causal attention and windows are aligned at the bottom right; a row without keys is 0.
Source: flash_attn_interface.py of flash_attn 2.8.3+das.opt1.dtk2604 (signatures, D <= 512, s_aux); for the rest the
public functions of flash-attn 2. Private functions are left out: their results differ between builds.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from llm_adapt.simulators.base import SimulatorError
from llm_adapt.simulators.dcu.das.flash_formula import Options, attend, check, unwritten_behind
from llm_adapt.simulators.dcu.das.limits import demand, missing, not_public

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]

flash_attn_qkvpacked_func = not_public("flash_attn.flash_attn_qkvpacked_func")
flash_attn_kvpacked_func = not_public("flash_attn.flash_attn_kvpacked_func")
flash_attn_varlen_qkvpacked_func = not_public("flash_attn.flash_attn_varlen_qkvpacked_func")
flash_attn_varlen_kvpacked_func = not_public("flash_attn.flash_attn_varlen_kvpacked_func")
flash_attn_with_mask_func = not_public("flash_attn.flash_attn_with_mask_func")
flash_attn_varlen_with_mask_func = not_public("flash_attn.flash_attn_varlen_with_mask_func")
vllm_flash_attn_varlen_func = not_public("flash_attn.vllm_flash_attn_varlen_func")

__getattr__ = missing("flash_attn.flash_attn_interface")


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    bhsd: bool = False,
    s_aux: torch.Tensor | None = None,
) -> Any:
    """softmax(scale q k^T) v; with return_attn_probs (out, log-sum-exp [B, H, S], None).

    Args:
        bhsd: q, k, v and the output are [B, H, S, D].
        s_aux: a sink for each head, as one more score that has no value.

    Raises:
        RuntimeError: dtypes, head sizes, heads or devices that the kernels do not take.
        SimulatorError: what is not public: a gradient of s_aux, its log-sum-exp, probabilities with dropout.
    """
    options = Options(dropout_p, softmax_scale, causal, window_size, softcap, s_aux)
    if bhsd:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    demand(q.dim() == k.dim() == v.dim() == 4, "q, k and v have 4 dimensions")
    check(q, k, v, alibi_slopes, options)
    _check_probs(return_attn_probs, options)
    slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 2 else alibi_slopes[None]
    out, lse = attend(q, k, v, slopes, options)
    out = (out.transpose(1, 2) if bhsd else out).contiguous()
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> Any:
    """The same of packed sequences; with return_attn_probs (out, log-sum-exp [H, T], None).

    Tokens behind the last sequence, and their gradients, are not written: here they are NaN.

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 [N + 1], where each sequence begins and the last ends.
        max_seqlen_q, max_seqlen_k: no sequence is longer.

    Raises:
        RuntimeError: as above, and lengths that do not fit.
        SimulatorError: as above, and block_table (a paged cache).
    """
    options = Options(dropout_p, softmax_scale, causal, window_size, softcap, s_aux)
    if block_table is not None:
        raise SimulatorError("flash_attn_varlen_func(block_table=...) was asked; the DCU simulator has no paged cache.")
    demand(q.dim() == k.dim() == v.dim() == 3, "q, k and v have 3 dimensions")
    check(q, k, v, alibi_slopes, options)
    _check_probs(return_attn_probs, options)
    demand(cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32, "cu_seqlens are int32")
    demand(cu_seqlens_q.device == cu_seqlens_k.device == q.device, "cu_seqlens are on the device of q")
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    demand(len(ends_q) == len(ends_k) and ends_q[0] == ends_k[0] == 0, "cu_seqlens begin with 0 and are equally many")
    for ends, longest in ((ends_q, max_seqlen_q), (ends_k, max_seqlen_k)):
        demand(all(0 <= e - s <= longest for s, e in itertools.pairwise(ends)), "a sequence is longer than max_seqlen")
    q, k, v = unwritten_behind(q, ends_q[-1]), unwritten_behind(k, ends_k[-1]), unwritten_behind(v, ends_k[-1])
    outs, sums = [], []
    places = zip(itertools.pairwise(ends_q), itertools.pairwise(ends_k), strict=True)
    for index, ((start, end), (key_start, key_end)) in enumerate(places):
        slopes = alibi_slopes
        if slopes is not None:
            slopes = slopes[None] if slopes.dim() == 1 else slopes[index : index + 1]
        parts = q[None, start:end], k[None, key_start:key_end], v[None, key_start:key_end]
        out, lse = attend(*parts, slopes, options)
        outs.append(out[0])
        sums.append(lse[0])
    behind = q.shape[0] - ends_q[-1]
    out = torch.cat([*outs, q.new_full((behind, *q.shape[1:]), torch.nan)])
    lse = torch.cat([*sums, lse.new_full((q.shape[1], behind), torch.nan)], -1)
    return (out, lse, None) if return_attn_probs else out


def _check_probs(return_attn_probs: bool, options: Options) -> None:
    if return_attn_probs and (options.dropout_p or options.s_aux is not None):
        raise SimulatorError(
            "flash_attn was asked for return_attn_probs with dropout or s_aux; what it returns then is not public."
        )
