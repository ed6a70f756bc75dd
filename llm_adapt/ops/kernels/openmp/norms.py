"""RMSNorm, alone and of a sum, and LayerNorm. x [..., H] = hidden states, weight [H], bias [H].

Kept for backward: the input as it is, and two float32 numbers a row at most.
"""

from __future__ import annotations

from typing import Any

import torch

from llm_adapt.ops.add_rms_norm import RESULT_DTYPES as SUM_RESULT_DTYPES
from llm_adapt.ops.add_rms_norm import ResultDtype as SumResultDtype
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
from llm_adapt.ops.layer_norm import Form as LayerForm
from llm_adapt.ops.rms_norm import FORMS, RESULT_DTYPES, Form, ResultDtype, result_of

__all__ = ["add_rms_norm", "layer_norm", "rms_norm"]

_norm = function("norm", "pli pli pi pi pi pi pp ll f iii")
_norm_backward = function("norm_backward", "pli pi pli pli pp ppp i ll iii")
_FORMS = {name: number for number, name in enumerate(FORMS)}  # enum Form of norms.cpp
_RESULTS = {"rms_norm": RESULT_DTYPES, "layer_norm": RESULT_DTYPES, "add_rms_norm": SUM_RESULT_DTYPES}


def _why_not(call: Call) -> str | None:
    columns = call.x.shape[-1:]
    # A norm of fewer is a sign: its gradient is 0, but for what cancels.
    least = 3 if call.op == "layer_norm" else 2
    if columns.numel() < least or not call.x.ndim:
        return f"takes rows of at least {least} numbers"
    vectors = [call.tensors[name] for name in ("weight", "bias") if name in call.tensors]
    if any(vector.shape != columns for vector in vectors):
        return "takes a weight and a bias of the size of the last axis of x"
    if call.op == "add_rms_norm" and call.residual.shape != call.x.shape:
        return "takes x and residual of one shape"
    known = _RESULTS[call.op]
    if call.form not in FORMS or call.result_dtype not in known:
        return "does not know that form or result_dtype"
    if call.weight is None and (call.form != "standard" or call.result_dtype not in (known[0], "x")):
        return "form or result_dtype speaks of a weight, and there is none"
    dtypes = {tensor.dtype for tensor in call.tensors.values()}
    if call.op == "layer_norm" and dtypes == {torch.float32} and call.form == "standard":
        return "is no faster than torch's own in float32"
    return None


def _forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    form: str,
    result: torch.dtype,
    is_centered: bool = False,
    is_kept: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """y, h (x itself without a residual), and where they are kept the mean and 1 / sqrt(mean square + eps) of rows."""
    columns = x.shape[-1]
    number = x.numel() // columns
    rows, stride = rows_of(x)
    h, h_type = x, TYPES[x.dtype]
    added, added_stride, added_type = None, 0, 0
    if residual is not None:
        added, added_stride = rows_of(residual)
        added_type = TYPES[residual.dtype]
        h = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
        h_type = TYPES[h.dtype]
    y = x.new_empty(x.shape, dtype=result)
    mean = x.new_empty(number, dtype=torch.float32) if is_kept and is_centered else None
    rstd = x.new_empty(number, dtype=torch.float32) if is_kept else None
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    _norm(
        rows.data_ptr(), stride, TYPES[x.dtype],
        pointer(added), added_stride, added_type,
        h.data_ptr(), h_type,
        pointer(weight), 0 if weight is None else TYPES[weight.dtype],
        pointer(bias), 0 if bias is None else TYPES[bias.dtype],
        y.data_ptr(), TYPES[result],
        pointer(mean), pointer(rstd),
        number, columns, eps, _FORMS[form], is_centered, torch.get_num_threads(),
    )  # fmt: skip
    return y, h, mean, rstd


