"""Rotary position embedding. x as of llm_adapt/ops/rope.py; nothing of it is kept for backward."""

from __future__ import annotations

import ctypes
from typing import Any, Literal, NamedTuple

import torch

from llm_adapt.ops.autograd import Function
from llm_adapt.ops.dispatch import Call
from llm_adapt.ops.kernels.openmp.library import TYPES, first_order, function, gradients_wanted, openmp_kernel, pointer
from llm_adapt.ops.rope import Layout, check_rope, table_rows

__all__ = ["rope"]

_rope = function("rope", "ppip llll pp ii ll ll pl iiiii i", ctypes.c_int64)
_Strides = ctypes.c_int64 * 6
_AXES = {"bshd": (0, 1, 2), "sbhd": (1, 0, 2), "bhsd": (0, 2, 1), "thd": (None, 0, 1)}  # of batch, position and head
_PAIRS = {"half": 0, "interleaved": 1, "interleaved_to_half": 2}


class _How(NamedTuple):
    """The options of a call."""

    layout: str
    pairs: str
    table: str
    is_rounded: bool
    is_inverse: bool


def _rotated(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    how: _How,
    is_backward: bool,
) -> torch.Tensor:
    """y, or the gradient of x from that of y; its axes lie in memory as those of x do."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty_like(x)
    if y.stride(-1) != 1:
        y = x.new_empty(x.shape)
    axes = _AXES[how.layout]
    sizes = [1 if axis is None else x.shape[axis] for axis in axes]
    strides = [0 if axis is None else tensor.stride(axis) for tensor in (x, y) for axis in axes]
    if cos.stride(-1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    wrong = _rope(
        x.data_ptr(), y.data_ptr(), TYPES[x.dtype], _Strides(*strides),
        *sizes, x.shape[-1],
        cos.data_ptr(), sin.data_ptr(), TYPES[cos.dtype], TYPES[sin.dtype],
        cos.stride(-2), cos.stride(0) if cos.ndim == 3 and cos.shape[0] > 1 else 0,
        cos.shape[-2], cos.shape[-1] // (2 if how.table == "full" else 1),
        pointer(positions), 0 if positions is None or positions.ndim == 1 or positions.shape[0] == 1 else sizes[1],
        _PAIRS[how.pairs], how.table == "half", how.is_rounded, how.is_inverse, is_backward,
        torch.get_num_threads(),
    )  # fmt: skip
    if wrong >= 0:
        assert positions is not None
        raise IndexError(
            f"rope: position {int(positions.reshape(-1)[wrong])} was asked; the tables have {cos.shape[-2]} rows. "
            "Make longer tables, or correct positions."
        )
    return y


class _Rope(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor | None,
        how: _How,
    ) -> torch.Tensor:
        ctx.how = how
        ctx.save_for_backward(cos, sin, positions)
        return _rotated(x, cos, sin, positions, how, False)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        return _rotated(dy, cos, sin, positions, ctx.how, True), None, None, None, None


def _why_not(call: Call) -> str | None:
    given = {name: call.tensors.get(name) for name in ("x", "cos", "sin", "positions", "cu_seqlens")}
    sizes: dict[str, Any] = {
        name: None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in given.items()
    }
    options = {name: call.options[name] for name in ("layout", "pairs", "table", "compute")}
    try:
        check_rope(**sizes, **options)
    except (TypeError, ValueError):
        return "does not take tensors that do not fit together"  # the reference says in which way
    if not call.cos.shape[-1]:
        return "has nothing to rotate"
    return None


@openmp_kernel("rope", "our own; Su et al. 2021, equation 34", _why_not)
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
    """One pass over x each way; backward is the rotation back."""
    if cu_seqlens is not None:
        positions = table_rows(x, None, cu_seqlens, layout)
    if positions is not None:
        positions = positions.long().contiguous()
    how = _How(layout, pairs, table, compute == "x", inverse)
    if gradients_wanted(x):
        y: torch.Tensor = _Rope.apply(x, cos, sin, positions, how)
        return y
    return _rotated(x, cos, sin, positions, how, False)
