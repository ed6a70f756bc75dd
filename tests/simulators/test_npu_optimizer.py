"""Optimisers on the simulated NPU: torch's own Adam and AdamW, and torch_npu's fused ones, with their traps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.simulators.npu_checks import FLOATS, close, refuses, said_on

pytestmark = pytest.mark.simulator("npu")

STEPS = 4
SETTINGS = [
    {},
    {"weight_decay": 0.3, "lr": 0.1},
    {"amsgrad": True, "weight_decay": 0.1},
    {"maximize": True, "betas": (0.7, 0.9)},
]


def _gradient(step: int) -> torch.Tensor:
    # Shrinking gradients, so that amsgrad's largest second moment is not the newest.
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(step)) * 2.0**-step


def _trained(kind: Any, dtype: torch.dtype, device: str, in_place: bool = True, **settings: Any) -> torch.Tensor:
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(100))
    parameter = start.to(dtype).to(device).requires_grad_()
    optimizer = kind([parameter], **settings)
    for step in range(STEPS):
        if parameter.grad is None or not in_place:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.copy_(_gradient(step))
        optimizer.step()
    return parameter.detach().cpu()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_fused_adamw(settings: dict[str, Any]) -> None:
    """AdamW(fused=True) takes four steps as in float64: aclnnApplyAdamWV2 gets the number of steps before this one."""
    found = _trained(torch.optim.AdamW, torch.float32, "npu", fused=True, **settings)
    close(found, _trained(torch.optim.AdamW, torch.float64, "cpu", **settings))


def _adamw(dtype: torch.dtype, **given: Any) -> list[torch.Tensor]:
    """Parameter, gradient, m and v after one step of torch._fused_adamw_ from a state that has seen two."""
    tensors = [torch.full((3,), value).to(dtype).npu() for value in (1.0, 8.0, 0.5, 0.25)]
    step = given.pop("step", torch.tensor(3.0).npu())
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False, **given}
    torch._fused_adamw_(*[[one] for one in tensors], [], [step], maximize=False, **settings)
    return tensors


@pytest.mark.parametrize("dtype", FLOATS)
def test_fused_adamw_of_each_dtype(dtype: torch.dtype) -> None:
    """Parameter and moments after one step, rounded once."""
    parameter, _, m, v = _adamw(dtype)
    expected_m, expected_v = 0.9 * 0.5 + 0.1 * 8, 0.99 * 0.25 + 0.01 * 64
    direction = expected_m / (1 - 0.9**3) / ((expected_v / (1 - 0.99**3)) ** 0.5 + 1e-8)
    for found, value in ((parameter, 1 - 0.1 * 0.1 - 0.1 * direction), (m, expected_m), (v, expected_v)):
        close(found, torch.full((3,), value, dtype=torch.float64))


def test_fused_adamw_ignores_grad_scale_and_found_inf() -> None:
    """op-plugin drops both without a word: scaled gradients are used as they are, and an overflow is stepped on."""
    plain = _adamw(torch.float32)[0].cpu()
    scale, inf = torch.tensor([8.0]).npu(), torch.tensor([1.0]).npu()
    assert torch.equal(_adamw(torch.float32, grad_scale=scale)[0].cpu(), plain)
    assert torch.equal(_adamw(torch.float32, grad_scale=scale, found_inf=inf)[0].cpu(), plain)


def test_fused_adamw_under_a_gradient_scaler_is_wrong() -> None:
    """So torch.amp.GradScaler with AdamW(fused=True) steps although the gradients are infinite."""
    parameter = torch.ones(3).npu().requires_grad_()
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("npu", init_scale=4.0)
    scaler.scale((parameter * torch.tensor(float("inf")).npu()).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not parameter.isfinite().any()


def test_fused_adamw_refuses_mixed_dtypes() -> None:
    """Parameter, gradient and moments have one dtype and one shape."""
    ones, step = torch.ones(3).npu(), torch.tensor(1.0).npu()
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
    for changed, text in ((ones.half(), "must have the dtype of the parameter"), (torch.ones(4).npu(), "the shape of")):
        with refuses(text):
            torch._fused_adamw_(
                [ones], [changed], [ones], [ones], [], [step], amsgrad=False, maximize=False, **settings
            )
    with refuses("amsgrad needs the largest second moment"):
        _adamw(torch.float32, amsgrad=True)
    with refuses("step must have one element"):
        _adamw(torch.float32, step=torch.ones(2).npu())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_fused_adam(settings: dict[str, Any]) -> None:
    """Adam(fused=True) takes four steps as in float64; op-plugin has the CPU do them on chips before Ascend950."""
    found = _trained(torch.optim.Adam, torch.float32, "npu", fused=True, **settings)
    close(found, _trained(torch.optim.Adam, torch.float64, "cpu", **settings))


def test_fused_adam_goes_to_the_cpu(capfd: pytest.CaptureFixture[str]) -> None:
    """And torch_npu says so, each time."""
    _trained(torch.optim.Adam, torch.float32, "npu", fused=True)
    assert "'aten::_fused_adam_' is not currently supported on the NPU backend" in capfd.readouterr().err


_ON_950 = """
def trained(kind, dtype, device, **settings):
    parameter = torch.randn(3, 5, generator=torch.Generator().manual_seed(100)).to(dtype).to(device).requires_grad_()
    optimizer = kind([parameter], **settings)
    for step in range(4):
        gradient = torch.randn(3, 5, generator=torch.Generator().manual_seed(step)) * 2.0**-step
        parameter.grad = gradient.to(dtype).to(device)
        optimizer.step()
    return parameter.detach().cpu().double()

