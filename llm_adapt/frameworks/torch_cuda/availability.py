"""Who is told that CUDA is here.

A script, or a library that knows only CUDA, is told yes: that is what makes it run. A library that knows the
device natively, and torch itself, is told the truth, or it takes its CUDA path on an NPU. One rule decides for
every such question (is_available, device_count, get_device_properties, is_nccl_available, Tensor.is_cuda,
Tensor.type(), Tensor.get_device), by the top-level package of the module that asks; the packages are data
(native_libraries.json).
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from importlib import resources
from typing import Any

import torch

__all__ = ["IsTold", "availability", "is_told_on", "native_packages", "properties"]

IsTold = Callable[[str], bool]


def native_packages(device_type: str) -> frozenset[str]:
    """Packages that are told the truth on this device type."""
    text = resources.files(__package__).joinpath("native_libraries.json").read_text(encoding="utf-8")
    table = json.loads(text)
    return frozenset(name for name, devices in table.items() if name[0] != "_" and device_type in devices)


def is_told_on(device_type: str) -> IsTold:
    """The rule: module name -> whether that code is told that this device type is CUDA."""
    native = native_packages(device_type)

    @functools.lru_cache(maxsize=4096)
    def is_told(module_name: str) -> bool:
        return module_name.partition(".")[0] not in native

    return is_told


def availability(
    is_told: IsTold,
    count: Callable[[], int],
    real_is_available: Callable[[], bool],
    real_count: Callable[[], int],
) -> dict[str, Callable[[], object]]:
    """`torch.cuda.is_available` and `device_count` for this device.

    Args:
        is_told: who gets these answers instead of torch's own.
        count: how many devices there are.
        real_is_available: torch's own answer.
        real_count: torch's own count.
    """

    def is_available() -> bool:
        """True for code that knows only CUDA; torch's own answer for code that knows this device."""
        if torch.compiler.is_dynamo_compiling():  # dynamo cannot trace frames, and compiled code is the user's
            return True
        return is_told(sys._getframe(1).f_globals.get("__name__", "")) or real_is_available()

    def device_count() -> int:
        """Number of devices; torch's own answer for code that knows this device."""
        if torch.compiler.is_dynamo_compiling() or is_told(sys._getframe(1).f_globals.get("__name__", "")):
            return count()
        return real_count()

    return {"is_available": is_available, "device_count": device_count}


def properties(is_told: IsTold, own: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.cuda.get_device_properties` for this device.

    torch's inductor asks without asking is_available first, and takes an answer without a version of CUDA for
    that of an AMD card. What torch's own function raises is what it expects to catch.

    Args:
        is_told: who gets `own` instead of torch's own answer.
        own: properties of this device.
        real: torch's own function.
    """

    def get_device_properties(device: Any = None) -> Any:
        """Name, capability, memory and processor count; torch's own answer for code that knows this device."""
        if torch.compiler.is_dynamo_compiling() or is_told(sys._getframe(1).f_globals.get("__name__", "")):
            return own(device)
        return real(device)

    return get_device_properties
