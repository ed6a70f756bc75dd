"""Operators that torch_npu's own C++ calls past the dispatcher: results and gradients against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.simulators.npu_checks import FLOATS, agrees, close, refuses

pytestmark = pytest.mark.simulator("npu")

REDUCTIONS = ("none", "mean", "sum")
_COUNT = {"none": lambda loss: loss, "mean": lambda loss: loss.mean(), "sum": lambda loss: loss.sum()}


def _npu() -> Any:
    import torch_npu

    return torch_npu


def _data(*shape: int, seed: int = 23) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_l1_loss(reduction: str, dtype: torch.dtype) -> None:
    """|x - t|, with gradients of both."""
    call = lambda x, t: F.l1_loss(x, t, reduction=reduction)  # noqa: E731
    formula = lambda x, t: _COUNT[reduction]((x - t).abs())  # noqa: E731
    agrees(call, formula, [_data(5, 7), _data(5, 7, seed=24)], dtype, node="L1Loss")


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_kl_div(reduction: str, is_log: bool) -> None:
    """t (log t - x), with gradients of the input and of the target."""
    target = _data(5, 7, seed=24).softmax(-1)

    def formula(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        loss = t.exp() * (t - x) if is_log else t * (t.log() - x)
        return _COUNT[reduction](loss)

    call = lambda x, t: F.kl_div(x, t, reduction=reduction, log_target=is_log)  # noqa: E731
    agrees(call, formula, [_data(5, 7).log_softmax(-1), target.log() if is_log else target], torch.float32)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_binary_cross_entropy_with_logits(reduction: str, weighted: bool) -> None:
    """The loss of a sigmoid, with weights of elements and of the positive class; the target gets no gradient."""
    target, weight, positive = torch.rand(5, 7), torch.rand(5, 7) + 0.5, torch.rand(7) + 0.5

    def formula(x: torch.Tensor) -> torch.Tensor:
        p = 1 / (1 + (-x).exp())
        pos, scale = (positive.double(), weight.double()) if weighted else (1.0, 1.0)
        loss = -scale * (pos * target.double() * p.log() + (1 - target.double()) * (1 - p).log())
        return _COUNT[reduction](loss)

    def call(x: torch.Tensor) -> torch.Tensor:
        weights = {"weight": weight.npu(), "pos_weight": positive.npu()} if weighted else {}
        return F.binary_cross_entropy_with_logits(x, target.npu(), reduction=reduction, **weights)

    agrees(call, formula, [_data(5, 7)], torch.float32, node="BinaryCrossEntropyWithLogits")


@pytest.mark.parametrize(("name", "sign"), [("max", 1), ("min", -1)])
def test_larger_and_smaller_into_a_tensor(name: str, sign: int) -> None:
    """torch.max and torch.min of two tensors with out=."""
    one, other = _data(4, 5), _data(4, 5, seed=24)
    out = torch.empty(0, device="npu")
    getattr(torch, name)(one.npu(), other.npu(), out=out)
    close(out, sign * torch.where(sign * one > sign * other, sign * one, sign * other).double())


def test_nanmean_into_a_tensor() -> None:
    """The mean of what is a number."""
    x = _data(4, 6)
    x[0, ::2] = torch.nan
    out = torch.empty(0, device="npu")
    torch.nanmean(x.npu(), 1, out=out)
    expected = torch.stack([row[~row.isnan()].double().mean() for row in x])
    close(out, expected)


@pytest.mark.parametrize("order", [1.0, 1.5, 2.0, 4.0, float("inf")])
def test_renorm(order: float) -> None:
    """Rows scaled down to a norm, with their gradient: orders that CANN has, and those that GE has."""

    def formula(x: torch.Tensor) -> torch.Tensor:
        sizes = x.abs()
        norm = sizes.amax(1, True) if order == float("inf") else (sizes**order).sum(1, True) ** (1 / order)
        return torch.where(norm > 1.5, x * (1.5 / (norm + 1e-7)), x)

    agrees(lambda x: torch.renorm(x, order, 0, 1.5), formula, [_data(6, 5)], torch.float32)


def test_batched_product_through_ge() -> None:
    """npu_bmmV2 with and without a batch that is summed over; one GE operator, and its gradient through the same."""
    product = lambda a, b: torch.einsum("bij,bjk->bik", a, b)  # noqa: E731
    call = lambda a, b: _npu().npu_bmmV2(a, b, [])  # noqa: E731
    agrees(call, product, [_data(3, 4, 5), _data(3, 5, 6, seed=24)], torch.float32, node="NpuBmm")
    summed = lambda a, b: torch.einsum("bij,bjk->ik", a, b)  # noqa: E731
    call = lambda a, b: _npu().npu_bmmV2(a, b, [4, 6])  # noqa: E731
    agrees(call, summed, [_data(3, 4, 5), _data(3, 5, 6, seed=24)], torch.float32, backward=False)


def test_gelu_into_a_tensor_that_must_grow() -> None:
    """torch_npu hands it on as it is, and CANN's document wants the shape of x."""
    with refuses("NPU function error: call aclnnGelu"):
        torch.ops.aten.gelu.out(_data(3).npu(), out=torch.empty(0, device="npu"))


