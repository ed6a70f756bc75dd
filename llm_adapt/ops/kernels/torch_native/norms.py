"""Norms of torch. Source: torch 2.13 documentation of each function named."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from llm_adapt.ops.dispatch import Call, kernel

__all__ = ["add_rms_norm", "layer_norm", "mixed_dtypes", "rms_norm"]


def mixed_dtypes(call: Call) -> str | None:
    """Why a call of several dtypes is refused."""
    if any(tensor.dtype != call.dtype for tensor in call.tensors.values()):
        return "takes tensors of one dtype"  # CUDA's layer_norm raises, and rms_norm is a composite with a warning
    return None


@kernel("add_rms_norm", "torch.nn.functional.rms_norm", refuses=mixed_dtypes, compilable=True, functorch=True)
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, then F.rms_norm of it."""
    h = x + residual
    return F.rms_norm(h, h.shape[-1:], weight, eps), h


def _layer_norm(call: Call) -> str | None:
    if call.device == "cpu" and call.dtype in (torch.bfloat16, torch.float16):
        # Workaround: cpu-16-bit-norms
        return "keeps the mean, and adds up the gradients of weight and bias, in 16 bits on the CPU"
    return mixed_dtypes(call)


@kernel("layer_norm", "torch.nn.functional.layer_norm", refuses=_layer_norm, compilable=True, functorch=True)
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """F.layer_norm, a fused kernel on CUDA and on the CPU."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@kernel("rms_norm", "torch.nn.functional.rms_norm", refuses=mixed_dtypes, compilable=True, functorch=True)
def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """F.rms_norm, a fused kernel on CUDA and a composite elsewhere."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)
