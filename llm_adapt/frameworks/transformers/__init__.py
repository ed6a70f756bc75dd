"""transformers: attention, norms, rotaries, MLPs, experts and losses reach the operators.

No list of models: what has an interface of its own is registered there, and what every model file writes anew is
recognised by its numbers when that file is imported (probe.py). What is not recognised stays as it is, and is listed.
"""

from __future__ import annotations

import importlib

from llm_adapt.frameworks.context import Context
from llm_adapt.patching import PlanItem

__all__ = ["MODEL_FILES", "NOT_TRIED", "VERSIONS", "rows"]

VERSIONS = "transformers 5.23 and 5.24"

# Where models are defined: the package's own, and remote code.
MODEL_FILES = ("transformers.models.*.modeling_*", "transformers_modules.*")

NOT_TRIED = "the call has dtypes, sizes or settings that the class or function was not tried for"  # for the report

_TABLES = ("attention", "norms", "rotary", "mlps", "experts", "losses")


def rows(context: Context) -> list[PlanItem]:
    """All rows for transformers; none with ops="off"."""
    if not context.serves_operators:
        return []
    return [row for table in _TABLES for row in importlib.import_module(f"{__name__}.{table}").rows(context)]
