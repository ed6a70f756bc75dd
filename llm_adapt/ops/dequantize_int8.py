"""int8 rows back to floating point. H = columns of a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llm_adapt.ops.dispatch import fused_op

__all__ = ["dequantize_int8"]


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randint(-127, 128, sizes, generator=generator).to(torch.int8)

    yield {"q": draw(2, 8, 64), "scale": torch.rand(2, 8, generator=generator)}
    yield {"q": draw(5, 33), "scale": torch.rand(5, generator=generator), "dtype": dtype}
    yield {"q": draw(5, 16), "scale": torch.rand(5, generator=generator), "dtype": torch.float16}
    yield {"q": draw(0, 16), "scale": torch.zeros(0)}


@fused_op(inputs=_inputs, differentiable=(), oracle=None)
def dequantize_int8(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """x = q * scale of its row.

    Shapes: q [..., H] int8, scale [...] -> x [..., H].
    Dtypes: the product in float32, rounded once to dtype; no gradient.
    Raises: ValueError for shapes that do not fit; TypeError when q is not int8.
    Source: the inverse of `quantize_int8`.
    """
    if q.dtype != torch.int8:
        raise TypeError(f"dequantize_int8: q of int8 was expected; found {q.dtype}.")
    if scale.shape != q.shape[:-1]:
        raise ValueError(
            f"dequantize_int8: scale must be of shape {tuple(q.shape[:-1])}, one for each row; found "
            f"{tuple(scale.shape)}."
        )
    with torch.no_grad():
        return q.float().mul_(scale.float().unsqueeze(-1)).to(dtype)
