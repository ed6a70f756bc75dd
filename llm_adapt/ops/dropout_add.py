"""Bias, dropout and residual of a transformer block. x and residual [..., H], bias [H]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llm_adapt.ops.activation import check_bias, fewer_rows
from llm_adapt.ops.attention_parts.dropout import kept
from llm_adapt.ops.dispatch import fused_op

__all__ = ["dropout_add"]


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    yield {"x": draw(3, 5, 32), "residual": draw(3, 5, 32)}
    yield {"x": draw(7, 33), "residual": draw(7, 33).float(), "bias": draw(33)}
    yield {"x": draw(7, 33), "residual": draw(7, 33), "bias": draw(33), "p": 0.25, "seed": 3}
    yield {"x": draw(7, 32), "residual": draw(7, 32), "p": 1.0, "seed": 4}
    yield {"x": draw(0, 32), "residual": draw(0, 32), "p": 0.5, "seed": 5}


def _shrink(arguments: dict[str, Any]) -> dict[str, Any]:
    return fewer_rows(arguments, "x", residual=1, bias=1)


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    x, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return {"x": x, "residual": residual, "p": 0.1}


@fused_op(
    inputs=_inputs,
    random="p",
    dynamic=frozenset({"seed"}),
    shrink=_shrink,
    example=_example,
    sizes={"GPT-3 6.7B": (2048, 1, 4096)},
)
def dropout_add(
    x: torch.Tensor,
    residual: torch.Tensor,
    bias: torch.Tensor | None = None,
    p: float = 0.0,
    seed: int | None = None,
) -> torch.Tensor:
    """y = residual + dropout(x + bias): each element is dropped with probability p, the others divided by 1 - p.

    p = 0 outside training. seed: what is dropped is a function of the seed and of the place in x, alike on every
    device and in activation recompute; None = drawn from torch's generator of the device, as torch's own dropout.

    Shapes: x and residual [..., H], bias [H] or any that broadcasts to x -> y [..., H].
    Dtypes: computed in float32 (float64 for float64 x) and rounded once; y has the dtype of x, whatever residual has,
    which is rounded to it first.
    Raises: ValueError for p outside [0, 1] or a residual or bias of another shape.
    Source: Srivastava et al. 2014; fused_bias_dropout of Megatron-Core 0.16.1 (the dtype of residual).
    """
    check_dropout(x, residual, p)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if bias is not None:
        check_bias("dropout_add", bias, x.shape)
        y = y + bias.to(wide)
    if p > 0.0:
        if seed is None:
            y = torch.nn.functional.dropout(y, p)
        else:
            y = torch.where(_kept(seed, p, y), y / (1.0 - p) if p < 1.0 else 0.0, 0.0)
    return (residual.to(x.dtype).to(wide) + y).to(x.dtype)


def _kept(seed: int, p: float, x: torch.Tensor) -> torch.Tensor:
    columns = x.shape[-1]
    rows = x.numel() // columns if columns else 0
    return kept(seed, p, 1, 1, slice(0, rows), slice(0, columns), x.device).view(x.shape)


def check_dropout(x: torch.Tensor, residual: torch.Tensor, p: float) -> None:
    """Refuse what is no probability, and a residual of another shape; for kernels as well."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_add: p={p} was given; a probability lies in [0, 1].")
    if residual.shape != x.shape:
        raise ValueError(
            f"dropout_add: residual has shape {tuple(residual.shape)} and x {tuple(x.shape)}; they must be equal."
        )