for settings in ({}, dict(weight_decay=0.3, lr=0.1), dict(amsgrad=True, weight_decay=0.1), dict(maximize=True)):
    found = trained(torch.optim.Adam, torch.float32, "npu", fused=True, **settings)
    print("adam", float((found - trained(torch.optim.Adam, torch.float64, "cpu", **settings)).abs().max()) < 1e-6)

def stepped(scale, inf):
    p, g, m, v = (torch.full((3,), value).npu() for value in (1.0, 8.0, 0.0, 0.0))
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8, "amsgrad": False}
    torch._fused_adam_([p], [g], [m], [v], [], [torch.tensor(1.0).npu()], maximize=False, grad_scale=scale,
                       found_inf=inf, **numbers)
    return [round(one[0].item(), 4) for one in (p, g, m)]

print("plain", stepped(None, None))
print("scaled", stepped(torch.tensor([8.0]).npu(), torch.tensor([0.0]).npu()))
print("inf", stepped(torch.tensor([8.0]).npu(), torch.tensor([1.0]).npu()))

var, m, v, g = (torch.full((3,), value).npu() for value in (1.0, 0.5, 0.25, 8.0))
torch_npu.npu_apply_adam_w(0.9**2, 0.99**2, 0.1, 0.1, 0.9, 0.99, 1e-8, g, None, False, False, out=(var, m, v))
print("w", *(round(one[0].item(), 4) for one in (var, m, v)))
var, m, v, g = (torch.full((3,), value).npu() for value in (1.0, 0.5, 0.25, 8.0))
torch_npu.npu_apply_adam(0.9**3, 0.99**3, 0.1, 0.9, 0.99, 1e-8, g, False, False, out=(var, m, v))
print("a", *(round(one[0].item(), 4) for one in (var, m, v)))
"""


def test_on_ascend950() -> None:
    """There _fused_adam_ is a kernel and honours grad_scale and found_inf; powers of beta differ by one between two."""
    said = [line.split(maxsplit=1) for line in said_on("Ascend950", _ON_950).splitlines()]
    said = [line for line in said if line[0] in ("adam", "plain", "scaled", "inf", "w", "a")]
    assert said[:4] == [["adam", "True"]] * 4
    assert said[4:7] == [["plain", "[0.9, 8.0, 0.8]"], ["scaled", "[0.9, 1.0, 0.1]"], ["inf", "[1.0, 8.0, 0.0]"]]
    m, v = 0.9 * 0.5 + 0.1 * 8, 0.99 * 0.25 + 0.01 * 64
    step = 0.1 * m / (1 - 0.9**3) / (v / (1 - 0.99**3)) ** 0.5
    assert said[7:] == [["w", f"{1 - 0.01 - step:.4f} {m:.4g} {v:.4g}"], ["a", f"{1 - step:.4f} {m:.4g} {v:.4g}"]]


_ON_A2 = """
ones = [torch.ones(3).npu() for _ in range(4)]
outcome(lambda: torch_npu.npu_apply_adam_w(1.0, 1.0, 0.1, 0.0, 0.9, 0.99, 1e-8, ones[0], None, False, False,
                                           out=ones[1:]))
"""


def test_npu_apply_adam_w_needs_an_operator_of_the_graph_engine() -> None:
    """Before Ascend950 op-plugin sends npu_apply_adam_w to the graph engine, which is not modelled: it raises."""
    assert "ApplyAdamW" in said_on("Ascend910B3", _ON_A2)


@pytest.mark.parametrize("kind", ["NpuFusedAdam", "NpuFusedAdamW", "NpuFusedSGD"])
def test_npu_fused_optimizers(kind: str) -> None:
    """torch_npu.optim's fused optimisers step as torch's do while gradients stay the tensors that they first were."""
    import torch_npu

    settings = {"lr": 0.1, "weight_decay": 0.1}
    theirs, ours = getattr(torch.optim, kind.removeprefix("NpuFused")), getattr(torch_npu.optim, kind)
    expected = _trained(theirs, torch.float64, "cpu", **settings)
    close(_trained(ours, torch.float32, "npu", **settings), expected)
    with pytest.raises(AssertionError, match="off by"):
        close(_trained(ours, torch.float32, "npu", in_place=False, **settings), expected)


def test_npu_fused_optimizers_refuse_bfloat16() -> None:
    """They take parameters of float32 and float16."""
    import torch_npu

    with pytest.raises(TypeError):
        _trained(torch_npu.optim.NpuFusedAdamW, torch.bfloat16, "npu", lr=0.1)
