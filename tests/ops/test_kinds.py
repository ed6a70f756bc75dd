"""Kinds of calls: what a kernel may refuse by, or be wrong for, is never shared between two calls."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llm_adapt.ops.dispatch.dispatcher import Binding, dispatchers
from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy
from llm_adapt.ops.multi_tensor_l2norm import multi_tensor_l2norm
from tests.ops.scaled_op import TOY, scaled, toy_library, toy_op

Entry = Callable[..., torch.Tensor]
POLICY = Policy(order=(TOY,))


@pytest.fixture
def entry() -> Iterator[Entry]:
    """The toy op."""
    with toy_op() as found:
        yield found


def last() -> Binding:
    """What was bound last."""
    return list(dispatchers["scaled"].bindings.values())[-1]


def whole(x: torch.Tensor, bias: torch.Tensor | None = None, factor: float = 2.0) -> torch.Tensor:
    """A right kernel that does not honour `negative`."""
    return scaled(x, bias, factor)


def test_tensors_without_values_never_reach_a_kernel(entry: Entry) -> None:
    """A kernel that serves the CPU is not handed tensors on meta that look alike, not beside others either."""
    devices: list[str] = []

    def kernel(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        devices.extend(tensor.device.type for tensor in (x, bias) if tensor is not None)
        return scaled(x, bias)

    cpu, meta = torch.ones(3), torch.empty(3, device="meta")
    with toy_library("scaled", kernel), using(POLICY):
        for bias in (None, cpu):
            entry(cpu, bias)
            assert last().choice.library == TOY
        entry(meta)
        entry(meta, meta)
        with pytest.raises(RuntimeError, match="meta"):
            entry(cpu, meta)
        assert set(devices) == {"cpu"}


@pytest.mark.filterwarnings("ignore:Kernel toy.scaled was quarantined")
@pytest.mark.parametrize(
    "x",
    [torch.randn(4, 8).t(), torch.randn(4).expand(8, 4), torch.randn(8, 1).expand(8, 4)],
    ids=["columns", "one row", "one column"],
)
def test_each_memory_layout_is_proved(entry: Entry, x: torch.Tensor) -> None:
    """A kernel that knows the stride of a row is not trusted with columns, nor with elements that share memory."""

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x * (2.0 if x.stride(-1) == 1 and x.stride(0) else 3.0)

    with toy_library("scaled", kernel), using(POLICY):
        for width in range(8, 14):  # more than guards are kept of
            part = torch.randn(8, width)[:, :4]
            assert torch.equal(entry(part), scaled(part))
            assert last().choice.library == TOY
        assert torch.equal(entry(x), scaled(x))
        assert last().choice.library == "reference"


def test_autocast_to_another_dtype_is_another_kind() -> None:
    """A kernel that was asked about bfloat16 is asked again when autocast casts to float16."""
    seen: list[torch.dtype] = []

    def kernel(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.dtype)
        return x * 2

    refuses: Any = lambda call: None if call.x.dtype == torch.bfloat16 else "takes bfloat16"  # noqa: E731
    with toy_op(autocast=("x",)) as entry, toy_library("scaled", kernel, refuses=refuses), using(POLICY):
        x = torch.randn(2, 3)
        for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype):
                assert entry(x).dtype == dtype
        assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("casts", [(), ("x",)])
def test_autocast_without_a_device_to_cast_on(casts: tuple[str, ...]) -> None:
    """Inside autocast, ops take tensors on meta, which it does not cast, and empty lists, which have no device."""
    with toy_op(autocast=casts) as entry, torch.autocast("cpu", torch.bfloat16):
        assert entry(torch.empty(3, device="meta")).dtype == torch.float32
        assert float(multi_tensor_l2norm([])) == 0.0


def test_complex_tensors_get_the_reference(entry: Entry) -> None:
    """Proofs compare real numbers, so that no kernel can be proved on others."""
    with toy_library("scaled", lambda x: x * 2 + 0.3j), using(POLICY):
        x = torch.ones(2, dtype=torch.complex64)
        assert torch.equal(entry(x), 2 * x)
        assert "complex" in last().choice.refusals[TOY]


def test_a_tensor_as_an_option_is_not_kept(entry: Entry) -> None:
    """A number may be given as a tensor: the reference takes it, and nothing holds on to it."""
    with toy_library("scaled", whole), using(POLICY):
        factor = torch.tensor(3.0)
        gone = weakref.ref(factor)
        assert entry(torch.ones(2), factor=factor).tolist() == [3.0, 3.0]
        assert last().choice.refusals == {TOY: "takes a number, not a tensor, as factor"}
        del factor
        gc.collect()
        assert gone() is None


def test_tensors_are_not_kept(entry: Entry) -> None:
    """Guards, bindings and verdicts know facts of tensors, and keep none alive."""
    with toy_library("scaled", whole), using(POLICY):
        x, bias = torch.ones(2, 3, requires_grad=True), torch.ones(3)
        gone = [weakref.ref(x), weakref.ref(bias)]
        entry(x, bias).sum().backward()
        assert last().choice.library == TOY
        del x, bias
        gc.collect()
        assert [reference() for reference in gone] == [None, None]


def test_numbers_that_come_and_go_make_no_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hints and dynamic options are part of no line of the receipt: else each seed and length would add one."""
    with toy_op(dynamic=frozenset({"factor"})) as entry:
        for factor in (1.5, 2.5, 3.5):
            entry(torch.ones(3), factor=factor)
        (binding,) = dispatchers["scaled"].bindings.values()
        assert (binding.calls, binding.example.variant) == (3, "")
