"""Attention in blocks of queries: memory grows with the length, not with its square.

A block of queries forms its scores, its weights and its output, and forgets them; backward forms them again. Each
block is computed by the same function as the reference. Keys that no query of a block may see are left out where that
is known without asking a device. Letters as in llm_adapt/ops/attention.py.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from llm_adapt.ops.attention_parts.layouts import lengths, to_heads_first
from llm_adapt.ops.attention_parts.request import Request
from llm_adapt.ops.attention_parts.softmax import Weighting, attend, part_of_mask
from llm_adapt.ops.autograd import Function

__all__ = ["attend_in_blocks"]

_MOST_SCORES = 2**20  # of one block: 4 MiB in float32, about what the cache of a core holds
_LEAST_ROWS = 16  # a smaller block reads all keys for next to nothing

Tensors = tuple[torch.Tensor | None, ...]  # query, key, value, mask, sinks


class Block(NamedTuple):
    """Some queries, and the keys that any of them may see."""

    rows: slice
    columns: slice


def attend_in_blocks(request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, Sq, Dv] in the dtype of the call, and log-sum-exp [B, H, Sq]."""
    query, key, value = (to_heads_first(x, request.options.layout) for x in (request.query, request.key, request.value))
    blocks = list(_blocks(request, query.shape[0] * query.shape[1]))
    found: tuple[torch.Tensor, torch.Tensor] = _InBlocks.apply(
        query, key, value, *request.added(), request.weighting(), blocks, request.wide
    )
    return found


class _InBlocks(Function):
    """Saves its inputs as they are, and nothing that it computes."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *tensors, how, blocks, wide = inputs
        query, value = tensors[0], tensors[2]
        out = query.new_zeros((*query.shape[:3], value.shape[-1]))
        lse = query.new_zeros(query.shape[:3], dtype=wide)
        for block in blocks:
            parts = [_wide(x, wide) for x in _parts(tuple(tensors), block)]
            out[:, :, block.rows], lse[:, :, block.rows] = _attend(parts, how, block)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.how, ctx.blocks, ctx.wide = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        tensors = ctx.saved_tensors
        sums = tuple(
            torch.zeros_like(x, dtype=ctx.wide) if is_needed else None
            for x, is_needed in zip(tensors, ctx.needs_input_grad, strict=False)
        )
        for block in ctx.blocks:
            _add_gradients(sums, tensors, upstream, ctx.how, block)
        found = (total if total is None else total.to(x.dtype) for x, total in zip(tensors, sums, strict=True))
        return *found, None, None, None


def _add_gradients(
    sums: Tensors, tensors: Tensors, upstream: tuple[torch.Tensor, ...], how: Weighting, block: Block
) -> None:
    """Form a block again, and add its gradients at its own queries and keys."""
    totals = _parts(sums, block)
    leaves: list[Any] = []
    for part, total in zip(_parts(tensors, block), totals, strict=True):
        leaf = _wide(part, upstream[1].dtype)
        leaves.append(leaf if leaf is None or total is None else leaf.detach().requires_grad_())
    with torch.enable_grad():
        outputs = _attend(leaves, how, block)
    wanted = [(leaf, total) for leaf, total in zip(leaves, totals, strict=True) if total is not None]
    # The log-sum-exp depends on no value: where only that needs a gradient it has none.
    pairs = [(out, x[:, :, block.rows].to(out.dtype)) for out, x in zip(outputs, upstream, strict=True)]
    reached = [pair for pair in pairs if pair[0].requires_grad]
    outputs, given = zip(*reached, strict=True)
    found = torch.autograd.grad(outputs, [leaf for leaf, _ in wanted], given, allow_unused=True)
    for (_, total), gradient in zip(wanted, found, strict=True):
        if gradient is not None:
            total.add_(gradient)


def _wide(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return x if x is None or x.dtype == torch.bool else x.to(dtype)


def _attend(parts: list[Any], how: Weighting, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value, mask, sinks = parts
    return attend(query, key, value, mask, sinks, how, block.rows, block.columns)


def _parts(tensors: Tensors, block: Block) -> Tensors:
    """Views of what a block reads, or adds to."""
    query, key, value, mask, sinks = tensors
    return (
        None if query is None else query[:, :, block.rows],
        None if key is None else key[:, :, block.columns],
        None if value is None else value[:, :, block.columns],
        None if mask is None else part_of_mask(mask, block.rows, block.columns),
        sinks,
    )


def _blocks(request: Request, heads: int) -> Iterator[Block]:
    """Blocks of queries, all of about one size, with the keys that they may see."""
    rows, columns = lengths(request.query, request.options.layout), lengths(request.key, request.options.layout)
    step = max(_MOST_SCORES // max(heads * columns, 1), _LEAST_ROWS)
    sight = _Sight.of(request, rows, columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        first, end = (0, columns) if sight is None else (sight.first(start), sight.end(stop - 1))
        yield Block(slice(start, stop), slice(first, max(first, end)))


class _Sight(NamedTuple):
    """Which keys a query may see at most, from numbers on the host. Later queries never see earlier, or fewer, keys.

    Attributes:
        ends_q, ends_k: cumulative lengths of the sequences, with a leading 0.
        before, after: how many keys before and after its place it may see; None = all.
        is_top_left: as in `attention`.
    """

    ends_q: list[int]
    ends_k: list[int]
    before: int | None
    after: int | None
    is_top_left: bool
    columns: int

    @staticmethod
    def of(request: Request, rows: int, columns: int) -> _Sight | None:
        """None where only a device knows."""
        ends_q, ends_k = request.sequences.cu_seqlens_q, request.sequences.cu_seqlens_k
        if ends_q is not None and ends_k is not None:
            if ends_q.device.type != "cpu" or ends_k.device.type != "cpu":
                return None
            ends = ends_q.tolist(), ends_k.tolist()
        else:
            ends = [0, rows], [0, columns]
        is_top_left = request.options.causal == "top_left"
        before = request.options.window_left if request.options.window_left >= 0 else None
        after = (
            0
            if request.options.causal != "none"
            else request.options.window_right
            if request.options.window_right >= 0
            else None
        )
        if not is_top_left and not (request.sequences.seqused_q is None and request.sequences.seqused_k is None):
            before, after = None, None  # places are counted from lengths that are not known here
        return _Sight(*ends, before, after, is_top_left, columns)

    def first(self, row: int) -> int:
        """The first key that a query may see."""
        place, start, end = self._place(row)
        return start if self.before is None else min(max(start, place - self.before), end)

    def end(self, row: int) -> int:
        """The key behind the last that it may see."""
        place, start, end = self._place(row)
        return end if self.after is None else max(min(end, place + self.after + 1), start)

    def _place(self, row: int) -> tuple[int, int, int]:
        """The place of a query on the axis of all keys; start and end of its sequence there."""
        n = bisect.bisect_right(self.ends_q, row) - 1
        if n == len(self.ends_q) - 1:
            return self.columns, self.columns, self.columns  # behind the last sequence
        start, end = self.ends_k[n], self.ends_k[n + 1]
        place = start + row - self.ends_q[n]
        return place if self.is_top_left else place + (end - start) - (self.ends_q[n + 1] - self.ends_q[n]), start, end
