"""Kernels that torch.compile makes of references: right, opt-in, and compiled once a kind."""

from __future__ import annotations

import shutil

import pytest
import torch

import llm_adapt
from llm_adapt.ops import using
from llm_adapt.ops.dispatch.choice import refusal
from llm_adapt.ops.dispatch.dispatcher import dispatchers
from llm_adapt.ops.dispatch.proof import prove
from llm_adapt.ops.dispatch.registry import load_library
from llm_adapt.ops.rms_norm import rms_norm
from tests.ops.cases import Case, cases

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on the CPU")


def test_it_serves_where_it_is_asked_for() -> None:
    """rms_norm=inductor gives the reference's output and gradients; without being asked it serves nowhere."""
    x, weight = torch.randn(4, 64, requires_grad=True), torch.rand(64, requires_grad=True)
    with llm_adapt.patched(device="cpu"):
        rms_norm(x, weight)
        with using("rms_norm=inductor"):
            found = torch.autograd.grad(rms_norm(x, weight).sum(), (x, weight))
        served = [binding.choice.library for binding in dispatchers["rms_norm"].bindings.values()]
    expected = torch.autograd.grad(rms_norm(x, weight).sum(), (x, weight))
    assert served == ["openmp", "inductor"]
    torch.testing.assert_close(found, expected)


def test_many_kinds_of_calls_are_served() -> None:
    """Beyond the number of kinds that torch compiles, it goes on without compiling: no call fails."""
    torch._dynamo.reset()
    with using("rms_norm=inductor", proof="off"), torch._dynamo.config.patch(recompile_limit=2):
        for eps in (1e-3, 1e-4, 1e-5, 1e-6):
            x = torch.randn(3, 16)
            torch.testing.assert_close(rms_norm(x, eps=eps), rms_norm.op.reference(x, eps=eps))  # type: ignore[attr-defined]


assert load_library("inductor") == ""
CASES = [case for case in cases((torch.float32,)) if "inductor" in case.op.kernels]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_holds_its_proof(case: Case) -> None:
    """Each of the op's own inputs is refused with a reason, or proved."""
    torch._dynamo.reset()
    kernel = case.op.kernels["inductor"]
    if not refusal(case.op, kernel, case.call):
        verdict = prove(case.op, kernel, case.arguments)
        assert verdict.holds, verdict.reason
