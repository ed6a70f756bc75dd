"""torch._C._nvtx: ranges and marks for a profiler. There is none here, so that only their nesting is kept."""

from __future__ import annotations

import itertools
import threading
from types import ModuleType

from llm_adapt.simulators.dcu.missing import function_that_raises

__all__ = ["nvtx_module"]


class _Ranges(threading.local):
    """How many ranges are open in a thread."""

    depth = 0


def nvtx_module() -> ModuleType:
    """The module, on ROCm over roctx."""
    module, ranges, numbers = ModuleType("torch._C._nvtx"), _Ranges(), itertools.count(1)

    def push(message: str) -> int:
        ranges.depth += 1
        return ranges.depth - 1

    def pop() -> int:
        ranges.depth = max(ranges.depth - 1, -1)
        return ranges.depth

    names = {
        "rangePushA": push,
        "rangePop": pop,
        "rangeStartA": lambda message: next(numbers),
        "rangeEnd": lambda number: None,
        "markA": lambda message: None,
    }
    for name in ("deviceRangeStart", "deviceRangeEnd"):
        names[name] = function_that_raises(name, f"torch.cuda.nvtx.{name}")
    for name, function in names.items():
        setattr(module, name, function)
    return module
