"""What the tests of the norms share: upstream norms, hidden states of every dtype and stride, and how to compare."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

__all__ = ["FLOATS", "agree", "hidden_states", "results", "upstream_norm"]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def upstream_norm(family: str, name: str, weight: torch.Tensor, eps: float) -> torch.nn.Module:
    """A norm of a model family in transformers, with this weight."""
    found = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)(
        weight.numel(), eps=eps
    )
    found.weight = torch.nn.Parameter(weight.clone())
    return found


def results(
    function: Callable[..., Any], *tensors: torch.Tensor | None, **options: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs and the gradients of all tensors, for upstream gradients that are the same at each call."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    found = function(*leaves, **options)
    outputs = list(found) if isinstance(found, tuple) else [found]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [y.detach() for y in outputs], list(torch.autograd.grad(outputs, wanted, upstream))


def agree(found: list[torch.Tensor], expected: list[torch.Tensor], rtol: float = 0.0) -> None:
    """Equal in dtype and shape, and bit by bit unless a tolerance is given."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol, equal_nan=True)


@st.composite
def hidden_states(draw: st.DrawFn, width: int = 0) -> torch.Tensor:
    """x of one to four axes, empty, of one or odd sizes, of any dtype and stride."""
    sizes = draw(st.lists(st.integers(0, 5), max_size=3)) + [width or draw(st.integers(1, 33))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from(FLOATS))
    stride = draw(st.sampled_from(["contiguous", "every second", "reversed axes", "expanded"]))
    if stride == "every second":
        return torch.randn(*sizes[:-1], 2 * sizes[-1], generator=generator).to(dtype)[..., ::2]
    if stride == "reversed axes":
        return torch.randn(sizes[::-1], generator=generator).to(dtype).permute(*range(len(sizes))[::-1])
    if stride == "expanded":
        return torch.randn(sizes[-1:], generator=generator).to(dtype).expand(sizes)
    return torch.randn(sizes, generator=generator).to(dtype)
