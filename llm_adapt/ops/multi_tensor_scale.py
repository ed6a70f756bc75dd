"""Scaling of a list of tensors into another. n = tensors of any shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llm_adapt.ops.dispatch import fused_op
from llm_adapt.ops.multi_tensor_l2norm import shrink_lists

__all__ = ["multi_tensor_scale"]


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(dtype: torch.dtype = dtype) -> list[torch.Tensor]:
        return [torch.randn(sizes, generator=generator).to(dtype) for sizes in ((5, 7), (64,), (), (0, 3))]

    infinite = draw()
    infinite[1][3] = float("inf")
    yield {"tensors": draw(), "outputs": draw(), "scale": 0.25}
    yield {"tensors": draw(), "outputs": draw(torch.float32), "device_scale": torch.tensor(3.0)}
    yield {"tensors": draw(), "outputs": draw(), "scale": 0.5, "found_inf": torch.tensor(0.0)}
    yield {"tensors": infinite, "outputs": draw(), "found_inf": torch.zeros(1, dtype=torch.int32)}


@fused_op(
    inputs=_inputs,
    differentiable=(),
    mutates=("outputs", "found_inf"),
    dynamic=frozenset({"scale"}),
    shrink=shrink_lists,
)
def multi_tensor_scale(
    tensors: list[torch.Tensor],
    outputs: list[torch.Tensor],
    device_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """outputs[i] = tensors[i] * scale * device_scale, in place; found_inf = 1 where a tensor holds inf or nan.

    The lists may be one list. found_inf is not set back to 0, and nothing is skipped: inf and nan are passed on.

    Shapes: tensors and outputs of the same shapes; device_scale and found_inf one element, found_inf of any dtype.
    Dtypes: computed in float32 (float64 for float64 tensors), rounded once to the dtype of each output.
    Raises: ValueError for lists of different lengths or shapes.
    Source: NVIDIA apex csrc/multi_tensor_scale_kernel.cu; Megatron-Core 0.16 core/utils.py.
    """
    check_lists(tensors, outputs)
    with torch.no_grad():
        for tensor, output in zip(tensors, outputs, strict=True):
            value = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            if found_inf is not None:
                is_bad = (~value.isfinite()).any().to(found_inf.device)
                found_inf.copy_(torch.where(is_bad, 1, found_inf).to(found_inf.dtype))
            value = value * scale
            if device_scale is not None:
                value = value * device_scale.to(value.device, value.dtype).reshape(())
            output.copy_(value)


def check_lists(tensors: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    """Refuse lists that do not fit; for kernels as well."""
    if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in outputs]:
        raise ValueError(
            f"multi_tensor_scale: tensors and outputs of the same shapes were expected; found {len(tensors)} and "
            f"{len(outputs)} tensors, or shapes that differ."
        )
