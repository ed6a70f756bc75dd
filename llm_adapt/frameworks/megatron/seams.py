"""The form of a row of this table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from llm_adapt.patching import Patch

__all__ = ["VERSIONS", "seam"]

VERSIONS = "megatron-core 0.12 to 0.19"


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
