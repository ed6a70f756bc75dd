"""Module.to() keeps its Parameters where the device's plug-in did not tell torch that it may.

Module.to("cuda") moves each Parameter in place: two modules that share a weight still share it, and an optimizer that
was made before still steps it. torch does so for the backends on a list of its own, and for a plug-in's device only if
that registers aten::_has_compatible_shallow_copy_type. torch_npu does; the public source of torch_mlu does not, and
there torch makes new Parameters: tied weights come apart without a word.

Source: torch/nn/modules/module.py, Module._apply; c10/core/TensorImpl.h, has_compatible_shallow_copy_type.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.frameworks.torch_cuda.devices import DeviceTranslator
from llm_adapt.patching import Patch, Row

__all__ = ["rows"]

_QUESTION = "_has_compatible_shallow_copy_type"
_KEY = "PrivateUse1"
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def rows(translate: DeviceTranslator) -> list[Row]:
    """A row for Module._apply, which is behind Module.to and its kin; none where the device answers torch itself."""
    if translate.is_host or torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{_QUESTION}", _KEY):
        return []
    apply = functools.partial(_apply, target=translate.target)
    return [Patch("torch.nn:Module._apply", apply, "a moved Parameter stays the same Parameter", kind="wrap")]


def _apply(original: Callable[..., Any], target: str) -> Callable[..., Any]:
    inside = threading.local()  # a module applies its children through this very function

    def are_compatible(tensor: torch.Tensor, other: torch.Tensor) -> bool:
        places = {tensor.device.type, other.device.type}
        return tensor.layout == other.layout == torch.strided and places <= {"cpu", target}

    @functools.wraps(original)
    def apply(self: torch.nn.Module, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # A subclass such as DTensor is asked the question as an operator, which it does not have.
        if getattr(inside, "is_answered", False) or any(type(one) not in _PLAIN for one in self.parameters()):
            return original(self, fn, recurse)
        inside.is_answered = True
        try:
            # For this call alone: nothing is left in the dispatcher.
            with torch.library._scoped_library("aten", "IMPL") as library:
                library.impl(_QUESTION, are_compatible, _KEY)
                return original(self, fn, recurse)
        finally:
            inside.is_answered = False

    return apply
