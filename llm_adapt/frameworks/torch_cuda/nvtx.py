"""torch.cuda.nvtx: the vendor's ranges where it has them, else accepted, noted once, without effect."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llm_adapt.frameworks.torch_cuda import vendor
from llm_adapt.frameworks.torch_cuda.devices import DeviceTranslator
from llm_adapt.patching import Patch, Row
from llm_adapt.report import Report

__all__ = ["rows"]

_WHY = "there is no NVIDIA profiler to show ranges; torch.profiler.record_function works everywhere"


def rows(translate: DeviceTranslator, report: Report) -> list[Row]:
    """Rows for marks and ranges; torch.cuda.nvtx.range and emit_nvtx call these by name."""
    table = _without_effect(report)
    if not translate.is_host:
        table.update(vendor.ranges(translate))
    found: list[Row] = [Patch(f"torch.cuda.nvtx:{name}", new, "ranges") for name, new in table.items()]
    emit = functools.partial(_emit_nvtx, report=report)
    return [*found, Patch("torch.autograd.profiler:emit_nvtx.__init__", emit, "ranges of every op", kind="wrap")]


def _emit_nvtx(original: Callable[..., None], report: Report) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, enabled: bool = True, record_shapes: bool = False) -> None:
        if enabled:
            report.once("torch.autograd.profiler.emit_nvtx", "no effect", _WHY)
        original(self, False, record_shapes)

    return init


def _without_effect(report: Report) -> dict[str, Any]:
    depth = [0]

    def range_push(msg: str) -> int:
        """Depth of the new range."""
        report.once("torch.cuda.nvtx", "no effect", _WHY)
        depth[0] += 1
        return depth[0] - 1

    def range_pop() -> int:
        """Depth of the range that ends."""
        depth[0] = max(0, depth[0] - 1)
        return depth[0]

    def range_start(msg: str) -> int:
        """A number for range_end."""
        report.once("torch.cuda.nvtx", "no effect", _WHY)
        return 0

    def range_end(range_id: int) -> None:
        """Nothing was started."""

    def mark(msg: str) -> None:
        """Nothing shows it."""
        report.once("torch.cuda.nvtx", "no effect", _WHY)

    return {
        "range_push": range_push,
        "range_pop": range_pop,
        "range_start": range_start,
        "range_end": range_end,
        "mark": mark,
    }
