"""Narrowing: a smaller call of attention that runs the same code, for proofs of calls that are too large.

Batch and groups of heads go first: what kernels get wrong depends on length (a mask that is dropped past some length)
more often than on how many heads there are. Letters as in llm_adapt/ops/attention.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from llm_adapt.ops.attention_parts.layouts import to_heads_first

__all__ = ["narrowed", "narrowed_cache"]

_MOST_SCORES = 2**23  # float64 scores of 64 MiB; some four tensors of that size live at once in backward
_MOST_CACHED = 2**23  # elements of keys that the calls of a narrowed batch see
_STEP = 128  # lengths stay the same modulo this: kernels treat a block that is not full in its own way


def narrowed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call with at most two batch entries, at most two whole groups, and a bounded number of scores."""
    layout = arguments["layout"]
    batch, heads, rows, _ = to_heads_first(arguments["q"], layout).shape
    _, groups, columns, _ = to_heads_first(arguments["k"], layout).shape
    per_group = heads // groups
    for most_batch, most_groups in ((2, 2), (1, 2), (1, 1)):
        b, g = min(batch, most_batch), min(groups, most_groups)
        if b * g * per_group * rows * columns <= _MOST_SCORES:
            break
    n_q, n_k = _cut(rows, columns, _MOST_SCORES // (b * g * per_group))
    found = dict(arguments)
    sizes = {"q": (b, g * per_group, n_q), "k": (b, g, n_k), "v": (b, g, n_k)}
    for name, (n_batch, n_heads, tokens) in sizes.items():
        found[name] = _tensor(arguments[name], layout, n_batch, n_heads, tokens)
    number = None if layout == "thd" else b
    found |= {
        "mask": _mask(arguments["mask"], b, g * per_group, n_q, n_k),
        "sinks": _first(arguments["sinks"], g * per_group),
        "alibi_slopes": _slopes(arguments["alibi_slopes"], number, g * per_group),
    }
    for side, tokens, whole in (("q", n_q, rows), ("k", n_k, columns)):
        ends, used = arguments[f"cu_seqlens_{side}"], arguments[f"seqused_{side}"]
        # Where the first tokens would be of one sequence, all sequences become shorter instead.
        is_scaled = ends is not None and (ends.shape[0] - 1) * tokens < 4 * whole
        share = (tokens, max(whole, 1)) if is_scaled else (1, 1)
        if ends is not None:
            found[f"cu_seqlens_{side}"] = ends = _times(ends, *share).clamp(max=tokens)
        if used is not None:
            room = used.new_full((), tokens) if ends is None else ends.diff().to(used.dtype)
            found[f"seqused_{side}"] = torch.minimum(_times(used[:number], *share), room)
        longest = arguments[f"max_seqlen_{side}"]
        found[f"max_seqlen_{side}"] = min(-(-longest * share[0] // share[1]), tokens)
    return found


def _times(x: torch.Tensor, numerator: int, denominator: int) -> torch.Tensor:
    return (x.long() * numerator // denominator).to(x.dtype)


def _cut(rows: int, columns: int, most: int) -> tuple[int, int]:
    """Lengths whose product is about the most allowed; equal lengths stay equal."""
    if rows * columns <= most:
        return rows, columns
    side = math.isqrt(most)
    n_q = _shorter(rows, max(side, most // max(columns, 1)))
    n_k = _shorter(columns, side if rows == columns else max(side, most // max(n_q, 1)))
    return n_q, n_k


def _shorter(length: int, most: int) -> int:
    """The largest length up to the most that is the same modulo the step."""
    return length if length <= most else max(most - (most - length) % _STEP, min(length, 1))


def _tensor(x: torch.Tensor, layout: str, batch: int, heads: int, tokens: int) -> torch.Tensor:
    axes = {"bshd": (batch, tokens, heads), "sbhd": (tokens, batch, heads), "bhsd": (batch, heads, tokens)}
    part = x[tuple(slice(size) for size in axes.get(layout, (tokens, heads)))]
    return part.contiguous() if x.is_contiguous() else part  # a kernel may rely on what the call has


def _mask(mask: torch.Tensor | None, *sizes: int) -> torch.Tensor | None:
    if mask is None:
        return None
    part = mask[tuple(slice(size) for size in sizes[4 - mask.ndim :])]  # an axis of size 1 stays as it is
    return part.contiguous() if mask.is_contiguous() else part


def _slopes(slopes: torch.Tensor | None, number: int | None, heads: int) -> torch.Tensor | None:
    if slopes is None:
        return None
    return slopes[..., :heads].contiguous() if slopes.ndim == 1 else slopes[:number, :heads].contiguous()


def _first(x: torch.Tensor | None, size: int) -> torch.Tensor | None:
    return None if x is None else x[:size].contiguous()


def narrowed_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of decode_attention with two batch entries, two whole groups, and their pages."""
    table, index = arguments["block_table"], arguments["cache_batch_idx"]
    batch, rows, heads, size = arguments["q"].shape
    entries, tokens, groups, _ = arguments["k_cache"].shape
    pages = 1 if table is None else table.shape[1]
    for most_batch, most_groups in ((2, 2), (1, 2), (1, 1)):
        b, g = min(batch, most_batch), min(groups, most_groups)
        if b * g * size * pages * tokens <= _MOST_CACHED:
            break
    room = max(_MOST_CACHED // max(b * g * size, 1), rows, 1)
    if table is None:
        tokens = min(tokens, room)
        chosen = torch.arange(entries, device=arguments["q"].device)[:b] if index is None else index[:b].long()
    else:
        pages = min(pages, max(room // max(tokens, 1), 1))
        chosen = table[:b, :pages].clamp(0, max(entries - 1, 0)).long().flatten()
    # In reverse, so that the table, or the index, still has something to say.
    is_named = table is not None or index is not None
    order = torch.arange(chosen.shape[0], device=chosen.device)
    chosen, order = (chosen.flip(0), order.flip(0).to(torch.int32)) if is_named else (chosen, order)
    found = dict(arguments)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        found[name] = _cached(arguments[name], chosen, tokens, g)
    found["q"] = arguments["q"][:b, :, : heads // groups * g].contiguous()
    found["cache_seqlens"] = arguments["cache_seqlens"][:b].clamp(max=tokens * pages)
    found["block_table"] = None if table is None else order.view(b, pages)
    found["cache_batch_idx"] = None if index is None else order
    found["cache_leftpad"] = _first(arguments["cache_leftpad"], b)
    found["sinks"] = _first(arguments["sinks"], heads // groups * g)
    found["alibi_slopes"] = _slopes(arguments["alibi_slopes"], b, heads // groups * g)
    return found


def _cached(x: torch.Tensor | None, chosen: torch.Tensor, tokens: int, groups: int) -> torch.Tensor | None:
    """Some entries, or pages, of a cache, or of its scales, with fewer groups."""
    if x is None:
        return None
    return x[:groups].contiguous() if x.ndim < 3 else x[:, :tokens, :groups].index_select(0, chosen).contiguous()
