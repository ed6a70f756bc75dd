"""Rotary embedding in Triton. A program takes a token at a time: its table row once, then its heads in blocks.

B sequences, S positions, H heads, D head size, R rotated features, as pairs (i, j); thd is one sequence of T. x and y
are reached by strides, so no layout is copied. The gradient is the same kernel with the transposed rotation: reads
and writes trade places, and each column of sin goes to the other feature of its pair.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from llm_adapt.ops.autograd import Function
from llm_adapt.ops.kernels.triton.library import block_of, launch, triton_kernel
from llm_adapt.ops.rope import Layout, check_rope, table_rows

__all__ = ["rope"]

_MOST_PAIRS, _MOST_TILE = 128, 1024  # of a block: pairs, and pairs of all of its heads together
# Axes of B, S and H in x; -1 where there is none.
_AXES = {"bshd": (0, 1, 2), "sbhd": (1, 0, 2), "bhsd": (0, 2, 1), "thd": (-1, 0, 1)}


@triton.jit
def _places(at, pairs, ORDER: tl.constexpr):
    """Where the first and the second feature of these pairs are; in a table with one column for both, the same."""
    first, second = at, at
    if ORDER == "interleaved":
        first, second = at * 2, at * 2 + 1
    elif ORDER == "half":
        first, second = at, at + pairs
    return first, second


@triton.jit
def _table_at(table, at, there, pairs, ORDER: tl.constexpr):
    """The columns of these pairs; NaN from `there` on."""
    first, second = _places(at, pairs, ORDER)
    a = tl.load(table + first, mask=at < there, other=float("nan")).to(tl.float32)
    b = tl.load(table + second, mask=at < there, other=float("nan")).to(tl.float32)
    return a, b


@triton.jit
def _pair_at(x, x_head, head, heads, start, pairs, ORDER: tl.constexpr, PAIRS: tl.constexpr, BY_PAIRS: tl.constexpr):
    """Both features of these pairs in these heads, in float32."""
    if BY_PAIRS and ORDER == "interleaved":  # neighbours are read together
        both = 2 * start + tl.arange(0, 2 * PAIRS)
        mask = (head < heads)[:, None] & (both < 2 * pairs)[None, :]
        read = tl.load(x + head[:, None] * x_head + both[None, :], mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(read, [head.shape[0], PAIRS, 2]))
    else:
        at = start + tl.arange(0, PAIRS)
        first, second = _places(at, pairs, ORDER)
        mask = (head < heads)[:, None] & (at < pairs)[None, :]
        a = tl.load(x + head[:, None] * x_head + first[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + head[:, None] * x_head + second[None, :], mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _put_pair(
    y, y_head, head, heads, start, pairs, a, b, ORDER: tl.constexpr, PAIRS: tl.constexpr, BY_PAIRS: tl.constexpr
):
    """Store both features of these pairs in these heads."""
    a, b = a.to(y.dtype.element_ty), b.to(y.dtype.element_ty)
    if BY_PAIRS and ORDER == "interleaved":
        both = 2 * start + tl.arange(0, 2 * PAIRS)
        mask = (head < heads)[:, None] & (both < 2 * pairs)[None, :]
        joined = tl.reshape(tl.join(a, b), [head.shape[0], 2 * PAIRS])
        tl.store(y + head[:, None] * y_head + both[None, :], joined, mask=mask)
    else:
        at = start + tl.arange(0, PAIRS)
        first, second = _places(at, pairs, ORDER)
        mask = (head < heads)[:, None] & (at < pairs)[None, :]
        tl.store(y + head[:, None] * y_head + first[None, :], a, mask=mask)
        tl.store(y + head[:, None] * y_head + second[None, :], b, mask=mask)


@triton.jit
def _pass_on(x, y, x_head, y_head, heads, begin, end, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Copy the features of a token that are not rotated."""
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        for first in range(0, heads, HEADS):
            head = (first + tl.arange(0, HEADS)).to(tl.int64)
            mask = (head < heads)[:, None] & (at < end)[None, :]
            rest = tl.load(x + head[:, None] * x_head + at[None, :], mask=mask, other=0.0)
            tl.store(y + head[:, None] * y_head + at[None, :], rest, mask=mask)


