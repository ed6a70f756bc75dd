"""Training on a simulated DCU: mixed precision, optimizers, checkpoints of activations; run by test_dcu_device.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.simulators.dcu_process import check


def model() -> torch.nn.Module:
    """A small model, the same at every call."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 1))


def trained(device: str, kind: type[torch.optim.Optimizer], **options: Any) -> list[torch.Tensor]:
    """Parameters after 10 steps with clipped gradients."""
    net = model().to(device)
    optimizer = kind(net.parameters(), lr=0.01, **options)  # type: ignore[call-arg]
    data = torch.randn(10, 4, 8, generator=torch.Generator().manual_seed(1))
    for batch in data:
        optimizer.zero_grad()
        net(batch.to(device)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
    return [parameter.detach().cpu() for parameter in net.parameters()]


@check
def optimizers_equal_the_cpus() -> None:
    """10 steps of AdamW and SGD, plain, foreach and fused, end at the CPU's parameters."""
    for kind, common in ((torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9})):
        expected = trained("cpu", kind, foreach=False, **common)
        for way in ({}, {"foreach": True}, {"foreach": False}, {"fused": True}):
            for mine, theirs in zip(trained("cuda", kind, **common, **way), expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@check
def dropout_is_recomputed() -> None:
    """Activation checkpoints draw the same dropout again, so that gradients are those without a checkpoint."""
    layer = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 16)).cuda()
    x = torch.randn(4, 16, device="cuda", requires_grad=True)
    gradients = []
    for way in (None, False, True):
        torch.cuda.manual_seed(3)
        y = layer(x) if way is None else checkpoint(layer, x, use_reentrant=way)
        gradients.append(torch.autograd.grad(y.square().sum(), x)[0] if not way else _through_backward(y, x))
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
    assert float((gradients[0] == 0).float().mean()) < 0.5


def _through_backward(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A reentrant checkpoint takes .backward() only."""
    x.grad = None
    y.square().sum().backward()
    assert x.grad is not None
    return x.grad


@check
def autocast() -> None:
    """Autocast makes products bfloat16 or float16 and keeps losses float32, as on CUDA."""
    x, layer = torch.randn(4, 8, device="cuda"), model().cuda()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype=dtype):
            y = layer[0](x)
            assert (y.dtype, F.mse_loss(y, y.detach()).dtype) == (dtype, torch.float32)
        layer(x).sum().backward()
    with torch.autocast("cuda", enabled=False):
        assert layer[0](x).dtype == torch.float32


@check
def gradient_scaling() -> None:
    """GradScaler steps on finite gradients, and skips a step and halves its scale on infinite ones."""
    net = model().cuda()
    optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(net(torch.ones(2, 8, device="cuda")).sum()).backward()
    before = copy.deepcopy(net.state_dict())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0
    assert not torch.equal(net[3].weight, before["3.weight"])
    before = copy.deepcopy(net.state_dict())
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert torch.equal(net[3].weight, before["3.weight"])


@check
def attention_of_torch() -> None:
    """SDPA with flash_attn installed gives the CPU's numbers, with masks, causal and grouped."""
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(2, heads, 6, 8, generator=generator).bfloat16() for heads in (4, 2))
    mask = torch.rand(6, 6, generator=generator) > 0.3
    mask.fill_diagonal_(True)
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}):
        there = {name: value.cuda() if torch.is_tensor(value) else value for name, value in options.items()}
        mine = F.scaled_dot_product_attention(q.cuda(), k.cuda(), k.cuda(), enable_gqa=True, **there)
        theirs = F.scaled_dot_product_attention(q, k, k, enable_gqa=True, **options)
        torch.testing.assert_close(mine.cpu(), theirs, rtol=2e-2, atol=2e-2)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION), pytest.raises(RuntimeError, match="No available kernel"):
        F.scaled_dot_product_attention(q.cuda(), q.cuda(), q.cuda())


@check
def compiled_code() -> None:
    """torch.compile traces code for the device and gives eager numbers, forward and backward; and says how it runs."""

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x * 2).square().sum()

    x = torch.randn(4, 8, device="cuda", requires_grad=True)
    expected = torch.autograd.grad(loss(x), x)[0]
    with pytest.warns(RuntimeWarning, match="Triton is not simulated"):
        found = torch.compile(loss)(x)
    torch.testing.assert_close(torch.autograd.grad(found, x)[0], expected)
    again = torch.compile(loss, options={"triton.cudagraphs": True})
    torch.testing.assert_close(again(x.detach()), loss(x.detach()))