def _said(code: str, **variables: str) -> str:
    """What a process prints that enters the simulator without patch(): nothing of ours but the device."""
    start = "from llm_adapt import simulators\nsimulators.enter('npu')\nimport torch, torch_npu\nsimulators.install()\n"
    start += "print('begin')\n"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_NPU_")}
    done = subprocess.run(
        [sys.executable, "-c", start + code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment | variables,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.partition("begin\n")[2]


_MATMUL = """
def check(a, b):
    a, b = a.requires_grad_(), b.requires_grad_()
    x, y = a.detach().npu().requires_grad_(), b.detach().npu().requires_grad_()
    g = torch.randn((a @ b).shape)
    (a @ b).backward(g)
    found = x @ y
    found.backward(g.npu())
    pairs = ((found, a @ b), (x.grad, a.grad), (y.grad, b.grad))
    print(all(torch.allclose(one.cpu(), other, atol=1e-5) for one, other in pairs), found.grad_fn.name())
for one, other in (((4, 8), (8, 3)), ((2, 4, 8), (8, 3)), ((2, 4, 8), (2, 8, 3)), ((8,), (8, 3)), ((4, 8), (8,)),
                   ((4, 8), (5, 8, 3)), ((5, 1, 4, 8), (6, 8, 3)), ((8,), (8,))):
    check(torch.randn(one), torch.randn(other))
"""


def test_matmul_without_the_facade() -> None:
    """torch_npu's own node of matmul, whose backward calls aclnnMatmul itself, for each mix of ranks."""
    lines = _said(_MATMUL).splitlines()
    assert len(lines) == 8
    assert all(line.startswith("True") for line in lines), lines


@pytest.mark.parametrize(
    ("variables", "exact"),
    [({}, False), ({"TORCH_NPU_USE_COMPATIBLE_IMPL": "1"}, True)],
    ids=["default", "compatible"],
)
def test_gelu_ignores_its_form(variables: dict[str, str], exact: bool) -> None:
    """By default F.gelu is tanh whatever is asked; with the compatible implementation erf where erf is asked."""
    code = """
x = torch.linspace(-4, 4, 401)
for asked in ("none", "tanh"):
    here = x.npu().requires_grad_()
    found = torch.nn.functional.gelu(here, approximate=asked)
    found.sum().backward()
    for form in ("none", "tanh"):
        there = x.double().requires_grad_()
        expected = torch.nn.functional.gelu(there, approximate=form)
        expected.sum().backward()
        near = lambda one, other: bool((one.detach().cpu() - other.detach()).abs().max() < 2e-6)
        print(asked, form, near(found, expected), near(here.grad, there.grad))
"""
    assert _said(code, **variables).splitlines() == [
        f"none none {exact} {exact}",
        f"none tanh {not exact} {not exact}",
        "tanh none False False",
        "tanh tanh True True",
    ]
