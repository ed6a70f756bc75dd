"""Gated linear units and activations. D = width of the result; x [..., 2D] holds both parts, or [..., D] the gate."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from llm_adapt.ops.activation import FUNCTIONS
from llm_adapt.ops.autograd import Function
from llm_adapt.ops.dispatch import Call
from llm_adapt.ops.glu import LAYOUTS
from llm_adapt.ops.kernels.openmp.library import (
    TYPES,
    first_order,
    function,
    gradients_wanted,
    openmp_kernel,
    pointer,
    rows_of,
    too_few,
)

__all__ = ["activation", "glu"]

_gated = function("gated", "pl pl i pi p p ll iii fff i")
_gated_backward = function("gated_backward", "pl pl i pi p pl ppp p ll iii fff i")
_ACTIVATIONS = {name: number for number, name in enumerate(sorted(FUNCTIONS))}  # enum Activation of gated.cpp
_LAYOUTS = {name: number for number, name in enumerate(LAYOUTS)}
_INFINITY = float("inf")
_OF_TORCH = {"gelu", "gelu_tanh", "relu", "sigmoid", "silu"}  # in one kernel each
_ERF = "is no faster than torch's erf"
_LEAST, _LEAST_ALONE, _LEAST_PLAIN = 2**13, 2**16, 2**17  # with weights or more; an activation; a gate and a product


class _How(NamedTuple):
    """The numbers of a call, as the library takes them."""

    activation: int
    layout: int
    is_gated: bool
    alpha: float = 1.0
    limit: float = _INFINITY
    offset: float = 0.0


def _shared(
    x: torch.Tensor, up: torch.Tensor | None, bias: torch.Tensor | None, weights: torch.Tensor | None
) -> tuple[tuple[Any, ...], tuple[torch.Tensor | None, ...]]:
    """The arguments that both ways begin with, and the tensors that must live as long as they are used."""
    rows, stride = rows_of(x)
    up_rows, up_stride = (None, 0) if up is None else rows_of(up)
    flat = None if bias is None else bias.contiguous()
    factors = None if weights is None else weights.reshape(-1).float().contiguous()
    arguments = (
        rows.data_ptr(), stride, pointer(up_rows), up_stride, TYPES[x.dtype],
        pointer(flat), 0 if bias is None else TYPES[bias.dtype], pointer(factors),
    )  # fmt: skip
    return arguments, (rows, up_rows, flat, factors)


def _forward(
    x: torch.Tensor,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    weights: torch.Tensor | None,
    how: _How,
) -> torch.Tensor:
    columns = x.shape[-1] // (2 if how.is_gated and up is None else 1)
    y = x.new_empty((*x.shape[:-1], columns))
    arguments, _alive = _shared(x, up, bias, weights)
    _gated(*arguments, y.data_ptr(), y.numel() // columns, columns, *how, torch.get_num_threads())
    return y


class _Gated(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        up: torch.Tensor | None,
        bias: torch.Tensor | None,
        weights: torch.Tensor | None,
        how: _How,
    ) -> torch.Tensor:
        ctx.how = how
        ctx.save_for_backward(x, up, bias, weights)
        return _forward(x, up, bias, weights, how)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, up, bias, weights = ctx.saved_tensors
        columns = dy.shape[-1]
        needs = ctx.needs_input_grad
        dx = x.new_empty(x.shape)
        dup = None if up is None else up.new_empty(up.shape)
        dbias = bias.new_empty(bias.shape) if bias is not None and needs[2] else None
        dweights = weights.new_empty(weights.shape, dtype=torch.float32) if weights is not None and needs[3] else None
        arguments, _alive = _shared(x, up, bias, weights)
        dy_rows, dy_stride = rows_of(dy)
        _gated_backward(
            *arguments,
            dy_rows.data_ptr(), dy_stride, dx.data_ptr(), pointer(dup), pointer(dbias), pointer(dweights),
            dy.numel() // columns, columns, *ctx.how, torch.get_num_threads(),
        )  # fmt: skip
        if dweights is not None:
            dweights = dweights.to(weights.dtype)
        return dx if needs[0] else None, dup if needs[1] else None, dbias, dweights, None


def _run(
    x: torch.Tensor, up: torch.Tensor | None, bias: torch.Tensor | None, weights: torch.Tensor | None, how: _How
) -> torch.Tensor:
    if gradients_wanted(x, up, bias, weights):
        y: torch.Tensor = _Gated.apply(x, up, bias, weights, how)
        return y
    return _forward(x, up, bias, weights, how)


def _misfit(call: Call, width: int) -> str | None:
    """What both ops ask of bias and weights; width = numbers of a bias."""
    if not width:
        return "takes rows of at least one number"
    bias, weights = call.bias, call.weights
    if bias is not None and (bias.shape[-1:] != (width,) or bias.shape.numel() != width or bias.ndim > call.x.ndim):
        return f"takes a bias of {width} numbers"
    if weights is not None and weights.shape != (*call.x.shape[:-1], 1):
        return "takes one weight a row"
    return None


def _not_for_glu(call: Call) -> str | None:
    x, up, limit = call.x, call.up, call.limit
    if call.activation not in FUNCTIONS or call.layout not in LAYOUTS:
        return "does not know that activation or layout"
    if call.alpha != 1.0 and call.activation != "silu":
        return "takes alpha with silu alone"
    if limit is not None and not limit > 0:
        return "takes a positive limit"
    if not x.ndim or (up is None and x.shape[-1] % 2):
        return "takes both parts in an even number of columns"
    if up is not None and (up.shape != x.shape or up.dtype != x.dtype or call.layout != "halves"):
        return "takes an up of the shape and dtype of x, and no layout with it"
    misfit = _misfit(call, x.shape[-1] * (1 if up is None else 2))
    if misfit:
        return misfit
    is_plain = call.weights is None and limit is None and call.alpha == 1.0 and call.up_offset == 0.0
    if is_plain and call.activation == "gelu":
        return _ERF
    # More than the activation and the product takes several of torch's kernels.
    least = _LEAST_PLAIN if is_plain and call.activation in _OF_TORCH else _LEAST
    return too_few(x, least if up is not None else 2 * least)


def _not_for_activation(call: Call) -> str | None:
    if call.options["function"] not in FUNCTIONS:
        return "does not know that function"
    misfit = _misfit(call, call.x.shape[-1]) if call.x.ndim else "takes at least one axis"
    if misfit or call.weights is not None:
        return misfit or too_few(call.x, _LEAST)
    if call.options["function"] == "gelu":
        return _ERF
    if call.options["function"] in _OF_TORCH - {"gelu_tanh"}:
        return "is no faster than the one kernel that torch has"
    return too_few(call.x, _LEAST_ALONE)


@openmp_kernel("glu", "our own; Shazeer 2020, equations 5 and 6", _not_for_glu)
def glu(
    x: torch.Tensor,
    up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "sigmoid", "silu"] = "silu",
    layout: Literal["halves", "halves_swapped", "interleaved"] = "halves",
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> torch.Tensor:
    """One pass over memory each way; backward computes the activation again."""
    bound = _INFINITY if limit is None else limit
    how = _How(_ACTIVATIONS[activation], _LAYOUTS[layout], True, alpha, bound, up_offset)
    return _run(x, up, bias, weights, how)


@openmp_kernel("activation", "our own; Hendrycks and Gimpel 2016", _not_for_activation)
def activation(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    function: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "sigmoid", "silu"] = "gelu",
) -> torch.Tensor:
    """One pass over memory each way; backward computes the activation again."""
    return _run(x, None, bias, weights, _How(_ACTIVATIONS[function], 0, False))
