"""Dispatch: who serves a call, that no argument is dropped, and what changes the choice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from llm_adapt.errors import KernelError
from llm_adapt.ops.dispatch.dispatcher import Binding, Dispatcher, dispatchers
from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy, Proof
from tests.ops.scaled_op import TOY, scaled, toy_library, toy_op

Entry = Callable[..., torch.Tensor]
POLICY = Policy(order=(TOY,))


@pytest.fixture
def entry() -> Iterator[Entry]:
    """The toy op."""
    with toy_op() as found:
        yield found


def dispatcher() -> Dispatcher:
    """The toy op's dispatcher."""
    return dispatchers["scaled"]


def bindings() -> list[Binding]:
    """What was bound so far, in that order."""
    return list(dispatcher().bindings.values())


def last() -> Binding:
    """What was bound last."""
    return bindings()[-1]


def double(x: torch.Tensor, bias: torch.Tensor | None = None, factor: float = 2.0) -> torch.Tensor:
    """A right kernel that does not honour `negative`."""
    return torch.add(bias, x, alpha=factor) if bias is not None else x * factor


def test_without_a_policy_the_reference_serves(entry: Entry) -> None:
    """Importing is not acting: before patch() every op is its reference."""
    x = torch.randn(3)
    assert torch.equal(entry(x), scaled(x))
    assert (last().choice.library, last().choice.reason) == ("reference", "no kernel library is in the order")


def test_the_first_library_that_serves_is_bound(entry: Entry) -> None:
    """Libraries are asked in order; those that do not serve leave their reason."""
    with toy_library("scaled", double), using(Policy(order=("not_there", TOY))):
        entry(torch.randn(3))
        assert last().choice.library == TOY
        assert list(last().choice.refusals) == ["not_there"]
        assert "ModuleNotFoundError" in last().choice.refusals["not_there"]
        assert last().choice.verdict.holds


def test_an_argument_that_a_kernel_does_not_honour_is_never_dropped(entry: Entry) -> None:
    """A call that gives such an argument goes past the kernel; with the default it does not."""
    with toy_library("scaled", double), using(POLICY):
        x = torch.randn(3)
        assert torch.equal(entry(x, negative=True), -2 * x)
        assert last().choice.refusals == {TOY: "does not honour negative"}
        assert torch.equal(entry(x, negative=False), 2 * x)
        assert last().choice.library == TOY


def test_one_lookup_serves_equal_calls(entry: Entry) -> None:
    """Calls of one kind are bound once and counted; another shape, dtype, option or state is asked anew."""
    seen: list[Any] = []

    def refuses(call: Any) -> str | None:
        seen.append(call)
        return None

    with toy_library("scaled", double, refuses=refuses), using(POLICY):
        x = torch.randn(3, requires_grad=True)
        for _ in range(5):
            entry(x)
        assert (len(seen), last().calls) == (1, 5)
        others: list[Callable[[], Any]] = [
            lambda: entry(torch.randn(4)),
            lambda: entry(x.double()),
            lambda: entry(x.detach()),
            lambda: entry(x, factor=3.0),
            lambda: entry(x, bias=x),
            lambda: entry(torch.randn(3, 2).t()),
        ]
        for count, act in enumerate(others, start=2):
            act()
            act()
            assert len(seen) == count
        with torch.inference_mode():
            entry(x)
        assert seen[-1].is_inference
        assert len(seen) == len(others) + 2


def test_refusals_see_facts(entry: Entry) -> None:
    """A kernel decides by shapes, dtypes, the device, and options; its reason is kept."""

    def refuses(call: Any) -> str | None:
        return f"rows of {call.x.shape[-1]} in {call.dtype}, factor {call.factor}" if call.x.shape[-1] > 4 else None

    with toy_library("scaled", double, refuses=refuses), using(POLICY):
        entry(torch.randn(2, 3))
        assert last().choice.library == TOY
        entry(torch.randn(2, 5), factor=1.5)
        assert last().choice.refusals == {TOY: "rows of 5 in torch.float32, factor 1.5"}


