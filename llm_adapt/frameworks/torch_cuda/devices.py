"""Devices: the one place where "cuda" becomes the device that is really there.

Only the exact strings `cuda` and `cuda:N`, torch.device objects of type cuda, and integer ordinals in device
positions are translated. A path, a URL or a name that contains "cuda" is not a device and is never touched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.adapters.base import DeviceAdapter
from llm_adapt.errors import DeviceError
from llm_adapt.patching import Entry, Patch, Row

__all__ = ["DeviceTranslator", "type_proxy"]

_CUDA = re.compile(r"cuda(?::(\d+))?\Z")
REAL_DEVICE = torch.device  # the C type itself, whatever torch.device is bound to later


class DeviceTranslator:
    """Turns what CUDA code calls a device into the device that is there.

    Args:
        adapter: the device in use.
        count: how many ordinals exist.

    Attributes:
        target: torch device type of the tensors, e.g. "npu".
        is_host: True on the CPU, where every ordinal is the one host memory.
    """

    def __init__(self, adapter: DeviceAdapter, count: int) -> None:
        self.adapter, self.count = adapter, count
        self.target = adapter.device_type
        self.is_host = self.target == "cpu"
        self.current = 0  # the CPU's current ordinal; vendors keep their own
        self._known: dict[Any, torch.device] = {}

    def __call__(self, value: Any) -> Any:
        """Translate one value in a device position; anything that is not a CUDA device is returned as it is.

        Raises:
            DeviceError: an ordinal that does not exist.
        """
        kind = type(value)
        if kind is str or kind is REAL_DEVICE:
            known = self._known.get(value)
            return known if known is not None else self._learn(value)
        if kind is int:
            return self.ordinal(value)
        return value

    def _learn(self, value: Any) -> Any:
        """First sight of a string or torch.device: translate it and remember the answer."""
        if type(value) is str:
            match = _CUDA.match(value)
            if match is None:
                return value
            index = None if match[1] is None else int(match[1])
        elif value.type == "cuda":
            index = value.index
        else:
            return value
        found = REAL_DEVICE(self.target) if index is None else self.ordinal(index)
        self._known[value] = found
        return found

    def ordinal(self, index: int) -> torch.device:
        """The device with that ordinal.

        Raises:
            DeviceError: there are fewer devices.
        """
        if not 0 <= index < self.count:
            raise DeviceError(
                f"Device ordinal {index} was asked; {self.count} exist(s) on {self.adapter.name} "
                f"(0 to {self.count - 1}). Start fewer processes, or on the CPU set LLM_ADAPT_CPU_DEVICES."
            )
        return REAL_DEVICE("cpu") if self.is_host else REAL_DEVICE(self.target, index)

    def index(self, value: Any, current: Callable[[], int]) -> int:
        """Ordinal meant by a device argument of torch.cuda; None and "cuda" mean the current device.

        Raises:
            DeviceError: not a CUDA device, or no such ordinal.
        """
        if value is None:
            return current()
        if isinstance(value, int) and not isinstance(value, bool):
            return current() if value < 0 else self._checked(value)
        text = str(value)
        match = _CUDA.match(text)
        if match is not None:
            return current() if match[1] is None else self._checked(int(match[1]))
        if text.partition(":")[0] == self.target:
            return current() if ":" not in text or self.is_host else self._checked(int(text.partition(":")[2]))
        raise DeviceError(f"A CUDA device was expected; found {value!r}. Pass 'cuda', 'cuda:N' or an ordinal.")

    def _checked(self, index: int) -> int:
        self.ordinal(index)
        return index


def logical_devices(configured: int | None) -> int:
    """How many ordinals the CPU presents: the setting, else one per local process, else one."""
    return configured or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def type_proxy(real: type, make: Callable[..., Any]) -> Any:
    """A stand-in for a C type that cannot be subclassed: calls go to `make`, everything else is the real type.

    isinstance and issubclass answer as for the real type, attributes are the real type's, and instances
    *are* real instances. The proxy equals the real type and hashes like it, so tables keyed by type still work.
    """

    class Meta(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return make(*args, **kwargs)

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, real)

        def __subclasscheck__(cls, subclass: type) -> bool:
            return subclass is cls or issubclass(subclass, real)

        def __getattr__(cls, name: str) -> Any:
            return getattr(real, name)

        def __eq__(cls, other: Any) -> bool:
            return other is cls or other is real

        def __hash__(cls) -> int:
            return hash(real)

    namespace = {"__module__": real.__module__, "__qualname__": real.__qualname__, "__doc__": real.__doc__}
    proxy = Meta(real.__name__, (), {**namespace, "__wrapped__": real})
    return proxy


def rows(translate: DeviceTranslator) -> list[Row]:
    """torch.device("cuda", n) and torch.Generator("cuda"), with everything that recognises these types."""

    def make_device(*args: Any, **kwargs: Any) -> torch.device:
        first = kwargs.get("type", args[0] if args else None)
        if type(first) is int and len(args) == 1 and not kwargs:
            return translate.ordinal(first)  # torch.device(0) is the accelerator's
        if first == "cuda":
            index = kwargs.get("index", args[1] if len(args) > 1 else None)
            return REAL_DEVICE(translate.target) if index is None else translate.ordinal(index)
        return translate(REAL_DEVICE(*args, **kwargs))  # type: ignore[no-any-return]

    def make_generator(device: Any = "cpu") -> torch.Generator:
        return real_generator(translate(device))

    real_generator = torch.Generator
    device_proxy = type_proxy(REAL_DEVICE, make_device)

    def reduce_device(device: torch.device) -> tuple[Any, tuple[Any, ...]]:
        args = (device.type,) if device.index is None else (device.type, device.index)
        return device_proxy, args

    why = "cuda devices become this device"
    return [
        Patch("torch:device", device_proxy, why),
        Patch("torch:Generator", type_proxy(real_generator, make_generator), why),
        # torch.device pickles as a reference to its type: pickle must find the same object under that name.
        Entry("copyreg:dispatch_table", reduce_device, "torch.device objects still pickle", key=REAL_DEVICE),
        Patch("torch.jit.annotations:try_ann_to_type", _script_annotations(device_proxy), why, kind="wrap"),
    ]


def _script_annotations(device_proxy: Any) -> Callable[[Any], Any]:
    """TorchScript recognises torch.device by identity: show it the object it compares with."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def try_ann_to_type(ann: Any, *args: Any, **kwargs: Any) -> Any:
            return original(device_proxy if ann is REAL_DEVICE else ann, *args, **kwargs)

        return try_ann_to_type

    return wrap
