"""L2 norm of a list of tensors. n = tensors of any shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llm_adapt.ops.dispatch import fused_op

__all__ = ["multi_tensor_l2norm"]


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    tensors = [torch.randn(sizes, generator=generator).to(dtype) for sizes in ((5, 7), (64,), (), (0, 3))]
    yield {"tensors": tensors}
    yield {"tensors": tensors[:2], "per_tensor": True}
    yield {"tensors": tensors[3:], "per_tensor": True}


def shrink_lists(arguments: dict[str, Any]) -> dict[str, Any]:
    """At most 8 tensors of each list, from both ends of it, and 4096 elements of each."""

    def part(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        chosen = tensors if len(tensors) <= 8 else [*tensors[:4], *tensors[-4:]]
        return [tensor.detach().reshape(-1)[:4096] if tensor.ndim else tensor for tensor in chosen]

    return {name: part(value) if isinstance(value, list) else value for name, value in arguments.items()}


@fused_op(inputs=_inputs, differentiable=(), shrink=shrink_lists)
def multi_tensor_l2norm(
    tensors: list[torch.Tensor], per_tensor: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """norm = sqrt(sum of the squares of all elements of all tensors); per_tensor: that of each tensor as well.

    Of no tensors it is 0, on the CPU. nan and inf are not hidden. No gradient flows through it.

    Shapes: tensors of any shapes -> norm [], or (norm [], norms [n]).
    Dtypes: squares and sums in float32 (float64 where a tensor is float64), which is the dtype of the result.
    Source: NVIDIA apex csrc/multi_tensor_l2norm_kernel.cu; torch 2.13 nn/utils/clip_grad.py, get_total_norm.
    """
    if not tensors:
        norm = torch.zeros(())
        return (norm, torch.zeros(0)) if per_tensor else norm
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    with torch.no_grad():
        squares = torch.stack([tensor.to(wide).square().sum().to(tensors[0].device) for tensor in tensors])
        norm = squares.sum().sqrt()
        return (norm, squares.sqrt()) if per_tensor else norm