def test_a_kernel_without_backward_serves_in_inference_mode_only(entry: Entry) -> None:
    """Neither no_grad nor inputs without gradient are enough: reentrant checkpointing runs its forward like that."""

    def forward_only(x: torch.Tensor) -> torch.Tensor:
        return x.detach() * 2

    with toy_library("scaled", forward_only, has_backward=False), using(POLICY):
        entry(torch.randn(3))
        assert "has no backward" in last().choice.refusals[TOY]
        with torch.no_grad():
            entry(torch.randn(3))
        assert "has no backward" in last().choice.refusals[TOY]
        with torch.inference_mode():
            entry(torch.randn(3))
            assert last().choice.library == TOY


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_uses_the_same_kernel(entry: Entry, use_reentrant: bool) -> None:
    """Activation checkpointing calls the same kernel twice, and gives the gradient of the plain call."""
    kinds: list[bool] = []

    def kernel(x: torch.Tensor) -> torch.Tensor:
        kinds.append(torch.is_grad_enabled())
        return x * 2

    with toy_library("scaled", kernel), using(POLICY):
        x = torch.randn(3, requires_grad=True)
        checkpoint(entry, x, use_reentrant=use_reentrant).square().sum().backward()
        assert torch.allclose(x.grad, 8 * x.detach())
        assert {binding.choice.library for binding in bindings()} == {TOY}


def test_a_proof_inside_a_checkpoint_saves_nothing_there(entry: Entry) -> None:
    """The first proof may fall into a checkpointed region; its own tensors must not be counted among the saved."""
    with toy_library("scaled", double), using(POLICY):
        x = torch.randn(3, requires_grad=True)
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            entry(x)
        assert last().choice.verdict.holds
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            first = len(saved)
            entry(x)
        assert len(saved) - first == first


def test_a_proof_draws_no_random_numbers(entry: Entry) -> None:
    """The script's random stream is the same with and without proofs."""
    with toy_library("scaled", double), using(POLICY):
        torch.manual_seed(0)
        entry(torch.ones(3))
        after = torch.rand(2)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(2))


def test_deterministic_algorithms_are_asked_for(entry: Entry) -> None:
    """A kernel that gives other bits each time does not serve under use_deterministic_algorithms."""
    with toy_library("scaled", double, deterministic=False), using(POLICY):
        entry(torch.ones(3))
        assert last().choice.library == TOY
        torch.use_deterministic_algorithms(True)
        try:
            entry(torch.ones(3))
        finally:
            torch.use_deterministic_algorithms(False)
        assert "is not deterministic" in last().choice.refusals[TOY]


def test_functorch(entry: Entry) -> None:
    """Inside vmap and grad the reference serves, unless a kernel says that it can."""
    x = torch.randn(4, 3)
    with toy_library("scaled", double), using(POLICY):
        assert torch.equal(torch.vmap(entry)(x), 2 * x)
        assert "vmap" in last().choice.refusals[TOY]
        assert torch.equal(torch.func.grad(lambda y: entry(y).sum())(x), torch.full_like(x, 2))
    with toy_library("scaled", double, functorch=True), using(POLICY):
        torch.vmap(entry)(x)
        assert last().choice.library == TOY


def test_meta_tensors_get_the_reference(entry: Entry) -> None:
    """Shapes can be asked on meta, and that decides nothing for the CPU, whose calls look alike."""
    with toy_library("scaled", double), using(POLICY):
        assert entry(torch.empty(3, device="meta")).shape == (3,)
        assert last().choice.library == "reference"
        entry(torch.ones(3))
        assert last().choice.library == TOY


class Wrapped(torch.Tensor):
    """A tensor subclass."""


