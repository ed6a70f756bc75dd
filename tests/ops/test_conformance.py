"""What holds for every op and every kernel; a new file in llm_adapt/ops is tested here without another line."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_adapt.ops.dispatch.choice import refusal
from llm_adapt.ops.dispatch.dispatcher import dispatchers
from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy
from llm_adapt.ops.dispatch.proof import compare, differentiable, float_dtypes, named_tensors, prove, run_op
from llm_adapt.ops.dispatch.registry import FusedOp, all_ops
from tests.ops.cases import Case, cases, has_backward, host_kernels

ALL = list(cases())
OPS = [op for op in all_ops().values() if op.reference.__module__.startswith("llm_adapt.ops.")]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_an_op_is_specified(op: FusedOp) -> None:
    """An op says formula, shapes, dtypes and source, and its inputs use every option and every optional tensor."""
    text = op.reference.__doc__ or ""
    assert [part for part in ("Shapes:", "Dtypes:", "Source:") if part not in text] == []
    seen: dict[str, set[Any]] = {name: set() for name in op.signature.parameters}
    for case in (case for case in ALL if case.op is op):
        for name, value in case.arguments.items():
            seen[name].add(str(type(value)) if isinstance(value, (torch.Tensor, list)) else repr(value))
    constant = [name for name, values in seen.items() if len(values) < 2 and name in op.defaults]
    assert constant == [], "the inputs never change these"


@pytest.mark.parametrize("case", ALL, ids=str)
def test_the_reference_in_a_dtype_is_the_one_in_float64(case: Case) -> None:
    """The reference computed in the dtype agrees with itself in float64, so a tolerance leaves room for it."""
    found = run_op(case.op, case.op.reference, case.arguments)
    expected = run_op(case.op, case.op.reference, case.arguments, oracle=case.op.oracle)
    verdict = compare(case.op, found, expected, float_dtypes(case.arguments))
    assert verdict.holds, verdict.reason


@pytest.mark.parametrize("case", [case for case in ALL if case.dtype == torch.float32], ids=str)
def test_gradients_are_derivatives(case: Case) -> None:
    """gradcheck in float64: the reference's gradients are the derivatives of its outputs."""
    if not has_backward(case.op) or case.op.oracle is None:
        pytest.skip("no gradient flows through this op")
    doubles = {name: _double(value) for name, value in case.arguments.items()}
    wanted = [tensor for _, tensor in differentiable(case.op, doubles)]
    for tensor in wanted:
        tensor.requires_grad_()

    def outputs(*_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = named_tensors("", case.op.reference(**doubles))
        return tuple(value for _, value in found if value.is_floating_point() and value.requires_grad)

    assert torch.autograd.gradcheck(outputs, tuple(wanted), fast_mode=True, atol=1e-5, rtol=1e-4)


def _double(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_double(item) for item in value)
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_float else value


@pytest.mark.parametrize("case", ALL, ids=str)
def test_kernels_that_do_not_refuse_are_right(case: Case) -> None:
    """Every kernel that runs here and does not refuse the call gives the reference's results and gradients."""
    for kernel in host_kernels(case.op):
        if refusal(case.op, kernel, case.call):
            continue
        verdict = prove(case.op, kernel, case.arguments)
        assert verdict.holds, f"{kernel.name}: {verdict.reason}"


# The compiler takes seconds a call: of each op the first two calls, and all of them among the slow tests.
COMPILED = [
    pytest.param(case, marks=[pytest.mark.slow] if case.number > 1 else [], id=str(case))
    for case in ALL
    if case.dtype == torch.float32
]


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_calls_are_whole_graphs(case: Case) -> None:
    """torch.compile(fullgraph=True) traces the op, and computes what eager code does."""
    if case.op.random and case.arguments[case.op.random]:
        pytest.skip("draws random numbers")
    entry = dispatchers[case.op.name].entry
    with using(Policy(order=("torch_native",))):
        torch._dynamo.reset()
        compiled = torch.compile(lambda **kw: entry(**kw), fullgraph=True, backend="aot_eager")
        found = run_op(case.op, compiled, case.arguments)
        expected = run_op(case.op, entry, case.arguments)
    verdict = compare(case.op, found, expected)
    assert found.keys() == expected.keys()
    assert verdict.holds, verdict.reason
