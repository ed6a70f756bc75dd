"""Probe: a few lines of CUDA code and the outcome they have on CUDA."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Probe", "Raises", "group"]


@dataclass(frozen=True)
class Raises:
    """An exception as the expected outcome; `Exception` for any, where all that matters is that nothing is faked."""

    kind: str = "Exception"

    def __repr__(self) -> str:
        return "an exception" if self.kind == "Exception" else self.kind


@dataclass(frozen=True, eq=False)
class Probe:
    """One thing that CUDA scripts do.

    Attributes:
        group: room of the API.
        code: Python; the value of its last line is the outcome.
        expected: that value on CUDA, or what is raised.
        before: code that runs before CUDA is patched.
        limit: why this cannot be had without CUDA, where that is so.
    """

    group: str
    code: str
    expected: Any = True
    before: str = ""
    limit: str = ""

    @property
    def title(self) -> str:
        """The code on one line."""
        lines = [f"(before) {line}" for line in self.before.splitlines()] + self.code.strip().splitlines()
        return "; ".join(line.rstrip() for line in lines)

    def agrees(self, value: Any) -> bool:
        """Whether this value is the expected outcome: the same type too, so that 1 is not True."""
        return type(value) is type(self.expected) and bool(value == self.expected)

    def raises(self, kinds: set[str]) -> bool:
        """Whether an exception of a class with these bases is the expected outcome."""
        return isinstance(self.expected, Raises) and self.expected.kind in kinds

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "expected": repr(self.expected)}


def group(name: str, *rows: tuple[Any, ...]) -> list[Probe]:
    """Probes of one group from rows (code[, expected[, limit]])."""
    return [Probe(name, row[0], *row[1:2], limit=row[2] if len(row) > 2 else "") for row in rows]