def test_tensor_subclasses_get_the_reference(entry: Entry) -> None:
    """DTensor and its kin are refused by every kernel, with their name; parameters are plain tensors."""
    with toy_library("scaled", double), using(POLICY):
        entry(torch.randn(3).as_subclass(Wrapped))
        assert last().choice.refusals == {TOY: "takes plain tensors, not Wrapped"}
        entry(torch.nn.Parameter(torch.randn(3)))
        assert last().choice.library == TOY


def test_autocast_keeps_dtypes(entry: Entry) -> None:
    """An op computes in the dtypes it is given, inside autocast too: its matmuls are not cast behind its back."""
    dtypes: list[Any] = []

    def kernel(x: torch.Tensor) -> torch.Tensor:
        dtypes.append((x @ x.t()).dtype)
        return x * 2

    with toy_library("scaled", kernel), using(Policy(order=(TOY,), proof=Proof(at_first_use=False))):
        with torch.autocast("cpu", torch.bfloat16):
            assert entry(torch.randn(2, 3)).dtype == torch.float32
        assert dtypes == [torch.float32]


def test_autocast_can_cast() -> None:
    """An op declared so casts floating tensors inside autocast, as torch casts the inputs of attention."""
    with toy_op(autocast=("x",)) as entry, torch.autocast("cpu", torch.bfloat16):
        assert entry(torch.randn(2, 3)).dtype == torch.bfloat16
        assert entry(torch.randn(2, 3), torch.randn(3)).dtype == torch.float32  # the bias is not
        assert entry(torch.randn(2, 3).double()).dtype == torch.float64


def test_autocast_decides_before_kernels_do() -> None:
    """Kernels are asked, and proved, about what they will get: the tensors as autocast casts them."""
    seen: list[torch.dtype] = []

    def kernel(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.dtype)
        return x * 2

    refuses: Any = lambda call: None if call.x.dtype == torch.bfloat16 else "takes bfloat16"  # noqa: E731
    with toy_op(autocast=("x",)) as entry, toy_library("scaled", kernel, refuses=refuses), using(POLICY):
        with torch.autocast("cpu", torch.bfloat16):
            entry(torch.randn(2, 3))
        assert (last().choice.library, set(seen)) == (TOY, {torch.bfloat16})


def test_a_dynamic_number_is_not_dropped_either() -> None:
    """Its value is part of no key, but whether it was given is; a hint may be left out by any kernel."""
    with toy_op(dynamic=frozenset({"factor"})) as entry, toy_library("scaled", lambda x: x * 2), using(POLICY):
        x = torch.ones(2)
        assert [float(entry(x, factor=factor)[0]) for factor in (2.0, 5.0, 3.0, 2.0)] == [2.0, 5.0, 3.0, 2.0]
        assert {binding.choice.library: binding.calls for binding in bindings()} == {TOY: 2, "reference": 2}
    with toy_op(hints=frozenset({"factor"})) as entry, toy_library("scaled", lambda x: x * 2), using(POLICY):
        entry(torch.ones(2), factor=2.0)
        entry(torch.ones(2), factor=5.0)
        assert {binding.choice.library for binding in bindings()} == {TOY}


def test_an_explicit_choice_never_falls_back(entry: Entry) -> None:
    """What the user asks for works, or raises with the reason and the call."""
    with toy_library("scaled", double):
        with using(Policy(choose={"scaled": TOY})):
            assert entry(torch.ones(2)).tolist() == [2.0, 2.0]
            with pytest.raises(KernelError, match=r"scaled=toy was chosen.*does not honour negative.*never falls back"):
                entry(torch.ones(2), negative=True)
        with using(Policy(choose={"*": "not_there"})), pytest.raises(KernelError, match="ModuleNotFoundError"):
            entry(torch.ones(2))
        with using(Policy(order=(TOY,), choose={"scaled": "reference"})):
            entry(torch.ones(2))
            assert last().choice.library == "reference"


