"""The two functions of flash-attn 2 on the `attention` op, with the sinks that transformers passes to them.

B batch, H query heads, G key heads, Sq and Sk lengths, D head size; T tokens of N sequences packed.

Causal calls and windows are aligned at the bottom right: the last query stands at the last key. Unlike the CUDA
builds they take float32, any head size, values of another size than keys, and empty sequences. Importing this module
imports the op.
Source: flash_attn_interface.py of Dao-AILab/flash-attention 2.8; s_aux as in vllm-flash-attn 3.
"""

from __future__ import annotations

from typing import Any

import torch

from llm_adapt.frameworks.transformers.seeds import drawn_seed
from llm_adapt.ops.attention import attention

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]

Found = torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]
Window = tuple[int | None, int | None]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    s_aux: torch.Tensor | None = None,
) -> Found:
    """out = softmax(cap(scale q k^T) + bias) v, with a sink in each head's denominator where s_aux is given.

    return_attn_probs: (out, log-sum-exp, None); the weights themselves are not kept, here or there.

    Shapes: q [B, Sq, H, D], k and v [B, Sk, G, D], alibi_slopes [H] or [B, H], s_aux [H] -> out [B, Sq, H, D],
        log-sum-exp [B, H, Sq].
    Dtypes: as of `attention`.
    Raises: ValueError and TypeError as `attention`.
    """
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, deterministic)
    found = attention(q, k, v, alibi_slopes=alibi_slopes, sinks=s_aux, return_lse=return_attn_probs, **options)
    return (*found, None) if return_attn_probs else found


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | torch.Tensor,
    max_seqlen_k: int | torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> Found:
    """The same for sequences packed one behind the other; each query sees keys of its own sequence only.

    max_seqlen: a hint for kernels that need it on the host. As a tensor it is not read, which would wait for it.

    Shapes: q [Tq, H, D], k and v [Tk, G, D], cu_seqlens [N + 1] with a leading 0, alibi_slopes [H] or [N, H], s_aux
        [H] -> out [Tq, H, D], log-sum-exp [H, Tq].
    Raises: NotImplementedError for a block table.
    """
    if block_table is not None:
        raise NotImplementedError(
            "flash_attn_varlen_func was called with block_table (keys and values in pages), which llm_adapt does not "
            "serve here. Pass the keys and values packed, or call llm_adapt.ops.decode_attention with the pages."
        )
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, deterministic)
    for side, longest in (("q", max_seqlen_q), ("k", max_seqlen_k)):
        options[f"max_seqlen_{side}"] = 0 if longest is None or isinstance(longest, torch.Tensor) else longest
    ends: dict[str, Any] = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "layout": "thd"}
    found = attention(q, k, v, alibi_slopes=alibi_slopes, sinks=s_aux, return_lse=return_attn_probs, **ends, **options)
    return (*found, None) if return_attn_probs else found


def _options(
    dropout_p: float, scale: float | None, causal: bool, window: Window, softcap: float, deterministic: bool
) -> dict[str, Any]:
    """The options of the op. A causal call has no right side, so that such calls are of one kind."""
    left, right = (-1 if side is None else side for side in window)
    return {
        "causal": "bottom_right" if causal else "none",
        "window_left": left,
        "window_right": -1 if causal else right,
        "scale": scale,
        "softcap": softcap,
        "dropout_p": dropout_p,
        "seed": drawn_seed() if dropout_p else None,
        "deterministic": deterministic,
    }
