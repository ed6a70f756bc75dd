"""The base of our kernels' autograd functions: apply without binding arguments, and all that torch.func needs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from llm_adapt.ops.autograd import Function


class Cubed(Function):
    """x^3 in the style that torch.func takes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, times: float) -> torch.Tensor:
        return x**3 * times

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.times = inputs[1]

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * ctx.times * upstream, None


def test_gradients_come_without_looking_up_a_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """forward and setup_context run as under torch's apply, which would ask inspect at every call."""
    monkeypatch.setattr(inspect, "signature", lambda *a, **k: pytest.fail("a signature was looked up"))
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = Cubed.apply(x, 2.0)
    assert y.tolist() == [2.0, 16.0]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.tolist() == [6.0, 24.0]


def test_function_transforms_go_through_torchs_own_apply() -> None:
    """torch.func.grad and vmap see the function; a tensor that outlived its transform is taken for what it holds."""
    x = torch.tensor([1.0, 2.0])
    assert torch.func.grad(lambda x: Cubed.apply(x, 1.0).sum())(x).tolist() == [3.0, 12.0]
    assert torch.func.vmap(lambda x: Cubed.apply(x, 1.0))(x).tolist() == [1.0, 8.0]
    kept: list[torch.Tensor] = []
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(x)  # type: ignore[func-returns-value]
    assert Cubed.apply(kept[0], 1.0).tolist() == [1.0, 8.0]


def test_compiled_code_traces_it_as_one_graph() -> None:
    """While torch.compile traces, torch's apply is what it knows."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    compiled = torch.compile(lambda x: Cubed.apply(x, 2.0), fullgraph=True, backend="eager")
    y = compiled(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (y.tolist(), gradient.tolist()) == ([2.0, 16.0], [6.0, 24.0])
