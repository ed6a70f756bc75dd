"""Operators of torch_npu that take the older way (GE) on the simulated A2: results, gradients, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.simulators.npu_checks import FLOATS, agrees, refuses, said_on

pytestmark = pytest.mark.simulator("npu")


def _npu() -> Any:
    import torch_npu

    return torch_npu


def _data(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(17))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_scaled_masked_softmax(heads: int, dtype: torch.dtype) -> None:
    """softmax of x scale where the mask is not True; gradients vanish where it is."""
    mask = torch.ones(1, heads, 32, 64, dtype=torch.bool).triu(33)

    def formula(x: torch.Tensor) -> torch.Tensor:
        weights = torch.where(mask, 0.0, (x * 0.3).exp())
        return weights / weights.sum(-1, keepdim=True)

    call = lambda x: _npu().npu_scaled_masked_softmax(x, mask.npu(), 0.3, False)  # noqa: E731
    agrees(call, formula, [_data(2, 3, 32, 64)], dtype, backward=dtype == torch.float32, node="NpuScaledMaskedSoftmax")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_silu(dtype: torch.dtype) -> None:
    """npu_silu is x sigmoid(x)."""
    agrees(_npu().npu_silu, lambda x: x / (1 + torch.exp(-x)), [_data(6, 33)], dtype, node="NpuSiluBackward")


def test_softmax_cross_entropy_with_logits() -> None:
    """One loss for each row, from labels that are a distribution."""
    labels = _data(6, 9).softmax(-1)

    def formula(x: torch.Tensor) -> torch.Tensor:
        return -(labels.double() * (x - x.exp().sum(-1, keepdim=True).log())).sum(-1)

    call = lambda x: _npu().npu_softmax_cross_entropy_with_logits(x, labels.npu())  # noqa: E731
    agrees(call, formula, [_data(6, 9) / 2], torch.float32)


@pytest.mark.parametrize("first", [True, False])
def test_confusion_transpose(first: bool) -> None:
    """A transpose, then another shape; or the other way round."""
    order, sizes = ((0, 2, 1, 3), (2, 4, 18)) if first else ((0, 2, 1), (2, 12, 6))

    def formula(x: torch.Tensor) -> torch.Tensor:
        return x.permute(order).reshape(sizes) if first else x.reshape(sizes).permute(order)

    call = lambda x: _npu().npu_confusion_transpose(x, order, sizes, first)  # noqa: E731
    agrees(call, formula, [_data(2, 3, 4, 6)], torch.float32)


def test_refusals_name_the_operator() -> None:
    """A limit, and an operator that is not modelled; each in a process of its own, for the queue stays broken."""
    limit = "outcome(lambda: torch_npu.npu_silu(torch.ones(4).npu().bfloat16()))"
    assert "x must be float32 or float16" in said_on("Ascend910B3", limit)
    unknown = "outcome(lambda: torch_npu.npu_pad(torch.ones(2, 4).npu(), [1, 1, 1, 1]))"
    assert "does not model the GE operator Pad" in said_on("Ascend910B3", unknown)


def test_rotary_on_an_older_chip() -> None:
    """310P: halves of 128 features through GE; interleaved pairs are refused by torch_npu."""
    code = """
torch.npu.set_compile_mode(jit_compile=False)
x, cos, sin = torch.randn(2, 3, 4, 128), torch.rand(1, 1, 4, 128), torch.rand(1, 1, 4, 128)
first, second = x.chunk(2, -1)
expected = x * cos + torch.cat([-second, first], -1) * sin
found = torch_npu.npu_rotary_mul(x.npu(), cos.npu(), sin.npu())
print((found.cpu() - expected).abs().max().item() < 1e-5)
outcome(lambda: torch_npu.npu_rotary_mul(x.npu(), cos.npu(), sin.npu(), "interleave"))
"""
    text = said_on("Ascend310P3", code)
    assert text.startswith("True"), text
    assert "only support rotary_mode with half" in text


def test_nothing_is_left_of_a_refusal_in_this_process() -> None:
    """Limits of the aclnn way are refused before the launch: what follows is right."""
    with refuses("must be contiguous"):
        _npu().npu_swiglu(_data(4, 8).npu().t())
    agrees(_npu().npu_silu, lambda x: x / (1 + torch.exp(-x)), [_data(6, 33)], torch.float32)
