"""Gated linear units in Triton. Rows of D columns: y = f(gate) * (up + up_offset) * weight of the row.

Gate and linear part are views with a stride between rows and one between columns (2 where they are interleaved), so
packed tensors are neither split nor put together. The backward computes f again from the inputs.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from llm_adapt.ops.activation import check_weights
from llm_adapt.ops.autograd import Function
from llm_adapt.ops.glu import check_glu, split
from llm_adapt.ops.kernels.triton.library import block_of, launch, rows_of, triton_kernel

__all__ = ["glu"]

_MOST_COLUMNS = 2048  # of a block on an NPU or MLU: the backward keeps more of them than a norm does
_MOST_ON_GPU = 4096


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _activated(x, alpha, FUNCTION: tl.constexpr):
    """f(x) and f'(x). Each comparison is such that NaN stays NaN."""
    if FUNCTION == "silu":
        s = _sigmoid(alpha * x)
        f, slope = x * s, s * (1.0 + alpha * x * (1.0 - s))
    elif FUNCTION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u): not every Triton has tanh.
        s = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 2 sqrt(2 / pi)
        f, slope = x * s, s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif FUNCTION == "gelu":
        s = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        f, slope = x * s, s + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)  # 1 / sqrt(2 pi)
    elif FUNCTION == "sigmoid":
        f = _sigmoid(x)
        slope = f * (1.0 - f)
    elif FUNCTION == "relu":
        f, slope = tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)
    else:
        tl.static_assert(FUNCTION == "relu_squared")
        f = tl.where(x <= 0.0, 0.0, x)
        f, slope = f * f, 2.0 * f
    return f, slope


@triton.jit
def _clamped(gate, linear, limit):
    """Both parts within the limit."""
    gate = tl.where(gate > limit, limit, gate)
    return gate, tl.where(linear > limit, limit, tl.where(linear < -limit, -limit, linear))


@triton.jit
def _forward(
    gate,
    linear,
    weights,
    y,
    rows,
    columns,
    gate_stride,
    linear_stride,
    alpha,
    limit,
    up_offset,
    FUNCTION: tl.constexpr,
    STEP: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        factor = 1.0
        if HAS_WEIGHTS:
            factor = tl.load(weights + row).to(tl.float32)
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            a = tl.load(gate + row * gate_stride + at * STEP, mask=at < columns, other=0.0).to(tl.float32)
            b = tl.load(linear + row * linear_stride + at * STEP, mask=at < columns, other=0.0).to(tl.float32)
            if HAS_LIMIT:
                a, b = _clamped(a, b, limit)
            f, _ = _activated(a, alpha, FUNCTION)
            value = f * (b + up_offset) * factor
            tl.store(y + row * columns + at, value.to(y.dtype.element_ty), mask=at < columns)


@triton.jit
def _backward(
    gate,
    linear,
    weights,
    dy,
    dgate,
    dlinear,
    dweights,
    rows,
    columns,
    gate_stride,
    linear_stride,
    dy_stride,
    result_stride,
    alpha,
    limit,
    up_offset,
    FUNCTION: tl.constexpr,
    STEP: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        factor = 1.0
        if HAS_WEIGHTS:
            factor = tl.load(weights + row).to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            a = tl.load(gate + row * gate_stride + at * STEP, mask=at < columns, other=0.0).to(tl.float32)
            b = tl.load(linear + row * linear_stride + at * STEP, mask=at < columns, other=0.0).to(tl.float32)
            g = tl.load(dy + row * dy_stride + at, mask=at < columns, other=0.0).to(tl.float32)
            if HAS_LIMIT:  # the gradient passes where a part was within it
                a_passes, b_passes = a <= limit, (b >= -limit) & (b <= limit)
                a, b = _clamped(a, b, limit)
            f, slope = _activated(a, alpha, FUNCTION)
            b += up_offset
            if HAS_WEIGHTS:
                total += g * f * b
            g = g * factor
            da, db = g * slope * b, g * f
            if HAS_LIMIT:
                da, db = tl.where(a_passes, da, 0.0), tl.where(b_passes, db, 0.0)
            out = row * result_stride + at * STEP
            tl.store(dgate + out, da.to(dgate.dtype.element_ty), mask=at < columns)
            tl.store(dlinear + out, db.to(dlinear.dtype.element_ty), mask=at < columns)
        if HAS_WEIGHTS:
            tl.store(dweights + row, tl.sum(total, 0).to(dweights.dtype.element_ty))


class _Options(NamedTuple):
    activation: str
    layout: str
    alpha: float
    limit: float | None
    up_offset: float


def _parts(x: torch.Tensor, up: torch.Tensor | None, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and linear part as rows."""
    return split(rows_of(x), layout) if up is None else (rows_of(x), rows_of(up))


def _constants(
    columns: int, weights: torch.Tensor | None, is_packed: bool, options: _Options, device: torch.device
) -> dict[str, Any]:
    activation = "silu" if options.activation == "quick_gelu" else options.activation
    return {
        "alpha": 1.702 if options.activation == "quick_gelu" else float(options.alpha),
        "limit": 0.0 if options.limit is None else float(options.limit),
        "up_offset": float(options.up_offset),
        "FUNCTION": activation,
        "STEP": 2 if is_packed and options.layout == "interleaved" else 1,
        "HAS_WEIGHTS": weights is not None,
        "HAS_LIMIT": options.limit is not None,
        "BLOCK": block_of(columns, _MOST_ON_GPU if device.type == "cuda" else _MOST_COLUMNS),
    }


class _GLU(Function):
    @staticmethod
    def forward(
        x: torch.Tensor, up: torch.Tensor | None, weights: torch.Tensor | None, options: _Options
    ) -> torch.Tensor:
        gate, linear = _parts(x, up, options.layout)
        rows, columns = gate.shape
        y = x.new_empty(*x.shape[:-1], columns)
        flat = None if weights is None else weights.reshape(-1)
        strides = gate.stride(0), linear.stride(0)
        constants = _constants(columns, weights, up is None, options, x.device)
        launch(
            _forward, rows, gate, linear, flat, y, rows, columns, *strides, **constants, block=2 * constants["BLOCK"]
        )
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, up, weights = ctx.saved_tensors
        gate, linear = _parts(x, up, ctx.options.layout)
        rows, columns = gate.shape
        dx = x.new_empty(x.shape)
        dup = None if up is None else up.new_empty(up.shape)
        dgate, dlinear = _parts(dx, dup, ctx.options.layout)
        dweights = None if weights is None else weights.new_empty(weights.shape)
        flat, dy_rows = None if weights is None else weights.reshape(-1), rows_of(dy)
        strides = gate.stride(0), linear.stride(0), dy_rows.stride(0), dgate.stride(0)
        constants = _constants(columns, weights, up is None, ctx.options, x.device)
        tensors = gate, linear, flat, dy_rows, dgate, dlinear, dweights
        launch(_backward, rows, *tensors, rows, columns, *strides, **constants, block=2 * constants["BLOCK"])
        return dx, dup, dweights, None


@triton_kernel("glu", "our own; Shazeer 2020, equations 5 and 6")
def glu(
    x: torch.Tensor,
    up: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "sigmoid", "silu"] = "silu",
    layout: Literal["halves", "halves_swapped", "interleaved"] = "halves",
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> torch.Tensor:
    """One kernel forward and one backward. Without bias: its gradient would be a sum over rows."""
    check_glu(x, up, activation, layout, alpha)
    if weights is not None:
        check_weights("glu", weights, x.shape)
    y: torch.Tensor = _GLU.apply(x, up, weights, _Options(activation, layout, alpha, limit, up_offset))
    return y