def _backward(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    saved: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor],
    form: str,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of h, the incoming one added, of the weight and of the bias, where they are wanted."""
    h, weight, bias, mean, rstd = saved
    columns = h.shape[-1]
    rows, stride = rows_of(h)
    dy_rows, dy_stride = rows_of(dy)
    dh_rows, dh_stride = (None, 0) if dh is None else rows_of(dh)
    dx = h.new_empty(h.shape) if wanted[0] else None
    dw = torch.empty_like(weight) if weight is not None and wanted[1] else None
    dbias = torch.empty_like(bias) if bias is not None and wanted[2] else None
    weight = None if weight is None else weight.contiguous()
    _norm_backward(
        rows.data_ptr(), stride, TYPES[h.dtype],
        pointer(weight), 0 if weight is None else TYPES[weight.dtype],
        dy_rows.data_ptr(), dy_stride, TYPES[dy.dtype],
        pointer(dh_rows), dh_stride, 0 if dh is None else TYPES[dh.dtype],
        pointer(mean), rstd.data_ptr(),
        pointer(dx), pointer(dw), pointer(dbias), 0 if bias is None else TYPES[bias.dtype],
        h.numel() // columns, columns, _FORMS[form], mean is not None, torch.get_num_threads(),
    )  # fmt: skip
    return dx, dw, dbias


class _Norm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        form: str,
        result: torch.dtype,
        is_centered: bool,
    ) -> torch.Tensor:
        y, _, mean, rstd = _forward(x, None, weight, bias, eps, form, result, is_centered, True)
        ctx.form = form
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_backward(dy, None, ctx.saved_tensors, ctx.form, ctx.needs_input_grad[:3]), None, None, None, None


class _AddNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        form: str,
        result: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, h, _, rstd = _forward(x, residual, weight, None, eps, form, result, False, True)
        ctx.form, ctx.dtypes = form, (x.dtype, residual.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, weight, None, None, rstd)
        return y, h

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: torch.Tensor | None, dh: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        needs_x, needs_residual, needs_weight = ctx.needs_input_grad[:3]
        total, dw = dh, None
        if dy is not None:
            wanted = (needs_x or needs_residual, needs_weight, False)
            total, dw, _ = _backward(dy, dh, ctx.saved_tensors, ctx.form, wanted)
        dx, dresidual = (None if total is None else total.to(dtype) for dtype in ctx.dtypes)
        return dx if needs_x else None, dresidual if needs_residual else None, dw, None, None, None


@openmp_kernel("rms_norm", "our own; Zhang and Sennrich 2019, equation 4", _why_not)
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    form: Form = "standard",
    result_dtype: ResultDtype = "x",
) -> torch.Tensor:
    """One pass over memory each way."""
    result = result_of(result_dtype, x.dtype, weight)
    if gradients_wanted(x, weight):
        y: torch.Tensor = _Norm.apply(x, weight, None, eps, form, result, False)
        return y
    return _forward(x, None, weight, None, eps, form, result)[0]


@openmp_kernel("layer_norm", "our own; Ba, Kiros and Hinton 2016, equation 4", _why_not)
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    form: LayerForm = "standard",
    result_dtype: ResultDtype = "x",
) -> torch.Tensor:
    """One pass over memory each way; mean and deviation are kept in float32 for any dtype."""
    result = result_of(result_dtype, x.dtype, weight)
    if gradients_wanted(x, weight, bias):
        y: torch.Tensor = _Norm.apply(x, weight, bias, eps, form, result, True)
        return y
    return _forward(x, None, weight, bias, eps, form, result, True)[0]


@openmp_kernel("add_rms_norm", "our own; Zhang and Sennrich 2019, equation 4", _why_not)
def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    form: Form = "standard",
    result_dtype: SumResultDtype = "sum",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum is stored and normalised in one pass; backward adds the gradient of h as it writes."""
    h_dtype = torch.promote_types(x.dtype, residual.dtype)
    result = x.dtype if result_dtype == "x" else result_of(result_dtype, h_dtype, weight)
    if gradients_wanted(x, residual, weight):
        found: tuple[torch.Tensor, torch.Tensor] = _AddNorm.apply(x, residual, weight, eps, form, result)
        return found
    return _forward(x, residual, weight, None, eps, form, result)[:2]
