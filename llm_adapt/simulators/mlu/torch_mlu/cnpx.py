"""torch.mlu.cnpx: marks for the profiler, the twin of torch.cuda.nvtx. Nothing records them here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["mark", "range", "range_pop", "range_push"]

_depth = 0


def range_push(msg: str) -> int:
    """Open a range; its depth, from 0."""
    global _depth
    _depth += 1
    return _depth - 1


def range_pop() -> int:
    """Close the innermost range; its depth."""
    global _depth
    _depth -= 1
    return _depth


def mark(msg: str) -> None:
    """Mark a moment."""


@contextmanager
def range(msg: str, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Context that is one range."""
    range_push(msg.format(*args, **kwargs))
    try:
        yield
    finally:
        range_pop()
