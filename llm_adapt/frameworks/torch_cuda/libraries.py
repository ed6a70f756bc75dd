"""torch.library: a kernel that a script registers for cuda is this device's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llm_adapt.frameworks.torch_cuda.devices import DeviceTranslator
from llm_adapt.patching import Patch, Row

__all__ = ["rows"]

_CUSTOM_OP = "torch._library.custom_ops:CustomOpDef.register_kernel"


def rows(translate: DeviceTranslator) -> list[Row]:
    """A row for torch.library.custom_op(device_types="cuda") and register_kernel("cuda"), which meet in one method.

    A kernel in CUDA's own language cannot come this way: what is registered is Python.
    """
    wrap = functools.partial(_register_kernel, target=translate.target)
    why = "a custom op of cuda is one of this device"
    return [Patch(_CUSTOM_OP, wrap, why, kind="wrap", optional=True, versions="torch 2.4 on")]


def _register_kernel(original: Callable[..., Any], target: str) -> Callable[..., Any]:
    def place(device_type: Any) -> Any:
        return target if device_type == "cuda" else device_type

    @functools.wraps(original)
    def register_kernel(self: Any, device_types: Any, *args: Any, **kwargs: Any) -> Any:
        if device_types is None or isinstance(device_types, str):
            return original(self, place(device_types), *args, **kwargs)
        # ("cpu", "cuda") are one device on the CPU.
        return original(self, list(dict.fromkeys(map(place, device_types))), *args, **kwargs)

    return register_kernel
