"""Proofs: a wrong kernel is caught before it serves, on these shapes, forward and backward; and what follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_adapt
from llm_adapt.errors import KernelError
from llm_adapt.ops.dispatch.dispatcher import dispatchers
from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy, Proof
from llm_adapt.ops.dispatch.proof import compare, prove, run_op
from llm_adapt.ops.dispatch.receipt import receipt
from llm_adapt.ops.dispatch.tolerances import Tolerance
from tests.ops.scaled_op import TOY, scaled, toy_library, toy_op

Entry = Callable[..., torch.Tensor]
POLICY = Policy(order=(TOY,))


@pytest.fixture
def entry() -> Iterator[Entry]:
    """The toy op."""
    with toy_op() as found:
        yield found


class _NoGradient(torch.autograd.Function):
    """Twice x, with a gradient of None: autograd takes it for zero and trains nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:
        return None


class _WrongGradient(torch.autograd.Function):
    """Twice x, with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


_stale: list[torch.Tensor] = []


def _stale_buffer(x: torch.Tensor) -> torch.Tensor:
    """Right at first, then the same answer for ever."""
    if not _stale or _stale[0].shape != x.shape:
        _stale[:] = [x.detach() * 2]
    return _stale[0] + x * 0


WRONG: dict[str, Callable[..., Any]] = {
    "another factor": lambda x: x * 2.001,
    "no gradient": lambda x: _NoGradient.apply(x),
    "a wrong gradient": lambda x: _WrongGradient.apply(x),
    "detached": lambda x: (x * 2).detach(),
    "another shape": lambda x: (x * 2)[None],
    "another dtype": lambda x: (x * 2).double(),
    "one wrong element": lambda x: x * torch.ones_like(x).mul_(2).index_fill_(-1, torch.tensor([0]), 2.1),
    "not a number": lambda x: x * 2 + torch.full_like(x, math.nan),
    "infinite": lambda x: x * 2 / 0,
    "half precision inside": lambda x: (x.to(torch.bfloat16) * 2).to(x.dtype),
    "an exception": lambda x: x.nothing(),
    "nothing at all": lambda x: None,
    "changed input": lambda x: (x * 2, x.detach().zero_())[0],
}


@pytest.mark.filterwarnings("ignore:Kernel toy.scaled was quarantined")
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_kernel_never_serves(entry: Entry, fault: str) -> None:
    """It is quarantined at its first use, and script gets the reference's output and gradient."""

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return WRONG[fault](x)

    with toy_library("scaled", kernel), using(POLICY):
        for _ in range(2):
            x = torch.randn(3, 5, requires_grad=True)
            before = x.detach().clone()
            y = entry(x)
            y.sum().backward()
            assert torch.equal(x.detach(), before)
            assert torch.equal(y, scaled(x))
            assert torch.equal(x.grad, torch.full_like(x, 2.0))
        assert TOY in dispatchers["scaled"].quarantine


def test_a_quarantine_is_said_once(entry: Entry) -> None:
    """One warning with op, shapes, the two values and the place; afterwards the receipt says it."""

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    with toy_library("scaled", kernel), using(POLICY):
        with pytest.warns(RuntimeWarning, match=r"Kernel toy.scaled was quarantined: .*\[1x2\]") as warned:
            _ = [entry(torch.ones(1, 2)), entry(torch.ones(1, 3)), entry(torch.ones(1, 2), negative=True)]
        assert "output is wrong: 3 instead of 2 at [0, 0]" in str(warned[0].message)
        assert len(warned) == 1
        rows = receipt()
        rows = [row for row in rows if row["op"] == "scaled"]
        assert [row["library"] for row in rows] == ["reference"] * len(rows)
        assert all("output is wrong" in row["quarantine"][TOY] for row in rows)


@pytest.mark.parametrize("policy", [Policy(order=(TOY,), strict=True), Policy(order=(TOY,), proof=Proof(raises=True))])
def test_strict_mode_raises(entry: Entry, policy: Policy) -> None:
    """In strict mode, and with proof=strict, a failed proof is an error instead of a fallback."""

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    with toy_library("scaled", kernel), using(policy), pytest.raises(KernelError, match="was quarantined"):
        entry(torch.ones(2))


@pytest.mark.filterwarnings("ignore:Kernel toy.scaled was quarantined")
def test_an_explicit_choice_that_fails_raises(entry: Entry) -> None:
    """The user asked for this kernel: the reference does not take its place."""

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    with toy_library("scaled", kernel), using(Policy(choose={"scaled": TOY})):
        for _ in range(2):
            with pytest.raises(KernelError, match=r"scaled=toy was chosen explicitly.*(failed its proof|quarantined)"):
                entry(torch.ones(2))


def test_without_proofs_nothing_is_compared(entry: Entry) -> None:
    """proof=off is the user's word."""

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    with toy_library("scaled", kernel), using(Policy(order=(TOY,), proof=Proof(at_first_use=False))):
        assert entry(torch.ones(2)).tolist() == [3.0, 3.0]


