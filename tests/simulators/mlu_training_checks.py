"""Training on a simulated MLU; run by test_mlu_device.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch_mlu.optimizers import FusedAdam

from tests.simulators.mlu_process import check


def model() -> torch.nn.Module:
    """A small network, the same every time."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 1))


def losses(net: torch.nn.Module, make: Callable[[Any], torch.optim.Optimizer], device: str) -> list[float]:
    """Ten steps of training."""
    net = net.to(device)
    optimizer = make(net.parameters())
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for _ in range(10):
        loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


@check
def optimizers_step_as_on_the_cpu() -> None:
    """SGD, Adam and AdamW, looped, foreach and fused, give the CPU's losses."""
    optim = torch.optim
    for make in (
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: optim.Adam(p, lr=0.01, foreach=False),
        lambda p: optim.AdamW(p, lr=0.01, foreach=True),
        lambda p: optim.AdamW(p, lr=0.01, fused=True),
    ):
        expected = losses(model(), make, "cpu")
        assert expected[-1] < expected[0]
        assert losses(model(), make, "mlu") == pytest.approx(expected, rel=1e-5)


@check
def fused_adam_is_adam() -> None:
    """torch_mlu's FusedAdam gives the losses of AdamW, or of Adam in its other mode."""
    for adam_w_mode, twin in ((True, torch.optim.AdamW), (False, torch.optim.Adam)):
        expected = losses(model(), lambda p: twin(p, lr=0.01, weight_decay=0.1), "cpu")  # noqa: B023
        found = losses(model(), lambda p: FusedAdam(p, lr=0.01, weight_decay=0.1, adam_w_mode=adam_w_mode), "mlu")  # noqa: B023
        assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(RuntimeError, match="AMSGrad"):
        FusedAdam(model().parameters(), amsgrad=True)


@check
def fused_operators_have_their_limits() -> None:
    """fused_adam wants float32 moments and a known mode; fused_l2_norm gives both norms; others are not defined."""
    one = [torch.ones(2, device="mlu")]
    halves = [torch.ones(2, device="mlu", dtype=torch.float16)]
    flag = torch.zeros(1, device="mlu", dtype=torch.int32)
    adam = torch.ops.torch_mlu.fused_adam
    with pytest.raises(RuntimeError, match="float32 moments"):
        adam(flag, one, one, halves, one, 0.1, 0.9, 0.99, 1e-8, 1, 1, 1, 0.0)
    with pytest.raises(ValueError, match="modes 0"):
        adam(flag, one, one, one, one, 0.1, 0.9, 0.99, 1e-8, 1, 2, 1, 0.0)
    total, each = torch.ops.torch_mlu.fused_l2_norm(flag, [torch.full((4,), 2.0, device="mlu")] * 2, True)
    assert total.item() == pytest.approx(32**0.5)
    assert each.tolist() == [4, 4]
    assert not hasattr(torch.ops.torch_mlu, "fused_lamb")
    with pytest.raises(NotImplementedError):
        adam(torch.ones(1), *[[torch.ones(2)]] * 4, 0.1, 0.9, 0.99, 1e-8, 1, 1, 1, 0.0)


