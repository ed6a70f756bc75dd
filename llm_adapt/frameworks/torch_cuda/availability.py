"""Who is told that CUDA is available.

A script, or a library that knows only CUDA, is told yes: that is what makes it run. A library that knows the
device natively is told the truth, or it takes its CUDA path on an NPU. One rule decides, by the top-level
package of the module that asks; the packages are data (native_libraries.json).
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from importlib import resources

import torch

__all__ = ["availability", "native_packages"]


def native_packages(device_type: str) -> frozenset[str]:
    """Packages that are told the truth on this device type."""
    text = resources.files(__package__).joinpath("native_libraries.json").read_text(encoding="utf-8")
    table = json.loads(text)
    return frozenset(name for name, devices in table.items() if name[0] != "_" and device_type in devices)


def availability(
    device_type: str, count: Callable[[], int], real_is_available: Callable[[], bool], real_count: Callable[[], int]
) -> dict[str, Callable[[], object]]:
    """`torch.cuda.is_available` and `device_count` for this device.

    Args:
        device_type: torch device type of the device that stands for CUDA.
        count: how many of it there are.
        real_is_available: torch's own answer, for native packages.
        real_count: torch's own count, for native packages.
    """
    native = native_packages(device_type)

    @functools.lru_cache(maxsize=4096)
    def knows_device(module_name: str) -> bool:
        return module_name.partition(".")[0] in native

    def is_available() -> bool:
        """True for code that knows only CUDA; torch's own answer for code that knows this device."""
        if torch.compiler.is_compiling():  # dynamo cannot trace frames, and compiled code is the user's
            return True
        if knows_device(sys._getframe(1).f_globals.get("__name__", "")):
            return real_is_available()
        return True

    def device_count() -> int:
        """Number of devices; torch's own answer for code that knows this device."""
        if not torch.compiler.is_compiling() and knows_device(sys._getframe(1).f_globals.get("__name__", "")):
            return real_count()
        return count()

    return {"is_available": is_available, "device_count": device_count}
