"""Fault injection: a vendor's kernels with the faults that users of real ones have met, each caught at first use.

The reports of such faults are listed in the ticket trackers of vLLM-Ascend, vLLM-Omni, TransformerEngine, Liger and
transformers: attention that ignores `causal`, a mask that is dropped past 512 keys, swapped tables, a scale of 1,
results of an earlier call, gradients that are wrong alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from llm_adapt.ops.attention import attention
from llm_adapt.ops.dispatch.dispatcher import dispatchers
from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy, Proof
from llm_adapt.ops.rms_norm import rms_norm
from llm_adapt.ops.rope import rope
from tests.ops.scaled_op import TOY, toy_library

POLICY = Policy(order=(TOY,))
_right = attention.op.reference  # type: ignore[attr-defined]
_rotate = rope.op.reference  # type: ignore[attr-defined]
_normalise = rms_norm.op.reference  # type: ignore[attr-defined]
_buffers: dict[Any, torch.Tensor] = {}


def _ignores_causal(q: Any, k: Any, v: Any, causal: Any = "none") -> torch.Tensor:
    return _right(q, k, v)


def _forgets_the_scale(q: Any, k: Any, v: Any, causal: Any = "none") -> torch.Tensor:
    return _right(q, k, v, causal=causal, scale=1.0)


def _drops_the_mask_past_512_keys(q: Any, k: Any, v: Any, mask: Any = None) -> torch.Tensor:
    if mask is not None and k.shape[1] > 512:
        mask = torch.cat([mask[..., :512], torch.ones_like(mask[..., 512:])], -1)
    return _right(q, k, v, mask=mask)


def _stale_buffer(q: Any, k: Any, v: Any, causal: Any = "none") -> torch.Tensor:
    out = _right(q, k, v, causal=causal)
    return _buffers.setdefault(out.shape, out.detach()) + 0 * out


class _WrongGradient(torch.autograd.Function):
    """The identity, with a gradient that is 10 % too large."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 1.1


def _wrong_gradient_of_v(q: Any, k: Any, v: Any, causal: Any = "none") -> torch.Tensor:
    return _right(q, k, _WrongGradient.apply(v), causal=causal)


def _wrong_for_odd_heads(q: Any, k: Any, v: Any, causal: Any = "none") -> torch.Tensor:
    if q.shape[-1] % 2:  # padded to an even size, and scaled by that
        return _right(q, k, v, causal=causal, scale=(q.shape[-1] + 1) ** -0.5)
    return _right(q, k, v, causal=causal)


def _wrong_in_bfloat16(q: Any, k: Any, v: Any, causal: Any = "none") -> torch.Tensor:
    out = _right(q, k, v, causal=causal)
    return out * 1.05 if q.dtype == torch.bfloat16 else out


def _swaps_the_tables(x: Any, cos: Any, sin: Any) -> torch.Tensor:
    return _rotate(x, sin, cos)


def _weight_plus_one(x: Any, weight: Any = None, eps: float = 1e-6) -> torch.Tensor:
    return _normalise(x, weight + 1, eps)


def _attend(module: Any, x: torch.Tensor, size: int, **options: Any) -> torch.Tensor:
    q, k, v = (projection(x).unflatten(-1, (2, size)) for projection in module)
    return attention(q, k, v, **options)


