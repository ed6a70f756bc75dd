"""Proofs where they run: the thread and stream, backward passes, captured graphs, and parts of large calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_adapt.errors import KernelError
from llm_adapt.ops.dispatch.dispatcher import dispatchers
from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy
from llm_adapt.ops.dispatch.proof import compare, prove
from llm_adapt.ops.dispatch.proving_ground import apart
from llm_adapt.ops.dispatch.registry import FusedOp, Kernel
from tests.ops.scaled_op import TOY, scaled, toy_library, toy_op

Entry = Callable[..., torch.Tensor]
POLICY = Policy(order=(TOY,))


@pytest.fixture
def entry() -> Iterator[Entry]:
    """The toy op."""
    with toy_op() as found:
        yield found


def test_a_proof_runs_on_the_stream_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Current device and stream belong to a thread: the proof's has those of the caller, on every rank its own."""
    seen: list[Any] = []
    module = SimpleNamespace(
        current_device=lambda: 3,
        current_stream=lambda: "the caller's",
        set_device=lambda index: seen.append((threading.current_thread().name, index)),
        set_stream=lambda stream: seen.append((threading.current_thread().name, stream)),
    )
    monkeypatch.setattr(torch, "a_device", module, raising=False)
    assert apart(lambda: len(seen), "a_device") == 2
    assert seen == [("llm_adapt proof", 3), ("llm_adapt proof", "the caller's")]
    assert apart(lambda: 1, "cpu") == 1


class _InBackward(torch.autograd.Function):
    """x, whose gradient is doubled by the toy op."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return dispatchers["scaled"].entry(gradient)


def library_for(device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who serves a call of that device in a backward pass."""
    from llm_adapt.ops.dispatch import call

    monkeypatch.setattr(call, "facts", lambda tensor, facts=call.facts: facts(tensor)._replace(device=device))
    x = torch.ones(3, requires_grad=True)
    _InBackward.apply(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    return list(dispatchers["scaled"].bindings.values())[-1].choice.library


def test_nothing_is_proved_in_a_backward_pass_of_a_device(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of the device would wait for a proof whose gradients wait for it; later calls are asked anew."""
    with toy_library("scaled", lambda x: x * 2), using(POLICY):
        assert library_for("hpu", monkeypatch) == "reference"
        assert dispatchers["scaled"].verdicts == dispatchers["scaled"].quarantine == {}
        entry(torch.ones(3))
        assert list(dispatchers["scaled"].bindings.values())[-1].choice.library == TOY
        assert library_for("hpu", monkeypatch) == TOY  # as the forward pass: it is proved


def test_a_backward_pass_on_the_cpu_proves(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """There each thread has its own."""
    with toy_library("scaled", lambda x: x * 2), using(POLICY):
        assert library_for("cpu", monkeypatch) == TOY


def test_what_a_capture_forbids_is_asked_again(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that could not be proved while a graph was captured is proved by the first call after it."""
    monkeypatch.setattr(torch.cpu, "is_current_stream_capturing", lambda: True, raising=False)
    with toy_library("scaled", lambda x: x * 2):
        with using(POLICY):
            entry(torch.ones(3))
            (binding,) = dispatchers["scaled"].bindings.values()
            assert "before the capture" in binding.choice.refusals[TOY]
            monkeypatch.undo()
            entry(torch.ones(3))
            assert list(dispatchers["scaled"].bindings.values())[-1].choice.library == TOY


def test_a_part_that_fits_does_not_prove_a_whole_that_does_not() -> None:
    """The reference refuses a large call whose sizes do not fit as it refuses a small one."""
    from llm_adapt.ops.add_rms_norm import add_rms_norm

    with using(Policy(order=("torch_native",))):
        add_rms_norm(torch.ones(4096, 300), torch.ones(4096, 300))
        with pytest.raises(ValueError, match="pass equal shapes"):
            add_rms_norm(torch.ones(4096, 300), torch.ones(4097, 300))


def test_a_reference_that_needs_values_is_proved_on_the_whole() -> None:
    """Where sizes alone do not tell the reference whether it takes a call, no part stands for it."""

    def clipped(x: torch.Tensor) -> torch.Tensor:
        """x, where its largest element is not negative. Shapes: any. Dtypes: any. Source: this file."""
        return x if x.max() >= 0 else x * 0

    op = FusedOp(clipped, lambda generator, dtype: iter(()), shrink=lambda arguments: {"x": arguments["x"][:2]})
    verdict = prove(op, Kernel("clipped", TOY, lambda x: x + 0, ""), {"x": torch.ones(2**20 + 1)})
    assert (verdict.holds, verdict.is_partial) == (True, False)


def test_a_result_that_the_reference_does_not_give_is_a_failure(entry: Entry) -> None:
    """An output too many, or a gradient where the reference has none, is no less wrong than one that is missing."""
    op, one = dispatchers["scaled"].op, torch.ones(2)
    for more in ("output[1]", "gradient of x"):
        verdict = compare(op, {"output": one, more: one}, {"output": one})
        assert (verdict.holds, verdict.reason) == (False, f"{more} is more than the reference gives")


def test_gradients_that_a_kernel_says_it_lacks_are_not_compared(entry: Entry) -> None:
    """A kernel that gives no gradient of an argument may give one all the same: calls that need it are refused."""
    kernel = Kernel("scaled", TOY, lambda x, bias: scaled(x, bias), "", no_gradient=frozenset({"bias"}))
    assert prove(dispatchers["scaled"].op, kernel, {"x": torch.ones(2, 3), "bias": torch.ones(3)}).holds


def test_an_error_of_a_proved_kernel_is_raised(entry: Entry) -> None:
    """What a kernel raises later is the script's to see: another answer in its place would be a silent fallback."""
    count = 0

    def kernel(x: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count > 2:
            raise KernelError("out of memory")
        return x * 2

    with toy_library("scaled", kernel), using(POLICY):
        entry(torch.ones(3))
        with pytest.raises(KernelError, match="out of memory"):
            entry(torch.ones(3))


class _OnlyTogether(torch.autograd.Function):
    """factor * x + bias, whose gradients are there only when both are asked for: needs_input_grad misread."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return x * 2 + bias

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if all(ctx.needs_input_grad):
            return gradient * 2, gradient.sum(0)
        return None, gradient.sum(0)


@pytest.mark.filterwarnings("ignore:Kernel toy.scaled was quarantined")
def test_a_gradient_beside_frozen_tensors() -> None:
    """Each gradient is proved also where its tensor alone needs one, as when all weights are frozen but a few."""

    def kernel(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return x * 2 if bias is None else _OnlyTogether.apply(x, bias)

    with toy_op() as entry, toy_library("scaled", kernel), using(Policy(order=(TOY,))):
        x, bias = torch.ones(2, 3, requires_grad=True), torch.ones(3)
        entry(x, bias).sum().backward()
        assert x.grad is not None
        assert "when x alone needs a gradient" in dispatchers["scaled"].quarantine[TOY]


def test_outputs_that_one_tensor_does_not_reach() -> None:
    """Each output has a gradient of its own from above, whichever of them a tensor alone reaches."""

    def pair(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(2 x, 3 y). Shapes: any. Dtypes: any. Source: this file."""
        return x * 2, y * 3

    op = FusedOp(pair, lambda generator, dtype: iter([{"x": torch.ones(2), "y": torch.ones(2)}]))
    verdict = prove(op, Kernel("pair", TOY, pair, ""), {"x": torch.ones(3), "y": torch.ones(3)})
    assert verdict.holds, verdict.reason