@check
def autocast() -> None:
    """torch.autocast("mlu") computes products in 16 bits and softmax in 32; the CPU's leaves MLUs alone."""
    x, w = torch.randn(4, 8, device="mlu"), torch.randn(5, 8, device="mlu", requires_grad=True)
    for context in (torch.autocast("mlu", dtype=torch.bfloat16), torch.mlu.amp.autocast(dtype=torch.bfloat16)):
        with context:
            h = F.linear(x, w)
            assert (h.dtype, h.softmax(-1).dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("mlu"):
        assert (x @ w.t()).dtype == torch.float16
    h.float().sum().backward()
    assert w.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(x, w).dtype == torch.float32


@check
def gradient_scaler() -> None:
    """A gradient that is infinite skips the step and halves the scale, for both spellings of the scaler."""
    for scaler in (torch.amp.GradScaler("mlu", init_scale=4.0), torch.mlu.amp.GradScaler(init_scale=4.0)):
        weight = torch.ones(2, device="mlu", requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=1.0)
        for factor, wanted, scale in ((1.0, [0, 0], 4.0), (float("inf"), [0, 0], 2.0)):
            optimizer.zero_grad()
            scaler.scale((weight * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            assert (weight.tolist(), scaler.get_scale()) == (wanted, scale)


@check
def checkpointing_keeps_dropout() -> None:
    """Recomputation draws the dropout of the forward, in both kinds of checkpointing."""
    x = torch.ones(64, device="mlu", requires_grad=True)
    for use_reentrant in (True, False):
        torch.manual_seed(3)
        y = checkpoint(lambda x: F.dropout(x.exp(), 0.5), x, use_reentrant=use_reentrant)
        (grad,) = torch.autograd.grad(y.sum(), x) if not use_reentrant else (None,)
        if use_reentrant:
            y.sum().backward()
            grad = x.grad
        torch.testing.assert_close(grad, y.detach())


@check
def compiled_functions_run() -> None:
    """torch.compile with the eager backend traces through the device."""
    x = torch.ones(3, device="mlu", requires_grad=True)
    y = torch.compile(lambda x: (x * 2 + 1).sum(), backend="eager", fullgraph=True)(x)
    y.backward()
    assert x.grad.tolist() == [2, 2, 2]


MATH, FLASH, EFFICIENT = 0, 1, 2


def qkv(batch: int, heads: int, length: int, size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor for all three of query, key and value."""
    return torch.randn(batch, heads, length, size, device="mlu", dtype=dtype)


@check
def attention_takes_the_recorded_path() -> None:
    """Which of the fused paths serves follows torch_mlu's limits: dtype, head size, work, padding, heads, mask."""
    good = qkv(2, 8, 512, 64)
    choose = torch._fused_sdp_choice
    assert choose(good, good, good, is_causal=True) == FLASH
    for bad in (
        qkv(2, 8, 512, 64, torch.float32),
        qkv(2, 8, 512, 56),
        qkv(2, 8, 512, 68),
        qkv(2, 8, 512, 264),
        qkv(1, 6, 512, 64),  # 12 blocks of work
        qkv(2, 8, 300, 64),  # half of the padded product
        qkv(2, 8, 0, 64),
        qkv(2, 8, 512, 128)[..., ::2],
    ):
        assert choose(bad, bad, bad) == MATH, bad.shape
    fewer = qkv(2, 4, 512, 64)
    assert choose(good, fewer, fewer) == MATH
    wide = qkv(2, 8, 512, 128)
    assert choose(good, good, wide) == EFFICIENT
    assert choose(good, good, good, attn_mask=torch.zeros(512, 512, device="mlu", dtype=torch.bfloat16)) == EFFICIENT
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert choose(good, good, good) == MATH
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        with pytest.raises(RuntimeError, match="No available kernel"):
            choose(fewer, good, good)


@check
def grouped_attention_raises() -> None:
    """enable_gqa reaches the math path, which has no such argument: TypeError (record on MLU590)."""
    q, kv = qkv(1, 8, 64, 64), qkv(1, 4, 64, 64)
    with pytest.raises(TypeError, match="enable_gqa"):
        F.scaled_dot_product_attention(q, kv, kv, enable_gqa=True)


@check
def attention_is_the_cpu_s() -> None:
    """All three paths have the CPU's output and gradients, in the tolerance of bfloat16."""
    for shape, mask in (((1, 8, 512, 64), False), ((1, 8, 512, 64), True), ((1, 2, 64, 64), False)):
        on_cpu = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
        bias = torch.randn(512, 512).bfloat16() if mask else None
        grads = []
        for device in ("cpu", "mlu"):
            inputs = [x.to(device).requires_grad_() for x in on_cpu]
            on_device = None if bias is None else bias.to(device)
            y = F.scaled_dot_product_attention(*inputs, attn_mask=on_device, is_causal=not mask)
            grads.append([x.cpu() for x in (y.detach(), *torch.autograd.grad(y.float().square().sum(), inputs))])
        for expected, found in zip(*grads, strict=True):
            torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.03)


@check
def attention_dropout_is_the_same_in_backward() -> None:
    """The efficient path's gradient with dropout is the slope of its own output, mask and all."""
    inputs = [torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(i)).to("mlu") for i in range(4)]
    bias, inputs = torch.randn(1, 2, 5, 5).to("mlu"), inputs[:3]
    inputs.append(bias)

    def output(values: list[torch.Tensor]) -> torch.Tensor:
        torch.mlu.manual_seed(11)
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        return attend(*values, True, 0.4, False)[0].square().sum()

    leaves = [x.clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(output(leaves), leaves)
    assert output(inputs) == output(inputs)
    for index, grad in enumerate(grads):
        direction = torch.randn_like(inputs[index].cpu()).to("mlu")
        ahead, behind = copy.copy(inputs), copy.copy(inputs)
        ahead[index], behind[index] = inputs[index] + 0.01 * direction, inputs[index] - 0.01 * direction
        slope = (output(ahead) - output(behind)) / 0.02
        torch.testing.assert_close(slope, (grad * direction).sum(), rtol=0.01, atol=0.01)