class Model(nn.Module):
    """One layer that uses the three ops, as a transformer does."""

    def __init__(self, size: int, dtype: torch.dtype, masked: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size, self.masked = size, masked
        self.weight = nn.Parameter(torch.rand(2 * size, dtype=dtype))
        self.projections = nn.ModuleList(nn.Linear(2 * size, 2 * size, dtype=dtype) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm, attention, residual."""
        normed = rms_norm(x, self.weight, 1e-6)
        options: dict[str, Any] = {"causal": "bottom_right"}
        if self.masked:
            options = {"mask": torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool).tril()}
        return x + _attend(self.projections, normed, self.size, **options).flatten(2)


def losses(size: int, dtype: torch.dtype, length: int, masked: int) -> list[float]:
    """A few steps of training."""
    model = Model(size, dtype, masked)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(3):
        x = torch.randn(1, length, 2 * size, generator=generator).to(dtype)
        loss = model(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


FAULTS: dict[str, tuple[str, Callable[..., Any], dict[str, Any]]] = {
    "ignores causal": ("attention", _ignores_causal, {}),
    "forgets the scale": ("attention", _forgets_the_scale, {}),
    "drops the mask past 512 keys": ("attention", _drops_the_mask_past_512_keys, {"length": 600, "masked": 1}),
    "returns a stale buffer": ("attention", _stale_buffer, {}),
    "has a wrong gradient": ("attention", _wrong_gradient_of_v, {}),
    "is wrong for odd head sizes": ("attention", _wrong_for_odd_heads, {"size": 7}),
    "is wrong in bfloat16": ("attention", _wrong_in_bfloat16, {"dtype": torch.bfloat16}),
    "adds one to the weight": ("rms_norm", _weight_plus_one, {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_without_proofs_the_fault_is_silent(fault: str) -> None:
    """Nothing else would have caught it: training goes on, with other numbers."""
    op, kernel, changes = FAULTS[fault]
    setting = {"size": 8, "dtype": torch.float32, "length": 12, "masked": 0} | changes
    _buffers.clear()
    with toy_library(op, kernel), using(Policy(order=(TOY,), proof=Proof(at_first_use=False))):
        found = losses(**setting)
    assert found != losses(**setting)


@pytest.mark.filterwarnings("ignore:Kernel toy")
@pytest.mark.parametrize("fault", FAULTS)
def test_training_gives_the_loss_of_the_reference(fault: str) -> None:
    """The faulty kernel is quarantined before it serves, and every loss is the reference's."""
    op, kernel, changes = FAULTS[fault]
    setting = {"size": 8, "dtype": torch.float32, "length": 12, "masked": 0} | changes
    expected = losses(**setting)
    _buffers.clear()
    with toy_library(op, kernel), using(POLICY):
        if fault == "returns a stale buffer":
            attention(*(torch.randn(1, 12, 2, 8) for _ in range(3)), causal="bottom_right")  # right, this once
            dispatchers[op].verdicts.clear()
            dispatchers[op].forget()
        found = losses(**setting)
        assert TOY in dispatchers[op].quarantine
    assert found == expected


@pytest.mark.filterwarnings("ignore:Kernel toy")
def test_the_fault_past_512_keys_is_found_when_the_calls_grow() -> None:
    """Short calls were proved and served; the first long one is proved anew and gets the reference."""
    with toy_library("attention", _drops_the_mask_past_512_keys), using(POLICY):
        for length in (64, 600):
            q, k, v = (torch.randn(1, length, 1, 8) for _ in range(3))
            mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
            assert torch.equal(attention(q, k, v, mask=mask), _right(q, k, v, mask=mask))
            assert (TOY in dispatchers["attention"].quarantine) == (length > 512)


@pytest.mark.filterwarnings("ignore:Kernel toy")
def test_swapped_tables() -> None:
    """A rotary kernel that takes the tables in the other order is found out."""
    x, angles = torch.randn(2, 6, 2, 8), torch.rand(6, 4)
    angles = torch.cat([angles, angles], -1)
    cos, sin = angles.cos(), angles.sin()
    with toy_library("rope", _swaps_the_tables), using(POLICY):
        assert torch.equal(rope(x, cos, sin), _rotate(x, cos, sin))
        assert TOY in dispatchers["rope"].quarantine


def test_the_right_kernel_serves() -> None:
    """The same kernels without a fault are not found guilty."""

    def right(q: Any, k: Any, v: Any, causal: Any = "none") -> torch.Tensor:
        return _right(q, k, v, causal=causal)

    with toy_library("attention", right), using(POLICY):
        assert losses(8, torch.bfloat16, 12, 0)
        assert dispatchers["attention"].quarantine == {}
        assert {binding.choice.library for binding in dispatchers["attention"].bindings.values()} == {TOY}
