"""What the tests of rope share: draws, tables, and an output with its gradient."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["LAYOUTS", "PAIRS", "drawn", "full_width", "tables_of", "with_gradient"]

PAIRS = ["half", "interleaved", "interleaved_to_half"]
LAYOUTS = {"bshd": (0, 1, 2, 3), "sbhd": (1, 0, 2, 3), "bhsd": (0, 2, 1, 3)}  # bshd -> layout


def drawn(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same for the same seed."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tables_of(rows: int, pairs: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Half-width tables of a real rotary embedding."""
    angles = torch.outer(torch.arange(rows).double(), 10000.0 ** -(torch.arange(pairs).double() / max(pairs, 1)))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def full_width(table: torch.Tensor, pairs: str) -> torch.Tensor:
    """A half-width table with one column for each feature."""
    return table.repeat_interleave(2, -1) if pairs == "interleaved" else torch.cat((table, table), -1)


def with_gradient(function: Any, x: torch.Tensor, *rest: Any, **options: Any) -> list[torch.Tensor]:
    """y, and the gradient of x for an upstream gradient that is the same at each call."""
    leaf = x.detach().clone().requires_grad_()
    y = function(leaf, *rest, **options)
    return [y.detach(), *torch.autograd.grad(y, leaf, drawn(*y.shape, dtype=y.dtype, seed=9))]
