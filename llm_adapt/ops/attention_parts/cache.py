"""CacheRequest: the arguments of one attention call on a KV cache, checked, and the cache as each batch entry sees it.

Letters as in llm_adapt/ops/decode_attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llm_adapt.ops.attention_parts.places import Places, dense_places
from llm_adapt.ops.attention_parts.request import check_numbers, check_slopes
from llm_adapt.ops.attention_parts.softmax import Weighting

__all__ = ["CacheRequest"]

_OP = "decode_attention"
_SMALL = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)  # caches that need scales


@dataclass(frozen=True)
class CacheRequest:
    """The arguments of one call of decode_attention, under their names there."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    cache_seqlens: torch.Tensor
    block_table: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    cache_batch_idx: torch.Tensor | None
    cache_leftpad: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    causal: str
    window_left: int
    window_right: int
    scale: float | None
    softcap: float

    def __post_init__(self) -> None:
        check_numbers(_OP, self.causal, self.window_left, self.window_right, self.softcap)
        if self.causal == "top_left":
            raise ValueError(f"{_OP}: causal='top_left' was given; new tokens stand at the end: 'bottom_right'.")
        self._check_tensors()
        self._check_integers()
        for name, scale, cache in (("k_scale", self.k_scale, self.k_cache), ("v_scale", self.v_scale, self.v_cache)):
            _check_scale(name, scale, cache, self.q.dtype)
        batch, _, heads, _ = self.q.shape
        if self.sinks is not None and self.sinks.shape != (heads,):
            raise ValueError(f"{_OP}: sinks is {tuple(self.sinks.shape)}; give one number for each of {heads} heads.")
        check_slopes(_OP, self.alibi_slopes, heads, batch)

    @property
    def wide(self) -> torch.dtype:
        """The dtype that it is computed in."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def heads_first(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, and the keys and values of each batch entry, as [B, H, S, D] in the wide dtype."""
        key, value = self._seen(self.k_cache, self.k_scale), self._seen(self.v_cache, self.v_scale)
        # Behind the length stands whatever the memory held; 0 * NaN would be NaN.
        is_key = self.places(key.shape[1]).key_of
        if is_key is not None:
            value = value.masked_fill((is_key < 0)[:, :, None, None], 0.0)
        return self.q.to(self.wide).transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def weighting(self) -> Weighting:
        """How scores become weights."""
        slopes = self.alibi_slopes
        if slopes is not None:
            slopes = slopes.to(self.wide).view(-1, slopes.shape[-1], 1, 1)
        scale = self.q.shape[-1] ** -0.5 if self.scale is None else self.scale
        is_causal = self.causal != "none"
        columns = self.k_cache.shape[1] * (1 if self.block_table is None else self.block_table.shape[1])
        places = self.places(columns)
        return Weighting(places, scale, self.softcap, is_causal, self.window_left, self.window_right, slopes)

    def places(self, columns: int) -> Places:
        """Places of the new tokens, and of the columns that are keys."""
        return dense_places(
            self.q.shape[1], columns, False, self.q.device, None, self.cache_seqlens, self.cache_leftpad
        )

    def _seen(self, cache: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """The cache of each batch entry [B, S, G, D], multiplied by its scale."""
        found = self.gathered(cache).to(self.wide)
        if scale is None:
            return found
        scale = scale.to(self.wide)
        if scale.ndim == 3:
            return found * self.gathered(scale)[..., None]
        return found * (scale if scale.ndim == 2 else scale[:, None])

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """The entries, or pages, of each batch entry one behind the other [B, S, ...]."""
        if self.block_table is not None:
            pages = self.block_table.clamp(0, max(x.shape[0] - 1, 0)).long()  # unused numbers may be anything
            return x[pages].flatten(1, 2)
        return x if self.cache_batch_idx is None else x[self.cache_batch_idx.long()]

    def _check_tensors(self) -> None:
        q, k, v = self.q, self.k_cache, self.v_cache
        if any(x.ndim != 4 for x in (q, k, v)) or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
            raise ValueError(
                f"{_OP}: q {tuple(q.shape)}, k_cache {tuple(k.shape)} and v_cache {tuple(v.shape)} do not fit; give "
                "[B, Sq, H, D], [R, S, G, D] and [R, S, G, Dv], or pages [P, C, G, D] and [P, C, G, Dv]."
            )
        if not k.shape[2] or q.shape[2] % k.shape[2]:
            raise ValueError(
                f"{_OP}: {q.shape[2]} query heads and {k.shape[2]} key heads were given; the first must be a multiple "
                "of the second."
            )
        if not q.dtype.is_floating_point:
            raise TypeError(f"{_OP}: q is {q.dtype}; give a floating-point dtype.")

    def _check_integers(self) -> None:
        batch = self.q.shape[0]
        names = ("cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table")
        for name in names:
            value = getattr(self, name)
            if value is None:
                continue
            if value.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{_OP}: {name} is {value.dtype}; give int32.")
            if value.shape[:1] != (batch,) or value.ndim != 1 + (name == "block_table"):
                raise ValueError(f"{_OP}: {name} is {tuple(value.shape)}; its first axis is the batch of {batch}.")
        if self.block_table is not None and not (self.cache_batch_idx is None and self.cache_leftpad is None):
            raise ValueError(
                f"{_OP}: block_table was given with cache_batch_idx or cache_leftpad; the table says both."
            )
        if self.block_table is None and self.cache_batch_idx is None and self.k_cache.shape[0] != batch:
            raise ValueError(
                f"{_OP}: a contiguous cache of {self.k_cache.shape[0]} entries was given for a batch of {batch}; give "
                "cache_batch_idx, or as many entries."
            )


def _check_scale(name: str, scale: torch.Tensor | None, cache: torch.Tensor, dtype: torch.dtype) -> None:
    entries, tokens, groups, size = cache.shape
    if scale is None:
        if cache.dtype in _SMALL:
            raise ValueError(f"{_OP}: the cache is {cache.dtype} and {name} was not given; give its scale.")
        if cache.dtype != dtype:
            raise TypeError(f"{_OP}: q is {dtype} and the cache {cache.dtype}; give one dtype, or a scale.")
    elif tuple(scale.shape) not in ((groups,), (groups, size), (entries, tokens, groups), (entries, tokens, 1)):
        raise ValueError(
            f"{_OP}: {name} is {tuple(scale.shape)}; give [{groups}], [{groups}, {size}], "
            f"[{entries}, {tokens}, {groups}] or [{entries}, {tokens}, 1]."
        )
