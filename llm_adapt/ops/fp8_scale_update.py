"""Delayed scaling of fp8. L = steps that are remembered, n = tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

from llm_adapt.ops.dispatch import fused_op
from llm_adapt.ops.quantize_fp8 import FORMATS

__all__ = ["fp8_scale_update"]

_LARGEST = torch.finfo(torch.float32).max


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def history(steps: int) -> torch.Tensor:
        return torch.rand(steps, 5, generator=generator) * torch.tensor([1.0, 0.0, 1e4, 1e-3, 1.0])

    yield {"amax_history": history(4), "scale": torch.ones(5)}
    yield {"amax_history": history(1), "scale": torch.full((5,), 7.0), "format": "e5m2", "margin": 2}
    yield {"amax_history": history(6), "scale": torch.full((5,), 7.0), "algorithm": "most_recent"}


@fused_op(inputs=_inputs, differentiable=(), mutates=("amax_history", "scale"), oracle=None)
def fp8_scale_update(
    amax_history: torch.Tensor,
    scale: torch.Tensor,
    format: Literal["e4m3", "e5m2"] = "e4m3",
    algorithm: Literal["max", "most_recent"] = "max",
    margin: int = 0,
) -> None:
    """scale = largest number of the format / amax / 2^margin; the history moves by one step. Both in place.

    amax: the largest of the history, or its row 0, where the step that ends wrote. The scale of an amax of 0, inf or
    nan stays as it was; one that would not be finite is the largest float32. The history is rotated by one row upwards
    and row 0 set to 0 for the next step: row 1 is the oldest.

    Shapes: amax_history [L, n], scale [n].
    Dtypes: float32.
    Raises: ValueError for shapes and options that do not fit; TypeError for other dtypes.
    Source: TransformerEngine 2 pytorch/quantization.py and common/recipe/delayed_scaling.cu (DelayedScaling).
    """
    if amax_history.dtype != torch.float32 or scale.dtype != torch.float32:
        raise TypeError(f"fp8_scale_update: float32 was expected; found {amax_history.dtype} and {scale.dtype}.")
    if amax_history.ndim != 2 or not amax_history.shape[0] or scale.shape != amax_history.shape[1:]:
        raise ValueError(
            f"fp8_scale_update: amax_history [L, n] and scale [n] were expected; found {tuple(amax_history.shape)} and "
            f"{tuple(scale.shape)}."
        )
    if format not in FORMATS or algorithm not in ("max", "most_recent"):
        raise ValueError(
            f"fp8_scale_update: format={format!r}, algorithm={algorithm!r} was asked; give 'e4m3' or 'e5m2', and 'max' "
            "or 'most_recent'."
        )
    with torch.no_grad():
        amax = amax_history.amax(0) if algorithm == "max" else amax_history[0]
        found = (torch.finfo(FORMATS[format]).max / amax / 2.0**margin).clamp(max=_LARGEST)
        scale.copy_(torch.where((amax > 0) & amax.isfinite(), found, scale))
        history = amax_history.roll(-1, 0)
        history[0] = 0
        amax_history.copy_(history)
