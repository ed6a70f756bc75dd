"""Dynamic symmetric int8 of each row. H = columns of a row: the hidden size of a token, or the inputs of a weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llm_adapt.ops.dispatch import fused_op

__all__ = ["quantize_int8"]

LARGEST = 127  # -128 is not used: the scale is symmetric


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    yield {"x": draw(2, 8, 64)}
    yield {"x": draw(5, 33), "smooth_scale": draw(33).abs()}
    yield {"x": torch.cat([draw(2, 8), torch.zeros(1, 8, dtype=dtype)])}
    yield {"x": draw(0, 16)}


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"x": torch.randn(shape, generator=generator).to(dtype)}


# oracle=None: the result is a rounding, which is another one where a last bit of the input differs.
@fused_op(inputs=_inputs, differentiable=(), oracle=None, example=_example, sizes={"4096 wide": (4096, 4096)})
def quantize_int8(x: torch.Tensor, smooth_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """scale = max |x| / 127 of each row, q = x / scale to the nearest integer, of halves the even one.

    A row of zeros has scale 0 and q 0.
    smooth_scale: x is multiplied by it first, as SmoothQuant does to even out the columns.

    Shapes: x [..., H], smooth_scale [H] -> q [..., H] int8, scale [...].
    Dtypes: computed in float32, which is the dtype of scale; no gradient.
    Raises: ValueError for shapes that do not fit.
    Source: torch_npu 2.13 npu_dynamic_quant, pertoken; Dettmers et al. 2022 (LLM.int8()), section 2.
    """
    with torch.no_grad():
        return rounded_rows(x, smooth_scale)


def rounded_rows(x: torch.Tensor, smooth_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_int8`, for references of other ops."""
    check_scale(x, smooth_scale)
    rows = x.float() if smooth_scale is None else x.float() * smooth_scale.float()
    scale = rows.abs().amax(-1) / LARGEST
    divisor = torch.where(scale > 0, scale, 1).unsqueeze(-1)
    return (rows / divisor).round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scale


def check_scale(x: torch.Tensor, smooth_scale: torch.Tensor | None) -> None:
    """Refuse rows without a column, and a scale of other columns; for kernels as well."""
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"quantize_int8: rows of at least one column were expected; found x {tuple(x.shape)}.")
    if smooth_scale is not None and smooth_scale.shape != x.shape[-1:]:
        raise ValueError(
            f"quantize_int8: smooth_scale must be of shape {tuple(x.shape[-1:])}; found {tuple(smooth_scale.shape)}."
        )
