"""Compiled code: what torch.compile puts into its graphs when a script calls an op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llm_adapt.ops.dispatch.dispatcher import Binding, dispatchers
from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy
from tests.ops.scaled_op import TOY, scaled, toy_library, toy_op

Entry = Callable[..., torch.Tensor]
POLICY = Policy(order=(TOY,))


@pytest.fixture
def entry() -> Iterator[Entry]:
    """The toy op."""
    torch._dynamo.reset()
    with toy_op() as found:
        yield found


def last() -> Binding:
    """What was bound last."""
    return list(dispatchers["scaled"].bindings.values())[-1]


def whole_graph(function: Callable[..., Any], dynamic: bool | None = None) -> Callable[..., Any]:
    """The function compiled without graph breaks."""
    return torch.compile(function, fullgraph=True, backend="eager", dynamic=dynamic)


def double(x: torch.Tensor, bias: torch.Tensor | None = None, factor: float = 2.0) -> torch.Tensor:
    """A right kernel."""
    return scaled(x, bias, factor)


def test_a_compilable_kernel_is_traced_and_proved(entry: Entry) -> None:
    """It is chosen while the code is traced, proved there on the op's own inputs, and its ops are in the graph."""
    with toy_library("scaled", double, compilable=True), using(POLICY):
        code = whole_graph(lambda x: entry(x) + 1)
        assert torch.equal(code(torch.ones(3)), torch.full((3,), 3.0))
        assert (last().choice.library, last().example.is_compiling) == (TOY, True)
        assert last().choice.verdict.holds


def test_other_kernels_leave_the_place_to_the_reference(entry: Entry) -> None:
    """The reference is PyTorch, which the compiler fuses by itself; the reason is kept."""
    with toy_library("scaled", double), using(POLICY):
        whole_graph(lambda x: entry(x))(torch.ones(3))
        assert last().choice.refusals == {TOY: "cannot be traced by torch.compile"}


def test_a_kernel_that_decides_by_shapes_is_not_traced(entry: Entry) -> None:
    """Shapes may be symbols there, and a guess could be wrong for the next call."""
    refuses: Any = lambda call: "too long" if call.x.shape[-1] > 4 else None  # noqa: E731
    with toy_library("scaled", double, compilable=True, refuses=refuses), using(POLICY):
        whole_graph(lambda x: entry(x))(torch.ones(3))
        assert "unknown while code is compiled" in last().choice.refusals[TOY]


def test_dynamic_shapes(entry: Entry) -> None:
    """One graph serves many lengths."""
    with toy_library("scaled", double, compilable=True), using(POLICY):
        code = whole_graph(lambda x: entry(x), dynamic=True)
        for size in range(2, 8):
            assert code(torch.ones(size)).shape == (size,)
        assert last().calls == 1  # traced once


def test_gradients(entry: Entry) -> None:
    """Compiled training gives the gradient of eager training."""
    with toy_library("scaled", double, compilable=True), using(POLICY):
        x = torch.randn(4, requires_grad=True)
        torch.compile(lambda x: entry(x).square().sum(), fullgraph=True, backend="aot_eager")(x).backward()
        assert torch.allclose(x.grad, 8 * x.detach())


@pytest.mark.filterwarnings("ignore:Kernel toy.scaled was quarantined")
def test_a_wrong_kernel_is_not_traced(entry: Entry) -> None:
    """The proof on the op's own inputs fails, and the graph holds the reference."""
    with toy_library("scaled", lambda x, bias=None, factor=2.0: x * 3, compilable=True), using(POLICY):
        assert torch.equal(whole_graph(lambda x: entry(x))(torch.ones(3)), torch.full((3,), 2.0))
        assert TOY in dispatchers["scaled"].quarantine


def test_a_new_policy_reaches_compiled_code(entry: Entry) -> None:
    """What was compiled under another policy is compiled anew, not served from before."""

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x * 2 + 0

    with toy_library("scaled", kernel, compilable=True):
        code = whole_graph(lambda x: entry(x))
        for policy in (POLICY, Policy(), POLICY):
            with using(policy):
                code(torch.ones(3))
                code(torch.ones(3))
        traced = {binding.choice.library: binding.calls for binding in dispatchers["scaled"].bindings.values()}
    assert traced == {TOY: 2, "reference": 1}


def test_autocast_does_not_reach_inside() -> None:
    """As in eager code, an op computes in the dtypes it is given, and casts what it declares."""
    torch._dynamo.reset()
    with toy_op(autocast=("x",)) as entry, torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(3)
        code = whole_graph(lambda x: entry(x))
        assert code(x).dtype == torch.bfloat16
        assert torch.equal(code(x), entry(x))


def test_deterministic_algorithms_are_asked_for(entry: Entry) -> None:
    """Code that is compiled anew because the script wants deterministic algorithms is chosen for anew."""
    with toy_library("scaled", double, compilable=True, deterministic=False), using(POLICY):
        code = whole_graph(lambda x: entry(x))
        code(torch.ones(3))
        assert last().choice.library == TOY
        torch.use_deterministic_algorithms(True)
        try:
            code(torch.ones(3))
        finally:
            torch.use_deterministic_algorithms(False)
        assert "is not deterministic" in last().choice.refusals[TOY]


def test_functorch(entry: Entry) -> None:
    """A kernel that does not serve inside vmap is not traced there either."""
    with toy_library("scaled", double, compilable=True), using(POLICY):
        whole_graph(lambda x: entry(x))(torch.ones(3))
        assert last().choice.library == TOY
        whole_graph(lambda x: torch.vmap(entry)(x))(torch.ones(2, 3))
        assert "vmap" in last().choice.refusals[TOY]


def test_code_for_two_devices(entry: Entry) -> None:
    """Inside autocast, what is traced turns it off on its own device, and casts to what is in force then."""
    names = set()
    for device, dtype in (("cpu", torch.bfloat16), ("cpu", torch.float16), ("meta", torch.bfloat16)):
        with torch.autocast("cpu", dtype):
            names.add(dispatchers["scaled"].traced((("x", torch.float32, device, False),), ()))
    assert len(names) == 3


def test_a_graph_may_call_several_libraries(entry: Entry) -> None:
    """The second call in a graph may be the first that another library serves, also under another autocast."""
    with toy_library("scaled", lambda x: scaled(x), compilable=True), using(POLICY):
        x = torch.ones(3)

        def three(x: torch.Tensor) -> torch.Tensor:
            y = entry(entry(x), negative=True)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return entry(y, factor=3.0) + entry(y)

        assert torch.equal(whole_graph(three)(x), three(x))
        assert {binding.choice.library for binding in dispatchers["scaled"].bindings.values()} == {TOY, "reference"}