@pytest.mark.filterwarnings("ignore:Kernel toy.scaled was quarantined")
def test_samples_catch_what_breaks_later(entry: Entry) -> None:
    """sample:N proves again at each N-th call: a kernel that returns a stale buffer is caught there at the latest."""
    _stale.clear()
    count = 0

    def kernel(x: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return x * 2 if count < 8 else x * 2.5

    with toy_library("scaled", kernel), using(Policy(order=(TOY,), proof=Proof(every=4))):
        found = [float(entry(torch.ones(2))[0]) for _ in range(20)]
        assert found[-8:] == [2.0] * 8
        assert "calls" in receipt()[-1]
        assert TOY in dispatchers["scaled"].quarantine


@pytest.mark.filterwarnings("ignore:Kernel toy.scaled was quarantined")
@pytest.mark.parametrize(
    "wrong_for",
    [
        lambda x: x.dtype == torch.bfloat16,
        lambda x: x.shape[-1] % 2 == 1,
        lambda x: x.shape[0] > 512,
        lambda x: not x.is_contiguous(),
        lambda x: x.dim() == 3,
    ],
    ids=["bfloat16", "odd rows", "many rows", "strides", "three axes"],
)
def test_a_kernel_that_is_wrong_only_sometimes(entry: Entry, wrong_for: Callable[[torch.Tensor], bool]) -> None:
    """A new dtype, row length, size class, memory layout or number of axes is proved anew."""

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x * (2.1 if wrong_for(x) else 2.0)

    calls = [
        torch.randn(4, 6),
        torch.randn(4, 6).bfloat16(),
        torch.randn(4, 7),
        torch.randn(1000, 6),
        torch.randn(6, 4).t(),
        torch.randn(2, 4, 6),
    ]
    with toy_library("scaled", kernel), using(POLICY):
        assert torch.equal(entry(calls[0]), scaled(calls[0]))
        assert dispatchers["scaled"].quarantine == {}
        for x in calls:
            assert torch.equal(entry(x), scaled(x))
        assert TOY in dispatchers["scaled"].quarantine


def test_sizes_in_a_class_share_a_proof(entry: Entry) -> None:
    """Lengths of one power of two are proved once: a script with many lengths does not prove for ever."""
    with toy_library("scaled", lambda x, bias=None, factor=2.0: scaled(x, bias, factor)), using(POLICY):
        for size in range(128, 256):
            entry(torch.ones(size, 3))
        assert len(dispatchers["scaled"].verdicts) == 2  # multiples of 16, and others


@pytest.mark.filterwarnings("ignore:Kernel toy.scaled was quarantined")
def test_the_case_is_saved(entry: Entry, tmp_path: Path) -> None:
    """The inputs of a failed proof are saved where the report goes, and can be run again."""

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    with toy_library("scaled", kernel), using(Policy(order=(TOY,), cases=str(tmp_path / "cases"))):
        x = torch.randn(3)
        entry(x)
    (path,) = (tmp_path / "cases").iterdir()
    case = torch.load(path)
    assert (case["op"], case["kernel"]) == ("scaled", "toy.scaled")
    assert torch.equal(case["arguments"]["x"], x)


def test_a_large_call_is_proved_on_a_part() -> None:
    """Above a size limit an op narrows its arguments; the verdict says so, and time and memory stay small."""
    sizes: list[int] = []

    def kernel(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.numel())
        return x * 2

    with toy_op(shrink=lambda arguments: arguments | {"x": arguments["x"][:8]}) as entry:
        with toy_library("scaled", kernel), using(POLICY):
            x = torch.ones(2**12, 2**9)
            entry(x)
            (binding,) = dispatchers["scaled"].bindings.values()
            assert binding.choice.verdict.is_partial
            assert sizes == [8 * 2**9, x.numel()]


def test_what_is_changed_in_place_is_compared() -> None:
    """For an op that mutates, the changed arguments are the results; the caller's are changed once."""

    def fill(x: torch.Tensor, value: float = 1.0) -> None:
        """x = value. Shapes: any. Dtypes: any. Source: this file."""
        x.fill_(value)

    from llm_adapt.ops.dispatch.registry import FusedOp, Kernel

    op = FusedOp(fill, lambda generator, dtype: iter([{"x": torch.zeros(2)}]), mutates=("x",))
    x = torch.zeros(3)
    copying = Kernel("fill", TOY, lambda x, value=1.0: x.copy_(torch.full_like(x, value)), "")
    adding = Kernel("fill", TOY, lambda x, value=1.0: x.add_(value / 2), "")
    right, wrong = (prove(op, kernel, {"x": x, "value": 2.0}) for kernel in (copying, adding))
    assert (right.holds, wrong.holds, wrong.reason) == (True, False, "x is wrong: 1 instead of 2 at [0]")
    assert x.tolist() == [0.0] * 3


def test_random_ops_are_proved_without_chance() -> None:
    """The option that says how much is random is 0 in a proof."""
    seen: list[float] = []

    def kernel(x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
        seen.append(factor)
        return x * factor

    with toy_op(random="factor") as entry, toy_library("scaled", kernel), using(POLICY):
        entry(torch.ones(2))
    assert seen == [0.0, 2.0]


def test_integers_are_compared_exactly() -> None:
    """Indices have no tolerance."""
    with toy_op():
        op = dispatchers["scaled"].op
        a, b = {"output": torch.tensor([1, 2])}, {"output": torch.tensor([1, 3])}
        assert compare(op, a, a).holds
        assert not compare(op, a, b).holds


def test_infinities_and_nan_must_be_where_the_reference_has_them() -> None:
    """-inf agrees with -inf alone, nan with nan alone."""
    with toy_op():
        op = dispatchers["scaled"].op

        def holds(found: float, wanted: float) -> bool:
            return compare(op, {"output": torch.tensor([found, 1.0])}, {"output": torch.tensor([wanted, 1.0])}).holds

        assert holds(-math.inf, -math.inf)
        assert holds(math.nan, math.nan)
        assert not holds(math.inf, -math.inf)
        assert not holds(math.nan, math.inf)
        assert not holds(0.0, -math.inf)
        assert not holds(math.nan, 0.0)


def test_a_tolerance_is_relative_to_the_tensor() -> None:
    """Small elements may be off by as much as the tensor's size allows: sums that cancel cannot be exact."""
    with toy_op(tolerance=Tolerance({torch.float32: 1e-3}, backward_factor=3.0)):
        op = dispatchers["scaled"].op
        wanted = torch.tensor([1.0, 1.0, 0.0])

        def error(change: float, name: str = "output") -> float:
            return compare(op, {name: wanted + torch.tensor([0, 0, change])}, {name: wanted}).errors[name]

        rms = math.sqrt(2 / 3)
        assert error(rms * 1e-3) == pytest.approx(1.0, rel=1e-3)
        assert error(rms * 1e-3, "gradient of x") == pytest.approx(1 / 3, rel=1e-3)


def test_gradients_of_what_the_kernel_does_not_take_are_not_asked() -> None:
    """run_op gives outputs and gradients by name."""
    with toy_op():
        op = dispatchers["scaled"].op
        x, bias = torch.ones(2, 3), torch.ones(3)
        found = run_op(op, scaled, op.bind(x=x, bias=bias))
        assert list(found) == ["output", "gradient of x", "gradient of bias"]
        assert not x.requires_grad


def test_the_report_has_the_receipt(tmp_path: Path) -> None:
    """patch() writes who served what into the report, with counts, refusals and the errors of proofs."""
    import json

    from llm_adapt.ops.rms_norm import rms_norm

    with llm_adapt.patched(device="cpu", out=tmp_path, ops="order=torch_native") as report:
        for _ in range(3):
            rms_norm(torch.ones(2, 4), torch.ones(4))
        assert [line.choice for line in report.lines if line.section == "op"] == ["torch_native"]
    (row,) = json.loads((tmp_path / "report.json").read_text())["ops"]
    assert (row["op"], row["library"], row["dtype"], row["calls"]) == ("rms_norm", "torch_native", "float32", 3)
    assert set(row["proof"]) == {"output", "gradient of x", "gradient of weight"}
    assert receipt() == []


def test_a_wide_result_may_carry_a_narrow_rounding() -> None:
    """With 16-bit inputs a float32 result is as exact as 16 bits are."""
    with toy_op():
        op = dispatchers["scaled"].op
        wanted = {"output": torch.ones(4)}
        found = {"output": torch.ones(4) + 2.0**-8}
        assert not compare(op, found, wanted).holds
        assert compare(op, found, wanted, {torch.float32, torch.bfloat16}).holds


def test_a_gradient_that_the_op_does_not_promise_is_not_lost() -> None:
    """A tensor outside `differentiable` that needs a gradient gets it from the reference."""
    with (
        toy_op(differentiable=("x",)) as entry,
        toy_library("scaled", lambda x, bias=None, factor=2.0: x * factor + bias),
    ):
        with using(POLICY):
            x, bias = torch.ones(2, 3, requires_grad=True), torch.ones(3, requires_grad=True)
            entry(x, bias.detach())
            entry(x, bias).sum().backward()
            first, second = dispatchers["scaled"].bindings.values()
            assert (first.choice.library, second.choice.library) == (TOY, "reference")
            assert second.choice.refusals == {TOY: "gives no gradient of bias, which the reference does"}
            assert bias.grad is not None


def test_sizes_that_do_not_fit_are_an_error_after_a_proof_too() -> None:
    """A call of the same size class whose tensors do not fit each other reaches the reference, which refuses it."""
    from llm_adapt.ops.add_rms_norm import add_rms_norm

    with using(Policy(order=("torch_native",))):
        add_rms_norm(torch.ones(300, 8), torch.ones(300, 8))
        with pytest.raises(ValueError, match="pass equal shapes"):
            add_rms_norm(torch.ones(300, 8), torch.ones(301, 8))
