"""Attention of new tokens to a KV cache, for inference.

B batch, Sq new tokens of each entry, H query heads, G key and value heads, D head size of query and key, Dv of value;
the cache holds R entries of length S, or P pages of C tokens, of which an entry uses up to M.

Each batch entry has the first cache_seqlens keys of its cache, those of the new tokens among them: they have been
written before. New token i stands at p(i) = i + cache_seqlens - Sq, and sees what it sees in `attention`. What the
cache holds elsewhere is never used, whatever it is (NaN too).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

from llm_adapt.ops.attention_parts.cache import CacheRequest
from llm_adapt.ops.attention_parts.layouts import from_heads_first
from llm_adapt.ops.attention_parts.narrowing import narrowed_cache
from llm_adapt.ops.attention_parts.softmax import attend
from llm_adapt.ops.attention_parts.tolerances import ATTENTION
from llm_adapt.ops.dispatch import fused_op

__all__ = ["decode_attention"]


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    def ints(*numbers: Any) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    def bytes_(*sizes: int) -> torch.Tensor:
        return torch.randint(-127, 128, sizes, generator=generator, dtype=torch.int8)

    def positive(*sizes: int) -> torch.Tensor:
        return torch.rand(sizes, generator=generator) * 0.02 + 0.001

    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    whole = {"k_cache": draw(3, 20, 2, 16), "v_cache": draw(3, 20, 2, 16), "cache_seqlens": ints(20, 7, 1)}
    paged = {
        "k_cache": draw(9, 4, 2, 16),
        "v_cache": draw(9, 4, 2, 16),
        "cache_seqlens": ints(20, 7, 3),
        "block_table": ints([8, 0, 3, 2, 7], [1, 4, -1, -1, -1], [5, -1, -1, -1, -1]),
    }
    yield {"q": draw(3, 1, 4, 16)} | whole
    yield {"q": draw(3, 1, 4, 16)} | paged
    yield {"q": draw(3, 3, 4, 16), "scale": 0.3, "return_lse": True} | whole
    yield {"q": draw(3, 3, 4, 16), "causal": "none"} | paged
    yield {"q": draw(3, 2, 4, 16), "window_left": 3, "window_right": 1, "softcap": 3.0} | paged
    yield {"q": draw(3, 1, 4, 16), "alibi_slopes": slopes, "sinks": draw(4)} | whole
    batch = {"cache_batch_idx": ints(2, 0), "cache_seqlens": ints(9, 20), "cache_leftpad": ints(3, 0)}
    yield {"q": draw(2, 1, 4, 16), "alibi_slopes": torch.stack([slopes, slopes * 2])} | whole | batch
    tight = {"k_cache": bytes_(3, 20, 2, 16), "v_cache": bytes_(3, 20, 2, 8), "cache_seqlens": ints(20, 7, 1)}
    yield {"q": draw(3, 1, 4, 16), "k_scale": positive(2), "v_scale": positive(2)} | tight
    yield {"q": draw(3, 1, 4, 16), "k_scale": positive(3, 20, 2), "v_scale": positive(3, 20, 1)} | tight
    pages = {"k_cache": bytes_(9, 4, 2, 16), "v_cache": bytes_(9, 4, 2, 16)}
    yield {"q": draw(3, 2, 4, 16), "k_scale": positive(9, 4, 2), "v_scale": positive(2, 16)} | paged | pages
    yield {"q": draw(0, 1, 4, 16)} | whole | {"cache_seqlens": ints(), "cache_batch_idx": ints()}


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    """New tokens of this shape on a contiguous cache of 4096, with eight key heads where that many fit."""
    batch, _, heads, size = shape
    cache = (batch, 4096, heads if heads % 8 else 8, size)
    sizes = {"q": shape, "k_cache": cache, "v_cache": cache}
    tensors = {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}
    return tensors | {"cache_seqlens": torch.full((batch,), 4000, dtype=torch.int32)}


@fused_op(
    inputs=_inputs,
    example=_example,
    sizes={"Llama-3-8B": (8, 1, 32, 128), "Qwen2.5-72B": (8, 1, 64, 128)},
    differentiable=(),
    shrink=narrowed_cache,
    tolerance=ATTENTION,
)
def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    causal: Literal["none", "bottom_right"] = "bottom_right",
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """out_i = sum_j exp(s_ij) / (sum_j exp(s_ij) + exp(sink)) v_j over the cached keys j that new token i sees.

    s_ij = cap(scale * q_i . k_j) - slope * |p(i) - j|; options as of `attention`.

    block_table: page of each run of C tokens; numbers behind an entry's length may be anything. k_scale, v_scale: the
    cache is multiplied by them. cache_batch_idx: cache entry of each batch entry; cache_leftpad: keys before it are
    padding; neither with pages. return_lse: also log(sum_j exp(s_ij) + exp(sink)).

    Shapes: q [B, Sq, H, D], k_cache [R, S, G, D] or [P, C, G, D], v_cache the same with Dv; cache_seqlens,
        cache_batch_idx, cache_leftpad [B], block_table [B, M]; scales [G] by head, [G, D] by channel, or by token
        [R, S, G or 1] or [P, C, G or 1]; alibi_slopes [H] or [B, H], sinks [H] -> out [B, Sq, H, Dv], lse [B, H, Sq].
    Dtypes: computed in float32 (float64 for float64), out rounded once to the dtype of q; the cache has the dtype of q,
        or is int8 or float8 with scales; integers are int32.
    Raises: ValueError and TypeError for shapes, dtypes and options that do not fit; no value of a tensor is looked at.
    Source: flash_attn_with_kvcache in flash_attn_interface.py of flash-attn 2.8, less the writing of new keys;
        npu_fused_infer_attention_score of torch_npu 2.13 (scales of an int8 cache).
    """
    cache = q, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale, cache_batch_idx, cache_leftpad
    request = CacheRequest(*cache, alibi_slopes, sinks, causal, window_left, window_right, scale, softcap)
    query, key, value = request.heads_first()
    wide_sinks = None if sinks is None else sinks.to(query.dtype)
    everything = slice(0, query.shape[2]), slice(0, key.shape[2])
    out, lse = attend(query, key, value, None, wide_sinks, request.weighting(), *everything)
    out = from_heads_first(out.to(q.dtype), "bshd")
    return (out, lse) if return_lse else out
