"""The form of a row of this table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from llm_adapt.frameworks.context import Context
from llm_adapt.patching import Patch

__all__ = ["VERSIONS", "seam", "telling"]

VERSIONS = "megatron-core 0.12 to 0.19"


def telling(
    context: Context, target: str, new: Callable[[Callable[..., Any], Callable[[], None]], Any]
) -> Callable[[Callable[..., Any]], Any]:
    """A wrapper of an original that may hand calls to it, and says so in the report at the first one."""
    name = target.rpartition(":")[2]
    reason = "the operator does not compute this call; docs/frameworks.md lists what stays"
    told = context.teller(f"megatron {name}", "Megatron's own", reason)
    return lambda original: new(original, told)


def seam(
    target: str,
    new: Any,
    reason: str,
    kind: Literal["replace", "wrap", "add"] = "wrap",
    bodies: Mapping[str, str] | None = None,
) -> Patch:
    """A row: a target that a version lacks, and a body that was not read, are reported skips.

    Args:
        bodies: versions -> fingerprint of the body that was read there; none for a row that calls the original.
    """
    return Patch(target, new, reason, kind=kind, optional=True, versions=VERSIONS, fingerprints=bodies or {})
