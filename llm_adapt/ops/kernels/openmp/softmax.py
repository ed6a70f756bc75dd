"""Softmax of attention scores. x [B, N, Q, K] = batch, heads, queries, keys, or [BN, Q, K]; sinks [N].

Kept for backward: p of float32; of 16 bits x and one float32 number a row.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch

from llm_adapt.ops.autograd import Function
from llm_adapt.ops.dispatch import Call
from llm_adapt.ops.kernels.openmp.library import (
    TYPES,
    first_order,
    function,
    gradients_wanted,
    openmp_kernel,
    pointer,
    rows_of,
)

__all__ = ["scaled_masked_softmax"]

_softmax = function("masked_softmax", "pli p pp pp llll ll f i")
_softmax_backward = function("masked_softmax_backward", "pli p pp pp pl pp llll ll f i")
_Strides = ctypes.c_int64 * 4


class _How(NamedTuple):
    """The numbers of a call, as the library takes them; left, right: how many keys beside its place a query sees."""

    left: int
    right: int
    scale: float


def _sizes(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.shape) if x.ndim == 4 else (x.shape[0], 1, *x.shape[1:])


def _spread(mask: torch.Tensor | None, x: torch.Tensor) -> tuple[torch.Tensor | None, Any]:
    """The mask as a view of the shape of x, and its strides of batch, head, query and key."""
    if mask is None:
        return None, _Strides()
    mask = mask.expand(x.shape)
    of = mask.stride()
    return mask, _Strides(*(of if x.ndim == 4 else (of[0], 0, *of[1:])))


def _forward(
    x: torch.Tensor, mask: torch.Tensor | None, sinks: torch.Tensor | None, how: _How, is_kept: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """p, and where it is kept the log-sum-exp of each row."""
    rows, stride = rows_of(x)
    p = x.new_empty(x.shape)
    lse = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32) if is_kept else None
    mask, strides = _spread(mask, x)
    _softmax(
        rows.data_ptr(), stride, TYPES[x.dtype], p.data_ptr(), pointer(mask), strides, pointer(sinks), pointer(lse),
        *_sizes(x), *how, torch.get_num_threads(),
    )  # fmt: skip
    return p, lse


class _Softmax(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, mask: torch.Tensor | None, sinks: torch.Tensor | None, how: _How
    ) -> torch.Tensor:
        wide = None if sinks is None else sinks.float().contiguous()
        is_formed_again = x.dtype != torch.float32
        p, lse = _forward(x, mask, wide, how, is_formed_again or ctx.needs_input_grad[2])
        ctx.how, ctx.sinks_dtype = how, None if sinks is None else sinks.dtype
        ctx.save_for_backward(*((x, mask, None) if is_formed_again else (None, None, p)), wide, lse)
        return p

    @staticmethod
    @first_order
    def backward(ctx: Any, dp: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, mask, p, sinks, lse = ctx.saved_tensors
        rows, stride = rows_of(dp)
        x_rows, x_stride = (None, 0) if x is None else rows_of(x)
        mask, strides = _spread(mask, dp)
        dx = dp.new_empty(dp.shape)
        dsinks = torch.empty_like(sinks) if ctx.needs_input_grad[2] else None
        _softmax_backward(
            pointer(x_rows), x_stride, TYPES[dp.dtype], pointer(p), pointer(mask), strides, pointer(sinks),
            pointer(lse), rows.data_ptr(), stride, dx.data_ptr(), pointer(dsinks), *_sizes(dp), *ctx.how,
            torch.get_num_threads(),
        )  # fmt: skip
        return dx, None, None if dsinks is None else dsinks.to(ctx.sinks_dtype), None


def _why_not(call: Call) -> str | None:
    x, mask, sinks, window = call.x, call.mask, call.sinks, call.window
    if x.ndim not in (3, 4) or not x.shape[-1]:
        return "takes three or four axes, and at least one key"
    if mask is not None:
        sizes = tuple(x.shape)[-mask.ndim :] if mask.ndim else ()
        fits = 0 < mask.ndim <= x.ndim and all(a in (1, b) for a, b in zip(mask.shape, sizes, strict=True))
        if mask.dtype != torch.bool or not fits:
            return "takes a boolean mask that broadcasts to x"
    if sinks is not None and (x.ndim != 4 or sinks.shape != x.shape[1:2]):
        return "takes one sink a head"
    return None if window is None or min(window) >= -1 else "takes a window of -1 or more"


@openmp_kernel("scaled_masked_softmax", "our own; Milakov and Gimelshein 2018", _why_not)
def scaled_masked_softmax(
    x: torch.Tensor,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    scale: float = 1.0,
    causal: bool = False,
    window: tuple[int, int] | None = None,
) -> torch.Tensor:
    """The scores are read once each way; keys that are hidden by their place are not read at all."""
    left, right = window or (-1, -1)
    if causal:
        right = 0 if right < 0 else min(right, 0)
    how = _How(left, right, scale)
    if gradients_wanted(x, sinks):
        p: torch.Tensor = _Softmax.apply(x, mask, sinks, how)
        return p
    return _forward(x, mask, None if sinks is None else sinks.float().contiguous(), how)[0]
