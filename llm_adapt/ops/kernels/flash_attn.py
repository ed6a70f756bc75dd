"""Attention of the flash_attn package: flash-attn 2, and the builds of its name for Hygon DCU and Cambricon MLU.

Source: flash_attn/flash_attn_interface.py of Dao-AILab/flash-attention 2.8; for DCU its DAS build 2.8.3 (which names
itself 2.6.1, and has private functions of an older form): only public functions are called, by keyword, and what they
take is read from their signatures. Its s_aux (sinks) is left out: whether sinks get a gradient is not documented. Of
the MLU build no document is public. Not run on any of them: tests/contracts calls it against a fake.
"""

from __future__ import annotations

from typing import Literal

import flash_attn
import torch

from llm_adapt.ops.attention_parts.flash import Flash
from llm_adapt.ops.dispatch import Call, kernel

__all__ = ["attention", "decode_attention"]

_flash = Flash(flash_attn.flash_attn_func, flash_attn.flash_attn_varlen_func)


@kernel("attention", "flash_attn_func and flash_attn_varlen_func of flash-attn 2.8", refuses=_flash.refuses)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    layout: Literal["bshd", "sbhd", "bhsd", "thd"] = "bshd",
    causal: Literal["none", "top_left", "bottom_right"] = "none",
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    return_lse: bool = False,
    deterministic: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """flash_attn_func, or flash_attn_varlen_func for packed sequences."""
    return _flash(dict(locals()))


def _decode_refuses(call: Call) -> str | None:
    if not hasattr(flash_attn, "flash_attn_with_kvcache"):
        return "this build has no flash_attn_with_kvcache"
    if {call.q.dtype, call.k_cache.dtype, call.v_cache.dtype} - {torch.float16, torch.bfloat16}:
        return "takes float16 and bfloat16"
    if any(0 in call.tensors[name].shape for name in ("q", "k_cache")):
        return "takes no empty tensors"
    if call.q.shape[-1] > _flash.largest or call.v_cache.shape[-1] != call.q.shape[-1]:
        return f"takes one head size, up to {_flash.largest}"
    if call.block_table and call.k_cache.shape[1] % 256:
        return "takes pages of a multiple of 256 tokens"
    if call.alibi_slopes and call.alibi_slopes.dtype != torch.float32:
        return "takes slopes of float32"
    if not (call.k_cache.is_contiguous and call.v_cache.is_contiguous):
        return "takes a contiguous cache"
    return None


@kernel("decode_attention", "flash_attn_with_kvcache of flash-attn 2.8", refuses=_decode_refuses, has_backward=False)
def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    causal: Literal["none", "bottom_right"] = "bottom_right",
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """flash_attn_with_kvcache without new keys: they are in the cache already."""
    if block_table is None and cache_batch_idx is None:
        k_cache, v_cache = k_cache[: q.shape[0]], v_cache[: q.shape[0]]
    found = flash_attn.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        cache_seqlens=cache_seqlens.to(torch.int32),
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=None if block_table is None else block_table.clamp(min=0).to(torch.int32),
        softmax_scale=q.shape[-1] ** -0.5 if scale is None else scale,
        causal=causal != "none",
        window_size=(window_left, 0 if causal != "none" and window_left >= 0 else window_right),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_softmax_lse=return_lse,
    )
    if not return_lse:
        return found  # type: ignore[no-any-return]
    out, lse = found
    return out, lse.masked_fill(lse == torch.inf, -torch.inf)
