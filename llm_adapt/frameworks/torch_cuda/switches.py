"""torch.backends.cuda: the switches that raise without CUDA are accepted, and noted once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llm_adapt.patching import Patch, Row
from llm_adapt.report import Report

__all__ = ["rows"]

_WHY = "it chooses among CUDA's libraries"


def rows(report: Report) -> list[Row]:
    """Rows for the choice of a CUDA library and for cuFFT's cache; all other switches work on every torch."""
    prefer = functools.partial(_prefer, report=report)
    return [
        Patch("torch.backends.cuda:preferred_linalg_library", prefer, _WHY, kind="wrap"),
        Patch("torch.backends.cuda:preferred_blas_library", prefer, _WHY, kind="wrap"),
        Patch("torch.backends.cuda:cufft_plan_cache", _PlanCache(report), "there is no cuFFT", rebind=False),
    ]


def _prefer(original: Callable[..., Any], report: Report) -> Callable[..., Any]:
    @functools.wraps(original)
    def preferred_library(backend: Any = None) -> Any:
        """What is in force; a choice is noted and has no effect."""
        if backend is not None:
            report.once(f"torch.backends.cuda.{original.__name__}", "no effect", _WHY)
        return original()

    return preferred_library


class _PlanCache:
    """A cache of cuFFT plans, which stays empty; torch has one per device, indexed by ordinal."""

    def __init__(self, report: Report) -> None:
        self._report, self._max_size, self.size = report, 0, 0

    @property
    def max_size(self) -> int:
        """As set; cuFFT is not used."""
        return self._max_size

    @max_size.setter
    def max_size(self, value: int) -> None:
        self._report.once("torch.backends.cuda.cufft_plan_cache", "no effect", "there is no cuFFT")
        self._max_size = value

    def clear(self) -> None:
        """It is empty."""

    def __getitem__(self, device: Any) -> _PlanCache:
        return self
