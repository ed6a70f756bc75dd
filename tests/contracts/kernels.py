"""The check that all kernel libraries share: a reasoned refusal, or the reference's results and gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from llm_adapt.ops.dispatch.choice import refusal
from llm_adapt.ops.dispatch.proof import prove
from llm_adapt.ops.dispatch.registry import Kernel
from tests.contracts.more_cases import more_cases
from tests.ops.cases import Case, cases

__all__ = ["CASES", "cases_of", "served", "why_not"]

DTYPES = (torch.float32, torch.bfloat16)
CASES = [*cases(DTYPES), *more_cases(DTYPES)]


def cases_of(names: Iterable[str]) -> list[Case]:
    """The cases of these ops."""
    wanted = set(names)
    return [case for case in CASES if case.op.name in wanted]


def why_not(kernel: Kernel, case: Case, **state: bool) -> str:
    """Why a kernel does not serve a case; "" when it does."""
    state.setdefault("is_inference", kernel.inference_only)
    return refusal(case.op, kernel, dataclasses.replace(case.call, **state))


def served(kernel: Kernel, case: Case) -> bool:
    """Whether the kernel serves a case; then it must be right.

    Raises:
        AssertionError: it serves and is wrong.
    """
    if why_not(kernel, case):
        return False
    verdict = prove(case.op, kernel, case.arguments)
    assert verdict.holds, f"{kernel.name} on {case}: {verdict.reason}"
    return True
