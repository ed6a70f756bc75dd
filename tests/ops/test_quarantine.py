"""Quarantine: a kernel that was found wrong serves no more, wherever it is bound and whatever the warning becomes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from llm_adapt.errors import KernelError
from llm_adapt.ops.dispatch.dispatcher import dispatchers
from llm_adapt.ops.dispatch.in_force import start_over, use_policy, using
from llm_adapt.ops.dispatch.policy import Policy, Proof
from tests.ops.scaled_op import TOY, scaled, toy_library, toy_op

Entry = Callable[..., torch.Tensor]
POLICY = Policy(order=(TOY,))
LAYERS = Policy(order=(TOY,), layers=(("other", "scaled", "reference"),))
SHORT, LONG = torch.ones(3), torch.ones(7)


@pytest.fixture
def entry() -> Iterator[Entry]:
    """The toy op."""
    with toy_op() as found:
        yield found


def wrong_for_long(x: torch.Tensor) -> torch.Tensor:
    """A kernel that is right for short rows."""
    return x * (2 if x.shape[-1] < 5 else 3)


def last_library() -> str:
    """Who served the kind of call that was bound last."""
    return list(dispatchers["scaled"].bindings.values())[-1].choice.library


@pytest.mark.parametrize("policy", [POLICY, Policy(order=(TOY,), strict=True)], ids=["warnings are errors", "strict"])
@pytest.mark.filterwarnings("error:Kernel toy.scaled was quarantined")
def test_an_error_that_is_caught_leaves_nothing_bound(entry: Entry, policy: Policy) -> None:
    """A script may catch the error of a quarantine; calls that the kernel served before are chosen for anew."""
    with toy_library("scaled", wrong_for_long), using(policy):
        entry(SHORT)
        with pytest.raises((RuntimeWarning, KernelError), match="was quarantined"):
            entry(LONG)
        entry(SHORT)
        assert last_library() == "reference"


@pytest.mark.filterwarnings("ignore:Kernel toy.scaled was quarantined")
def test_a_quarantine_holds_in_all_layers(entry: Entry) -> None:
    """What one layer finds out about a kernel counts for the others, and for calls without a layer."""
    with toy_library("scaled", wrong_for_long), using(LAYERS):
        bound = [entry.at("a"), entry.at("b"), entry]  # type: ignore[attr-defined]
        for call in bound:
            call(SHORT)
        bound[0](LONG)
        for call in bound:
            call(SHORT)
        calls = [binding.calls for binding in dispatchers["scaled"].bindings.values() if binding.choice.library == TOY]
        assert calls == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:Kernel toy.scaled was quarantined")
def test_a_kernel_found_wrong_by_another_thread_is_not_bound(entry: Entry) -> None:
    """While one thread proves a kernel another may find it wrong; the first keeps nothing that it decided before."""
    is_proving, may_go_on = threading.Event(), threading.Event()

    def kernel(x: torch.Tensor) -> torch.Tensor:
        if x.shape == SHORT.shape and not is_proving.is_set():
            is_proving.set()
            may_go_on.wait(30)
        return wrong_for_long(x)

    with toy_library("scaled", kernel), using(POLICY):
        thread = threading.Thread(target=entry, args=(SHORT,))
        thread.start()
        is_proving.wait(30)
        entry(LONG)
        may_go_on.set()
        thread.join(30)
        entry(SHORT)
        assert last_library() == "reference"


def test_a_policy_that_left_and_came_back_decides_anew(entry: Entry) -> None:
    """What was chosen while another thread had another policy in force is not kept under the first."""

    def refuses(call: object) -> None:
        with using(Policy()):  # as another thread would, just now
            pass

    with toy_library("scaled", lambda x: x * 2, refuses=refuses), using(POLICY):
        entry(SHORT)
        assert dispatchers["scaled"].table == {}


@pytest.mark.filterwarnings("ignore:Kernel toy.scaled was quarantined")
def test_an_explicit_choice_that_breaks_later_raises(entry: Entry) -> None:
    """A failed proof of sample:N does not hand the call to the reference when the user chose the kernel."""
    made: list[torch.Tensor] = []

    def kernel(x: torch.Tensor) -> torch.Tensor:
        made.append(x * (2 if len(made) < 5 else 3))
        return made[-1]

    with toy_library("scaled", kernel), using(Policy(choose={"scaled": TOY}, proof=Proof(every=2))):
        found = [entry(torch.ones(2)) for _ in range(3)]
        with pytest.raises(KernelError, match="never falls back"):
            entry(torch.ones(2))
        assert all(any(y is item for item in made) for y in found)


def test_a_layer_that_a_module_holds_follows_every_policy(entry: Entry) -> None:
    """A module may keep op.at(name) for as long as it lives: sessions begin and end meanwhile."""
    with toy_library("scaled", lambda x: x * 2), contextlib.ExitStack() as stack:
        stack.callback(start_over, Policy())
        start_over(LAYERS)
        held = entry.at("a")  # type: ignore[attr-defined]
        found = []
        for act, policy in ((start_over, Policy()), (use_policy, LAYERS), (start_over, Policy()), (use_policy, LAYERS)):
            act(policy)
            held(SHORT)
            found.append(last_library())
        assert found == ["reference", TOY, "reference", TOY]


def test_functorch_tensors_are_not_sampled(entry: Entry) -> None:
    """Inside vmap and grad sample:N proves nothing again: those tensors mean nothing outside."""
    with toy_library("scaled", lambda x: x * 2, functorch=True):
        with using(Policy(order=(TOY,), proof=Proof(every=1))):
            x = torch.randn(2, 3)
            for call in (entry, torch.vmap(entry), entry):
                assert torch.equal(call(x), scaled(x))
            assert [(binding.choice.library, binding.calls) for binding in dispatchers["scaled"].bindings.values()] == [
                (TOY, 2),
                (TOY, 1),
            ]
