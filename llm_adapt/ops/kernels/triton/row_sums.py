"""Sums over rows, in Triton: gradients of what all rows share. No atomics: the same bits each time.

Every program sums some rows, into a part of its own; the parts are added up.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from llm_adapt.ops.kernels.triton.library import launch, programs_at_once

__all__ = ["added_up", "sums_of_products"]

ROWS, COLUMNS = 64, 32  # of the parts, which a program adds up at a time


@triton.jit
def _sums(h, dy, rstd, parts, rows, columns, h_stride, dy_stride, number, blocks, BLOCK: tl.constexpr):
    """Sum dy h r over every number-th row, for one of the blocks of columns."""
    part = tl.program_id(0) // blocks
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(part.to(tl.int64), rows, number):
        value = tl.load(h + row * h_stride + at, mask=at < columns, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_stride + at, mask=at < columns, other=0.0).to(tl.float32)
        total += g * value * tl.load(rstd + row)
    tl.store(parts + part * columns + at, total, mask=at < columns)


@triton.jit
def _added_up(parts, sums, number, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the parts, for some blocks of columns."""
    for first in range(tl.program_id(0) * BLOCK, columns, tl.num_programs(0) * BLOCK):
        at = first + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, number, ROWS):
            part = start + tl.arange(0, ROWS)
            mask = (part < number)[:, None] & (at < columns)[None, :]
            total += tl.sum(tl.load(parts + part[:, None] * columns + at[None, :], mask=mask, other=0.0), 0)
        tl.store(sums + at, total.to(sums.dtype.element_ty), mask=at < columns)


def sums_of_products(h: torch.Tensor, dy: torch.Tensor, rstd: torch.Tensor, block: int) -> torch.Tensor:
    """Sums of dy h rstd in parts [programs, H] float32, each of some of the rows of h and dy [N, H], rstd [N]."""
    number, columns = h.shape
    blocks = -(-columns // block)
    programs = min(number, max(4 * programs_at_once(h.device) // blocks, 1))
    parts = h.new_empty(programs, columns, dtype=torch.float32)
    sizes = number, columns, h.stride(0), dy.stride(0), programs, blocks
    launch(_sums, programs * blocks, h, dy, rstd, parts, *sizes, BLOCK=block, block=block)
    return parts


def added_up(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum of the parts [P, H] float32, as [H] of a dtype."""
    number, columns = parts.shape
    total = parts.new_empty(columns, dtype=dtype)
    sizes = {"ROWS": ROWS, "BLOCK": COLUMNS, "block": ROWS * COLUMNS}
    launch(_added_up, -(-columns // COLUMNS), parts, total, number, columns, **sizes)
    return total
