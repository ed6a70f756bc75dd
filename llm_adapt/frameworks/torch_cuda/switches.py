"""torch.backends.cuda: the switches that raise or do harm without CUDA are accepted, and noted once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from llm_adapt.patching import Patch, Row
from llm_adapt.report import Report

__all__ = ["rows"]

_WHY = "it chooses among CUDA's libraries"
_MATH = "of CUDA's attention kernels the CPU has one, for some cases; without the math kernel the others would raise"


def rows(report: Report, is_host: bool) -> list[Row]:
    """Rows for the choice of a CUDA library or attention kernel and for cuFFT's cache.

    All other switches work on every torch.
    """
    prefer = functools.partial(_prefer, report=report)
    attention = [
        Patch("torch.nn.attention:_sdpa_kernel", functools.partial(_sdpa_kernel, report=report), _MATH, kind="wrap"),
        Patch("torch.backends.cuda:enable_math_sdp", functools.partial(_math, report=report), _MATH, kind="wrap"),
    ]
    return [
        *(attention if is_host else []),
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


def _sdpa_kernel(original: Callable[..., None], report: Report) -> Callable[..., None]:
    """The act of torch.nn.attention.sdpa_kernel and torch.backends.cuda.sdp_kernel."""

    @functools.wraps(original)
    def sdpa_kernel(backends: Iterable[Any], set_priority: bool = False) -> None:
        from torch.nn.attention import SDPBackend

        asked = list(backends)
        if SDPBackend.MATH not in asked:
            report.once("attention without the math kernel", "kept", _MATH)
            asked.append(SDPBackend.MATH)
        original(asked, set_priority)

    return sdpa_kernel


def _math(original: Callable[[bool], None], report: Report) -> Callable[[bool], None]:
    @functools.wraps(original)
    def enable_math_sdp(enabled: bool) -> None:
        if not enabled:
            report.once("attention without the math kernel", "kept", _MATH)
        original(True)

    return enable_math_sdp


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
