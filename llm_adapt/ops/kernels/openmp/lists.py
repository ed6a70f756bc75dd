"""Norms of lists of 16-bit tensors: torch rounds its norm of one to 16 bits, or makes a float32 copy of it."""

from __future__ import annotations

import ctypes
import math

import torch

from llm_adapt.ops.dispatch import Call
from llm_adapt.ops.kernels.openmp.library import TYPES, function, openmp_kernel

__all__ = ["clip_grads", "multi_tensor_l2norm"]

_squares = function("squares", "pli i", ctypes.c_double)


def _not_narrow(call: Call) -> str | None:
    members = [tensor for name, tensor in call.tensors.items() if name.endswith("]")]
    if all(tensor.dtype == torch.float32 for tensor in members):
        return "is for 16-bit tensors; of float32 torch's own norm is as fast"
    if not all(tensor.is_contiguous for tensor in members):
        return "takes tensors without gaps"
    if call.options.get("norm_type", 2.0) != 2.0:
        return "computes the norm of squares alone"
    return None


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    threads = torch.get_num_threads()
    total = sum(_squares(tensor.data_ptr(), tensor.numel(), TYPES[tensor.dtype], threads) for tensor in tensors)
    return torch.tensor(math.sqrt(total), dtype=torch.float32)


@openmp_kernel("multi_tensor_l2norm", "our own", _not_narrow)
def multi_tensor_l2norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """One pass over each tensor; squares in float32, summed in float64."""
    return _norm(tensors)


@openmp_kernel("clip_grads", "our own; torch._foreach_mul_ of torch 2.13", _not_narrow)
def clip_grads(
    grads: list[torch.Tensor],
    total_norm: torch.Tensor | None = None,
    max_norm: float = 1.0,
    eps: float = 1e-6,
) -> torch.Tensor:
    """The norm in one pass, the product by torch."""
    with torch.no_grad():
        norm = _norm(grads) if total_norm is None else total_norm.detach().clone().reshape(())
        torch._foreach_mul_(grads, (max_norm / (norm + eps)).clamp(max=1.0))
        return norm