@triton.jit
def _turn(
    x,
    cos,
    sin,
    positions,
    y,
    tokens,
    length,
    heads,
    features,
    pairs,
    table_rows,
    x_batch,
    x_position,
    x_head,
    y_batch,
    y_position,
    y_head,
    table_batch,
    table_row,
    position_batch,
    HAS_POSITIONS: tl.constexpr,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
    TABLE: tl.constexpr,
    IS_INVERSE: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    BY_PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    for token in range(tl.program_id(0).to(tl.int64), tokens, tl.num_programs(0)):
        batch, step = token // length, token % length
        row, there = step, pairs
        if HAS_POSITIONS:
            row = tl.load(positions + batch * position_batch + step).to(tl.int64)
            there = tl.where((row >= 0) & (row < table_rows), pairs, 0)  # a row beyond the table has no columns
        columns = batch * table_batch + row * table_row
        x_token = x + batch * x_batch + step * x_position
        y_token = y + batch * y_batch + step * y_position
        for start in range(0, pairs, PAIRS):
            at = start + tl.arange(0, PAIRS)
            cos_i, cos_j = _table_at(cos + columns, at, there, pairs, TABLE)
            sin_i, sin_j = _table_at(sin + columns, at, there, pairs, TABLE)
            if IS_TRANSPOSED:
                sin_i, sin_j = -sin_j, -sin_i
            if IS_INVERSE:
                sin_i, sin_j = -sin_i, -sin_j
            for first in range(0, heads, HEADS):
                head = (first + tl.arange(0, HEADS)).to(tl.int64)
                a, b = _pair_at(x_token, x_head, head, heads, start, pairs, READ, PAIRS, BY_PAIRS)
                y_i = a * cos_i[None, :] - b * sin_i[None, :]
                y_j = b * cos_j[None, :] + a * sin_j[None, :]
                _put_pair(y_token, y_head, head, heads, start, pairs, y_i, y_j, WRITE, PAIRS, BY_PAIRS)
        _pass_on(x_token, y_token, x_head, y_head, heads, 2 * pairs, features, HEADS, PAIRS)


class _Way(NamedTuple):
    """The options of a rotation that its gradient has too."""

    layout: str
    pairs: str
    table: str
    inverse: bool


def _reads_by_pairs(device: torch.device) -> bool:
    """Whether neighbours are read by one load and split, and joined and stored by one.

    On an H200 two loads and stores of every other number took 4 to 9 times as long. Not every vendor's Triton is known
    to have tl.split and tl.join.
    """
    return device.type == "cuda"


def _step(tensor: torch.Tensor, batched: int) -> int:
    """From one sequence to the next in a tensor that may have a batch axis; 0 where one serves them all."""
    return tensor.stride(0) if tensor.ndim == batched and tensor.shape[0] > 1 else 0


def _turned(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    way: _Way,
    is_transposed: bool = False,
) -> torch.Tensor:
    """y; transposed: the gradient of x from that of y, which is passed as x."""
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)  # with the strides of x: heads that lie in the order of tokens are written so
    batch, step, head = _AXES[way.layout]
    length, heads, features = x.shape[step], x.shape[head], x.shape[-1]
    number = x.shape[batch] if batch >= 0 else 1
    pairs = cos.shape[-1] if way.table == "half" else cos.shape[-1] // 2
    rows = None if positions is None else positions.contiguous()
    # "interleaved_to_half" is read as the one and written as the other; the other way round in the inverse and in the
    # gradient, but not in the gradient of the inverse.
    columns = "interleaved" if way.pairs == "interleaved" else "half"
    read, write = ("interleaved" if way.pairs == "interleaved_to_half" else columns), columns
    if way.inverse != is_transposed:
        read, write = write, read
    block = block_of(pairs, _MOST_PAIRS)
    tile = block_of(heads, max(_MOST_TILE // block, 1))
    launch(
        _turn,
        number * length,
        x,
        cos,
        sin,
        rows,
        y,
        number * length,
        length,
        heads,
        features,
        pairs,
        cos.shape[-2],
        *(tensor.stride(axis) if axis >= 0 else 0 for tensor in (x, y) for axis in (batch, step, head)),
        _step(cos, 3),
        cos.stride(-2),
        0 if rows is None else _step(rows, 2),
        HAS_POSITIONS=positions is not None,
        READ=read,
        WRITE=write,
        TABLE="one" if way.table == "half" else columns,
        IS_INVERSE=way.inverse,
        IS_TRANSPOSED=is_transposed,
        BY_PAIRS=_reads_by_pairs(x.device),
        HEADS=tile,
        PAIRS=block,
        block=2 * tile * block,
    )
    return y


class _Rope(Function):
    @staticmethod
    def forward(
        x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None, way: _Way
    ) -> torch.Tensor:
        return _turned(x, cos, sin, positions, way)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, cos, sin, positions, ctx.way = inputs
        ctx.save_for_backward(cos, sin, positions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        return _turned(dy, cos, sin, positions, ctx.way, is_transposed=True), None, None, None, None


@triton_kernel("rope", "our own; Su et al. 2021, equation 34")
def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    layout: Layout = "bshd",
    pairs: Literal["half", "interleaved", "interleaved_to_half"] = "half",
    table: Literal["full", "half"] = "full",
    compute: Literal["float32", "x"] = "float32",
    inverse: bool = False,
) -> torch.Tensor:
    """One kernel, in place of the reference's dozen.

    compute="x" is computed in float32 too and rounded once, which is nearer to the formula than upstream's roundings.
    A row beyond the table gives NaN: a kernel cannot raise.
    """
    check_rope(x, cos, sin, positions, cu_seqlens, layout=layout, pairs=pairs, table=table, compute=compute)
    rows = table_rows(x, positions, cu_seqlens, layout)
    y: torch.Tensor = _Rope.apply(x, cos, sin, rows, _Way(layout, pairs, table, inverse))
    return y
