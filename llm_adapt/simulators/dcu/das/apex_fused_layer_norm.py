"""apex.normalization.fused_layer_norm: LayerNorm. x [..., *shape], weight and bias [*shape]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from llm_adapt.simulators.dcu.das.limits import demand, missing

__all__ = ["FusedLayerNorm", "FusedLayerNormAffineFunction", "fused_layer_norm", "fused_layer_norm_affine"]

__getattr__ = missing("apex.normalization.fused_layer_norm")

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def fused_layer_norm(
    input: torch.Tensor, normalized_shape: Sequence[int], eps: float = 1e-6, memory_efficient: bool = False
) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps), in float32, rounded once to the dtype of x.

    Raises:
        RuntimeError: tensors that the kernel does not take.
    """
    return _norm(input, None, None, normalized_shape, eps)


def fused_layer_norm_affine(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    normalized_shape: Sequence[int],
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> torch.Tensor:
    """The same, times weight, plus bias.

    Raises:
        RuntimeError: tensors that the kernel does not take.
    """
    return _norm(input, weight, bias, normalized_shape, eps)


class FusedLayerNormAffineFunction(torch.autograd.Function):
    """fused_layer_norm_affine, as Megatron calls it."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        normalized_shape: Sequence[int],
        eps: float,
        memory_efficient: bool = False,
    ) -> torch.Tensor:
        """The norm; keeps its inputs."""
        ctx.save_for_backward(input, weight, bias)
        ctx.normalized_shape, ctx.eps = normalized_shape, eps
        return _norm(input, weight, bias, normalized_shape, eps)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Gradients of input, weight and bias."""
        leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            y = _norm(leaves[0], leaves[1], leaves[2], ctx.normalized_shape, ctx.eps)
        return (*torch.autograd.grad(y, leaves, grad_output), None, None, None)


def _norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, shape: Sequence[int], eps: float
) -> torch.Tensor:
    demand(x.is_cuda and x.dtype in _FLOATS, "fused_layer_norm_cuda takes tensors of 16 or 32 bits on cuda")
    for name, part in (("weight", weight), ("bias", bias)):
        demand(part is None or (part.dtype == x.dtype and tuple(part.shape) == tuple(shape)), f"{name}: dtype of x")
    wide_weight, wide_bias = (None if part is None else part.float() for part in (weight, bias))
    return F.layer_norm(x.float(), list(shape), wide_weight, wide_bias, eps).to(x.dtype)


class FusedLayerNorm(torch.nn.Module):
    """LayerNorm over the last axes."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.eps, self.elementwise_affine, self.memory_efficient = eps, elementwise_affine, memory_efficient
        self.weight = torch.nn.Parameter(torch.ones(self.normalized_shape)) if elementwise_affine else None
        self.bias = torch.nn.Parameter(torch.zeros(self.normalized_shape)) if elementwise_affine else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The norm of the input."""
        if self.weight is None or self.bias is None:
            return fused_layer_norm(input, self.normalized_shape, self.eps)
        return fused_layer_norm_affine(input, self.weight, self.bias, self.normalized_shape, self.eps)
