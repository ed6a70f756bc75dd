"""What a tensor says of its place: is_cuda, get_device(), type() and the legacy tensor types.

A tensor of the device that stands for cuda is what the script calls a cuda tensor. torch itself, and libraries
that know the device, are told the truth (availability.py): torch chooses kernels and decompositions by it.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.frameworks.torch_cuda.availability import IsTold
from llm_adapt.frameworks.torch_cuda.devices import DeviceTranslator
from llm_adapt.patching import Patch, Row

__all__ = ["cuda_type_name", "own_type", "rows"]

_CUDA_TYPE = re.compile(r"torch\.cuda\.((?:sparse\.)?\w+Tensor)\Z")
_WHY = "tensors of this device are what the script calls cuda"


def rows(translate: DeviceTranslator, is_told: IsTold) -> list[Row]:
    """Rows for the questions about a tensor's place, and for type names as arguments."""
    tensor_type = functools.partial(_tensor_type, translate=translate, is_told=is_told)
    default_type = functools.partial(_default_tensor_type, translate=translate)
    found: list[Row] = [
        Patch("torch:Tensor.is_cuda", _is_cuda(translate, is_told), _WHY),
        Patch("torch:Tensor.type", tensor_type, _WHY, kind="wrap"),
        Patch("torch:set_default_tensor_type", default_type, _WHY, kind="wrap"),
    ]
    for storage in ("UntypedStorage", "TypedStorage"):
        found.append(Patch(f"torch.storage:{storage}.is_cuda", _is_cuda(translate, is_told), _WHY))
    if translate.is_host:  # vendors count their own ordinals
        get_device = functools.partial(_get_device, translate=translate, is_told=is_told)
        found.append(Patch("torch:Tensor.get_device", get_device, _WHY, kind="wrap"))
    return found


def cuda_type_name(name: str, translate: DeviceTranslator) -> str:
    """The name of a tensor type of this device as CUDA code knows it; other names stay."""
    prefix = _own_prefix(translate)
    if not name.startswith(prefix) or name.startswith("torch.cuda."):
        return name
    return "torch.cuda." + name[len(prefix) :]


def _own_prefix(translate: DeviceTranslator) -> str:
    return "torch." if translate.is_host else f"torch.{translate.target}."


def own_type(value: Any, translate: DeviceTranslator) -> Any:
    """The name of this device's tensor type for CUDA's; anything else is returned as it is."""
    match = _CUDA_TYPE.match(value) if type(value) is str else None
    return _own_prefix(translate) + match[1] if match else value


def _is_cuda(translate: DeviceTranslator, is_told: IsTold) -> property:
    target, frame = translate.target, sys._getframe

    def is_cuda(self: Any) -> bool:
        """True on the device that stands for cuda."""
        return self.device.type == target and is_told(frame(1).f_globals.get("__name__", ""))

    return property(is_cuda)


def _get_device(original: Callable[..., int], translate: DeviceTranslator, is_told: IsTold) -> Callable[..., int]:
    @functools.wraps(original)
    def get_device(self: torch.Tensor) -> int:
        """The current ordinal for tensors in host memory, whose own answer is -1."""
        index = original(self)
        return translate.current if index == -1 and is_told(sys._getframe(1).f_globals.get("__name__", "")) else index

    return get_device


def _tensor_type(original: Callable[..., Any], translate: DeviceTranslator, is_told: IsTold) -> Callable[..., Any]:
    @functools.wraps(original)
    def tensor_type(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, own_type(dtype, translate), non_blocking, **kwargs)
        name: str = original(self, **kwargs)
        told = self.device.type == translate.target and is_told(sys._getframe(1).f_globals.get("__name__", ""))
        return cuda_type_name(name, translate) if told else name

    return tensor_type


def _default_tensor_type(original: Callable[..., None], translate: DeviceTranslator) -> Callable[..., None]:
    @functools.wraps(original)
    def set_default_tensor_type(t: Any) -> None:
        original(own_type(t, translate))

    return set_default_tensor_type