def test_denied_kernels_never_serve(entry: Entry) -> None:
    """A library, or one kernel of it, can be denied; chosen explicitly at the same time it is an error."""
    with toy_library("scaled", double):
        for name in (TOY, f"{TOY}.scaled"):
            with using(Policy(order=(TOY,), deny=frozenset({name}))):
                entry(torch.ones(2))
                assert last().choice.refusals == {TOY: "denied by the policy"}
        with using(Policy(deny=frozenset({TOY}), choose={"scaled": TOY})), pytest.raises(KernelError, match="denied"):
            entry(torch.ones(2))


def test_layers(entry: Entry) -> None:
    """A choice for a pattern of module names counts where the op is called by such a module, and only there."""
    policy = Policy(order=(TOY,), layers=(("*.mlp", "scaled", "reference"), ("decoder.*", "*", TOY)))
    with toy_library("scaled", double):
        assert entry.at("decoder.0.mlp") is entry
        with using(policy):
            x = torch.ones(2)
            for layer, library in (("decoder.0.mlp", "reference"), ("decoder.0.norm", TOY), ("other", TOY)):
                bound = entry.at(layer)
                assert bound is entry.at(layer)
                bound(x)
                assert (last().choice.library, last().example.layer) == (library, layer)


def test_a_new_policy_counts_at_once(entry: Entry) -> None:
    """Bindings are forgotten when the policy changes, also from inside a block, and come back after it."""
    with toy_library("scaled", double), using(POLICY):
        entry(torch.ones(2))
        with using(Policy()):
            entry(torch.ones(2))
            assert last().choice.library == "reference"
        entry(torch.ones(2))
        assert [binding.calls for binding in bindings()] == [2, 1]


def test_threads(entry: Entry) -> None:
    """Many threads that meet a new call at once all get a right answer."""
    found: list[torch.Tensor] = []
    with toy_library("scaled", double), using(POLICY):
        threads = [
            threading.Thread(target=lambda size: found.append(entry(torch.ones(size))), args=(1 + i % 4,))
            for i in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert len(found) == 16
    assert all(bool((item == 2).all()) for item in found)


def test_a_kernel_may_call_another_op(entry: Entry) -> None:
    """A kernel composed of other ops is proved, and its ops are chosen, without waiting for itself."""
    from llm_adapt.ops.rms_norm import rms_norm

    def composed(x: torch.Tensor) -> torch.Tensor:
        rms_norm(x)
        return x * 2

    with toy_library("scaled", composed), using(Policy(order=(TOY, "torch_native"))):
        entry(torch.ones(2))
        assert last().choice.library == TOY


def test_the_entry_has_the_signature_of_the_reference(entry: Entry) -> None:
    """Positional and keyword arguments are taken as the reference takes them, and documented as there."""
    x = torch.ones(2)
    assert torch.equal(entry(x, x, 3.0, True), entry(x=x, bias=x, factor=3.0, negative=True))
    assert entry.__doc__ == scaled.__doc__
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        entry(x, scale=1.0)


def test_arguments_that_are_no_tensors(entry: Entry) -> None:
    """The error names the argument and what it is."""
    with pytest.raises(TypeError, match="scaled: x must be a tensor; found list"):
        entry([1.0])
    with pytest.raises(TypeError, match="scaled: bias must be a tensor; found float"):
        entry(torch.ones(2), 1.0)
    with pytest.raises(TypeError, match=r"scaled: factor=\[1\] was given; pass a value that can be hashed"):
        entry(torch.ones(2), factor=[1])


def test_many_shapes_do_not_fill_the_memory(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of keys is bounded, and kinds of calls, not shapes, make the receipt."""
    monkeypatch.setattr("llm_adapt.ops.dispatch.dispatcher._MOST_KEYS", 10)
    for size in range(1, 60):
        entry(torch.ones(size))
    assert len(dispatcher().table) <= 10
    assert [binding.calls for binding in bindings()] == [59]
