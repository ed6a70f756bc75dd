"""Activations and gated units of torch_npu over the simulated NPU: results, gradients, documented limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.simulators.npu_checks import FLOATS, agrees, close, refuses, said_on

pytestmark = pytest.mark.simulator("npu")


def _npu() -> Any:
    import torch_npu

    return torch_npu


def _data(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11))


def _gelu(x: torch.Tensor, form: str) -> torch.Tensor:
    if form == "none":
        return x / 2 * (1 + torch.erf(x / math.sqrt(2)))
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _logistic(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu(form: str, dtype: torch.dtype) -> None:
    """npu_gelu computes the form that it is asked for, erf by default."""
    call = lambda x: _npu().npu_gelu(x, approximate=form)  # noqa: E731
    agrees(call, lambda x: _gelu(x, form), [_data(6, 33)], dtype, node="NpuGeluBackward")
    close(_npu().npu_gelu(_data(8).npu()), _gelu(_data(8).double(), "none"))


def test_gelu_refuses() -> None:
    """torch_npu knows none and tanh alone; integers are no input."""
    with refuses("either none or tanh"):
        _npu().npu_gelu(_data(4).npu(), approximate="sigmoid")
    with refuses("must be float32, float16 or bfloat16"):
        _npu().npu_gelu(torch.ones(4, dtype=torch.int32).npu())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["npu_fast_gelu", "fast_gelu"])
def test_fast_gelu(name: str, dtype: torch.dtype) -> None:
    """Both names are x sigmoid(1.702 x)."""
    agrees(getattr(_npu(), name), lambda x: x * _logistic(1.702 * x), [_data(6, 33)], dtype, node="GeluBackward")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dim", [-1, 1, 0])
def test_swiglu(dim: int, dtype: torch.dtype) -> None:
    """npu_swiglu is silu of the first half times the second, along any axis."""

    def formula(x: torch.Tensor) -> torch.Tensor:
        gate, linear = x.tensor_split(2, dim)
        return gate * _logistic(gate) * linear

    agrees(lambda x: _npu().npu_swiglu(x, dim=dim), formula, [_data(4, 6, 32)], dtype, node="NpuSwigluBackward")


def test_swiglu_refuses() -> None:
    """An odd axis, and a tensor that is not contiguous."""
    with refuses("must be even"):
        _npu().npu_swiglu(_data(4, 7).npu())
    with refuses("must be contiguous"):
        _npu().npu_swiglu(_data(4, 8).npu().t())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("approximate", [0, 1])
def test_geglu(approximate: int, left: bool, dtype: torch.dtype) -> None:
    """npu_geglu activates the second half, or the first with activate_left; it returns the activated half too."""

    def formula(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = x.tensor_split(2, -1)
        gate, linear = (first, second) if left else (second, first)
        gelu = _gelu(gate, ("none", "tanh")[approximate])
        return gelu * linear, gelu

    call = lambda x: _npu().npu_geglu(x, -1, approximate, left)  # noqa: E731
    agrees(call, formula, [_data(6, 32)], dtype, node="NpuGegluBackward")


def test_geglu_refuses() -> None:
    """An odd axis, and an approximation that there is not."""
    with refuses("must be even"):
        _npu().npu_geglu(_data(4, 7).npu())
    with refuses("approximate must be 0"):
        _npu().npu_geglu(_data(4, 8).npu(), -1, 2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu_mul(form: str, dtype: torch.dtype) -> None:
    """npu_gelu_mul is gelu of the first half times the second, without gradients."""
    x = _data(6, 32)

    def formula(x: torch.Tensor) -> torch.Tensor:
        return _gelu(x[:, :16], form) * x[:, 16:]

    agrees(lambda x: _npu().npu_gelu_mul(x, approximate=form), formula, [x], dtype, backward=False)
    leaf = x.npu().requires_grad_()
    _npu().npu_gelu_mul(leaf).sum().backward()
    assert leaf.grad is None


@pytest.mark.parametrize(
    ("shape", "text"),
    [((4, 1026), "at most 1024"), ((4, 31), "even"), ((200_001, 2), "at most 200000"), ((8,), "2 to 8 axes")],
)
def test_gelu_mul_refuses(shape: tuple[int, ...], text: str) -> None:
    """Widths, row counts and ranks beyond the documented ones."""
    with refuses(text):
        _npu().npu_gelu_mul(torch.ones(shape).npu())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
def test_clipped_swiglu(interleaved: bool, dtype: torch.dtype) -> None:
    """npu_clipped_swiglu clips both parts, which lie in turns unless told otherwise, and adds one to the linear one."""

    def formula(x: torch.Tensor) -> torch.Tensor:
        gate, linear = (x[:, ::2], x[:, 1::2]) if interleaved else (x[:, :16], x[:, 16:])
        gate, linear = gate.minimum(torch.tensor(1.5)), linear.clamp(-1.5, 1.5)
        return gate * _logistic(1.702 * gate) * (linear + 1)

    call = lambda x: _npu().npu_clipped_swiglu(x, limit=1.5, interleaved=interleaved)  # noqa: E731
    agrees(call, formula, [2 * _data(6, 32)], dtype, backward=False)


def test_clipped_swiglu_of_groups() -> None:
    """Rows beyond the sum of group_index are not computed."""
    x = _data(6, 32).npu()
    groups = torch.tensor([1, 0, 3]).npu()
    found, whole = _npu().npu_clipped_swiglu(x, group_index=groups), _npu().npu_clipped_swiglu(x)
    assert torch.equal(found[:4].cpu(), whole[:4].cpu())


def test_clipped_swiglu_refuses() -> None:
    """An odd axis, a limit that is not positive, a tensor that is not contiguous."""
    with refuses("must be even"):
        _npu().npu_clipped_swiglu(_data(4, 7).npu())
    with refuses("limit must be positive"):
        _npu().npu_clipped_swiglu(_data(4, 8).npu(), limit=0.0)
    with refuses("must be contiguous"):
        _npu().npu_clipped_swiglu(_data(4, 8).npu().t())


def test_activations_on_a_chip_without_bfloat16() -> None:
    """310P: no bfloat16, and gradients of geglu in the tanh form alone."""
    code = """
x = torch.ones(4, 8).npu().requires_grad_()
outcome(lambda: torch_npu.npu_gelu(x))
outcome(lambda: torch_npu.npu_gelu(torch.ones(4, 8).bfloat16().npu()))
outcome(lambda: torch_npu.npu_geglu(x, -1, 1)[0].sum().backward())
outcome(lambda: torch_npu.npu_geglu(x, -1, 0)[0].sum().backward())
"""
    text = said_on("Ascend310P3", code)
    assert text.count("done") == 2
    assert "bfloat16, which Ascend310P3" in text
    assert "tanh form alone" in text
