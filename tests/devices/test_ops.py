"""Every op on the device that the tests run on: which kernel library serves which call, and that it is right there.

pytest tests/devices --simulate npu --evidence docs/evidence/ops_npu.json     writes what was found
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_adapt.adapters import adapters
from llm_adapt.ops.dispatch.proof import compare, float_dtypes, prove, run_op
from llm_adapt.ops.dispatch.registry import load_library
from tests.contracts.kernels import CASES, why_not
from tests.devices.evidence import Evidence
from tests.ops.cases import Case

pytestmark = pytest.mark.every_device


def moved(value: Any, device: str) -> Any:
    """The arguments of a case on the device."""
    if isinstance(value, dict):
        return {name: moved(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device) for item in value)
    return value.to(device) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value


@pytest.fixture(scope="module")
def libraries(adapter_name: str) -> list[str]:
    """Kernel libraries that load here, in the device's order."""
    return [name for name in adapters()[adapter_name].kernel_libraries if load_library(name) == ""]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_op_is_served_rightly(case: Case, device: str, libraries: list[str], evidence: Evidence) -> None:
    """Each kernel that does not refuse the call gives the float64 results and gradients, and so does the reference."""
    here = case._replace(arguments=moved(case.arguments, device))
    wrong = {}
    for library in libraries:
        kernel = case.op.kernels.get(library)
        if kernel is None:
            continue
        reason = why_not(kernel, here)
        if reason:
            evidence.add(case, library, "refused", reason)
            continue
        verdict = prove(case.op, kernel, here.arguments)
        evidence.add(case, library, "right" if verdict.holds else "wrong", verdict.reason, verdict.errors)
        if not verdict.holds:
            wrong[library] = verdict.reason
    found = run_op(case.op, case.op.reference, here.arguments)
    expected = run_op(case.op, case.op.reference, case.arguments, oracle=case.op.oracle)
    plain = compare(case.op, found, expected, float_dtypes(case.arguments))
    evidence.add(case, "reference", "right" if plain.holds else "wrong", plain.reason, plain.errors)
    assert wrong == {}
    assert plain.holds, plain.reason
