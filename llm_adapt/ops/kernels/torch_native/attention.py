"""torch.nn.functional.scaled_dot_product_attention. Source: its torch 2.13 documentation."""

from __future__ import annotations

from typing import Literal

import torch

from llm_adapt.ops.attention_parts.cache import CacheRequest
from llm_adapt.ops.attention_parts.sdpa import sdpa, sdpa_of_cache, why_not_sdpa, why_not_sdpa_of_cache
from llm_adapt.ops.dispatch import kernel

__all__ = ["attention", "decode_attention"]


@kernel("attention", "scaled_dot_product_attention of torch 2.13", refuses=why_not_sdpa, compilable=True)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    layout: Literal["bshd", "sbhd", "bhsd", "thd"] = "bshd",
    causal: Literal["none", "top_left", "bottom_right"] = "none",
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    seed: int | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    deterministic: bool = False,
) -> torch.Tensor:
    """F.scaled_dot_product_attention: windows and bottom-right alignment as masks. Without dropout seed has no use."""
    return sdpa(q, k, v, mask, layout, causal, window_left, window_right, scale)


@kernel(
    "decode_attention",
    "scaled_dot_product_attention of torch 2.13",
    refuses=why_not_sdpa_of_cache,
    compilable=True,
)
def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    causal: Literal["none", "bottom_right"] = "bottom_right",
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
) -> torch.Tensor:
    """F.scaled_dot_product_attention on a copy of the keys and values that are seen, in their own dtype."""
    cache = q, k_cache, v_cache, cache_seqlens, block_table, None, None, cache_batch_idx, cache_leftpad, None, None
    return sdpa_of_cache(CacheRequest(*cache, causal, window_left, window_right, scale, 0.0))
