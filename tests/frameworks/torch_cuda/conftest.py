"""The facade on the CPU with two ordinals, for tests that ask for it: pytestmark = usefixtures("facade")."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import llm_adapt
from llm_adapt.report import Report


@pytest.fixture
def facade() -> Iterator[Report]:
    """CUDA is the CPU inside the test, and nothing else is patched; torch's defaults are as before after it."""
    state = torch.get_rng_state()
    with llm_adapt.patched(device="cpu", cpu_devices=2, ops="off") as report:
        yield report
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    torch.set_rng_state(state)


@pytest.fixture
def noted(facade: Report) -> Callable[[], list[str]]:
    """Subjects of what the report noted as having no effect, or another effect, so far."""
    return lambda: [line.subject for line in facade.lines if line.section == "effect"]


def called_from(module: str, expression: str, **names: Any) -> Any:
    """Evaluate an expression as code of another module would."""
    return eval(expression, {"__name__": module, "torch": torch, **names})


@pytest.fixture
def as_module() -> Callable[..., Any]:
    """`as_module("accelerate.state", "torch.cuda.is_available()")`: ask as that module."""
    return called_from
