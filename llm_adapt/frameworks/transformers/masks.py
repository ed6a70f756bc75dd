"""The masks of attention functions that transformers looks up by name.

A name without an entry gets no mask at all, and padding is then seen without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.transformers.flash_loader import HUB_NAMES, serves_flash
from llm_adapt.patching import Entry, PlanItem, Survey

__all__ = ["rows"]


def rows(context: Context) -> list[PlanItem]:
    """The mask of "flash_attention_2", under the names that hub kernels have."""
    if not serves_flash(context):
        return []
    return [Survey(("transformers.masking_utils",), _names, "masks of the names of flash-attention on the hub")]


def _names(module: ModuleType) -> Iterator[Entry]:
    functions = module.AttentionMaskInterface._global_mapping
    for name in HUB_NAMES:
        yield Entry(
            f"{module.__name__}:AttentionMaskInterface._global_mapping",
            functions["flash_attention_2"],
            "without an entry its mask would be left out",
            key=name,
        )
