"""torch.accelerator on the CPU, which torch does not call an accelerator.

Newer CUDA scripts use it beside torch.cuda, often without asking whether there is one. They get the answers that
torch.cuda gives; the accelerator itself is torch.device("cpu"), the device of the tensors. torch, and libraries
that know the CPU, are told the truth (availability.py). Vendors bring a torch.accelerator of their own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from llm_adapt.frameworks.torch_cuda import host
from llm_adapt.frameworks.torch_cuda.availability import IsTold
from llm_adapt.frameworks.torch_cuda.devices import REAL_DEVICE, DeviceTranslator
from llm_adapt.patching import Patch, Row
from llm_adapt.report import Report

__all__ = ["rows"]

# Name in torch.accelerator -> name in torch.cuda, where they differ.
_TWINS = {
    **dict.fromkeys(("current_device_index", "current_device_idx"), "current_device"),
    **dict.fromkeys(("set_device_index", "set_device_idx"), "set_device"),
    **{"device_index": "device", "get_memory_info": "mem_get_info", "empty_host_cache": "empty_cache"},
}
_SAME = (
    *("current_stream", "set_stream", "synchronize", "empty_cache", "memory_stats", "memory_allocated"),
    *("max_memory_allocated", "memory_reserved", "max_memory_reserved", "reset_accumulated_memory_stats"),
    "reset_peak_memory_stats",
)


def rows(translate: DeviceTranslator, report: Report, is_told: IsTold) -> list[Row]:
    """Rows for every function of torch.accelerator that needs an accelerator; none on a vendor's device."""
    module = getattr(torch, "accelerator", None)  # torch 2.6 on
    if module is None or not translate.is_host:
        return []
    return [
        Patch(f"torch.accelerator:{name}", functools.partial(_told, own=own, is_told=is_told), "as torch.cuda", "wrap")
        for name, own in _own(translate, report).items()
        if hasattr(module, name)
    ]


def _own(translate: DeviceTranslator, report: Report) -> Mapping[str, Callable[..., Any]]:
    cuda = host.functions(translate, report)
    return {
        "is_available": lambda: True,
        "device_count": lambda: translate.count,
        "current_accelerator": lambda check_available=False: REAL_DEVICE(translate.target),
        **{name: cuda[name] for name in _SAME},
        **{name: cuda[twin] for name, twin in _TWINS.items()},
    }


def _told(original: Callable[..., Any], own: Callable[..., Any], is_told: IsTold) -> Callable[..., Any]:
    """Our answer for code that knows only CUDA; torch's own for code that knows the CPU."""

    @functools.wraps(original, updated=())  # a class among them has attributes that a function cannot take
    def answer(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or is_told(sys._getframe(1).f_globals.get("__name__", "")):
            return own(*args, **kwargs)
        return original(*args, **kwargs)

    return answer
