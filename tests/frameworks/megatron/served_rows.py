"""Rows of single tables in force inside a block, in a process that is patched with ops=off."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import llm_adapt
from llm_adapt import session
from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron import checkpoints, experts, moe, multi_tensor, optimizer
from llm_adapt.ops import using
from llm_adapt.patching import Plan
from llm_adapt.report import Report
from llm_adapt.settings import resolve

__all__ = ["REFERENCES", "TABLES", "served"]

TABLES = (moe, experts, optimizer, checkpoints, multi_tensor)
REFERENCES = "*=reference"  # every op serves, also where the CPU keeps Megatron's own function


@contextlib.contextmanager
def served(ops: str | None = None, tables: tuple[Any, ...] = TABLES) -> Iterator[Context]:
    """Apply the rows of these tables as patch(ops=...) does, and take them back."""
    held = {line.subject for line in session.report().lines if line.section == "patch"}
    assert held, "patch with ops=off first"
    settings = dataclasses.replace(resolve(device="cpu"), ops=ops)  # not the "off" of the environment
    context = Context(llm_adapt.current_adapter(), settings, Report())
    # Repairs that do not depend on ops are in force already.
    plan = Plan([row for table in tables for row in table.rows(context) if row.target not in held], strict=False)
    with using(ops) if ops else contextlib.nullcontext():
        plan.apply()
        try:
            yield context
        finally:
            assert plan.undo() == []
            wrong = [item for item in plan.outcomes() if item.status in ("skipped", "stale")]
    assert wrong == []
