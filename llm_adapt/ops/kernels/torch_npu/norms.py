"""Norms of torch_npu. x [..., H], weight [H]; y = x / sqrt(mean(x^2) + eps) * gamma, rounded once.

npu_rms_norm takes gamma of the dtype of x, or of float32. npu_add_rms_norm takes one dtype alone and its backward
raises, so it stands in a Function of ours whose backward is npu_rms_norm_backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_npu

from llm_adapt.ops.add_rms_norm import ResultDtype as SumResultDtype
from llm_adapt.ops.autograd import Function
from llm_adapt.ops.dispatch import Call
from llm_adapt.ops.kernels.torch_npu.library import npu_kernel
from llm_adapt.ops.rms_norm import Form, ResultDtype, result_of

__all__ = ["add_rms_norm", "rms_norm"]


def _axes(call: Call) -> str | None:
    return None if 2 <= call.x.ndim <= 8 else "takes x of 2 to 8 axes"


def _gamma(weight: torch.Tensor | None, form: str, x: torch.Tensor) -> torch.Tensor:
    """The weight as the kernel takes it: of the dtype of x, or of float32."""
    if weight is None:
        return x.new_ones(x.shape[-1])
    if form == "one_plus":
        weight = weight.float() + 1
    elif form == "one_plus_rounded":
        weight = weight + 1
    return weight if weight.dtype == x.dtype else weight.float()


def _normed(x: torch.Tensor, weight: torch.Tensor | None, eps: float, form: str, result: torch.dtype) -> torch.Tensor:
    x = x.to(torch.promote_types(x.dtype, result))  # y has the dtype of x
    y: torch.Tensor = torch_npu.npu_rms_norm(x, _gamma(weight, form, x), epsilon=eps)[0]
    return y.to(result)


@npu_kernel("rms_norm", "npu_rms_norm", refuses=_axes)
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    form: Form = "standard",
    result_dtype: ResultDtype = "x",
) -> torch.Tensor:
    """npu_rms_norm; "cast_first" is rounded once too, which is nearer to the formula than upstream's two roundings."""
    return _normed(x, weight, eps, form, result_of(result_dtype, x.dtype, weight))


class _AddRMSNorm(Function):
    """npu_add_rms_norm with the backward that torch_npu leaves out."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, rstd, h = torch_npu.npu_add_rms_norm(x, residual, gamma, epsilon=eps)
        ctx.save_for_backward(h, gamma, rstd)
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, dh: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        h, gamma, rstd = ctx.saved_tensors
        dx, dgamma = torch_npu.npu_rms_norm_backward(dy, h, gamma, rstd)
        dx = dx + dh  # h = x + residual is the normed input and a result: both of its gradients
        return dx, dx, dgamma.to(gamma.dtype), None


@npu_kernel("add_rms_norm", "npu_add_rms_norm", "npu_rms_norm", "npu_rms_norm_backward", refuses=_axes)
def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    form: Form = "standard",
    result_dtype: SumResultDtype = "sum",
) -> tuple[torch.Tensor, torch.Tensor]:
    """npu_add_rms_norm where x, residual and gamma have one dtype; the sum, then npu_rms_norm, elsewhere."""
    gamma = _gamma(weight, form, x)
    h_dtype = torch.promote_types(x.dtype, residual.dtype)
    result = x.dtype if result_dtype == "x" else result_of(result_dtype, h_dtype, weight)
    if x.dtype == residual.dtype == gamma.dtype == result:
        y, h = _AddRMSNorm.apply(x, residual, gamma, eps)  # type: ignore[no-untyped-call]
        return y, h
    h = x + residual
    return _normed(h, weight, eps, form, result), h
