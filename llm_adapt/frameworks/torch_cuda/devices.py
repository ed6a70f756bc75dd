"""Devices: the one place where "cuda" becomes the device that is really there.

Only the exact strings `cuda` and `cuda:N`, torch.device objects of type cuda, and integer ordinals in device
positions are translated. A path, a URL or a name that contains "cuda" is not a device and is never touched.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.adapters.base import DeviceAdapter
from llm_adapt.errors import DeviceError
from llm_adapt.patching import Entry, Patch, Row

__all__ = ["DeviceTranslator", "type_proxy"]

_CUDA = re.compile(r"cuda(?::(0|[1-9][0-9]*))?\Z")  # what torch itself reads as a CUDA device
_CAN_BE_BASE = 1 << 10  # Py_TPFLAGS_BASETYPE
REAL_DEVICE = torch.device  # the C type itself, whatever torch.device is bound to later


class DeviceTranslator:
    """Turns what CUDA code calls a device into the device that is there.

    Args:
        adapter: the device in use.
        count: how many ordinals exist.

    Attributes:
        target: torch device type of the tensors, e.g. "npu".
        is_host: True on the CPU, where every ordinal is the one host memory.
        known: every device string and torch.device of CUDA, and the commonest others, with what they become.
        current: the CPU's current ordinal; vendors keep their own.
    """

    def __init__(self, adapter: DeviceAdapter, count: int) -> None:
        self.adapter, self.count = adapter, count
        self.target = adapter.device_type
        self.is_host = self.target == "cpu"
        self.current = 0
        # Complete from the start and never written again: compiled code that translates stays valid.
        self.known: dict[Any, Any] = {same: same for name in ("cpu", "meta") for same in (name, REAL_DEVICE(name))}
        self.known |= dict.fromkeys(("cuda", REAL_DEVICE("cuda")), REAL_DEVICE(self.target))
        for index in range(count):
            self.known |= dict.fromkeys((f"cuda:{index}", REAL_DEVICE("cuda", index)), self.ordinal(index))

    def __call__(self, value: Any) -> Any:
        """Translate one value in a device position; anything that is not a CUDA device is returned as it is.

        Raises:
            DeviceError: an ordinal that does not exist.
        """
        kind = type(value)
        if kind is str or kind is REAL_DEVICE:
            known = self.known.get(value)
            return known if known is not None else self._unknown(value)
        if kind is int:
            return self.ordinal(value)
        return self(str.__str__(value)) if isinstance(value, str) else value  # an Enum of strings

    def _unknown(self, value: Any) -> Any:
        """Not CUDA, then it stays what it is; or a CUDA ordinal that does not exist."""
        match = _CUDA.match(str(value))
        return value if match is None else self.ordinal(int(match[1]))

    def is_cuda(self, value: Any) -> bool:
        """Whether a string or torch.device names CUDA."""
        return isinstance(value, (str, REAL_DEVICE)) and _CUDA.match(str(value)) is not None

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
        text = str.__str__(value) if isinstance(value, str) else str(value)
        match = _CUDA.match(text)
        if match is not None:
            return current() if match[1] is None else self._checked(int(match[1]))
        # On the CPU also the word "cpu": str(tensor.device) is what a script that is right on CUDA passes here.
        if text.partition(":")[0] == self.target:
            return current() if ":" not in text or self.is_host else self._checked(int(text.partition(":")[2]))
        raise DeviceError(f"A CUDA device was expected; found {value!r}. Pass 'cuda', 'cuda:N' or an ordinal.")

    def _checked(self, index: int) -> int:
        self.ordinal(index)
        return index


def logical_devices(configured: int | None) -> int:
    """How many ordinals the CPU presents: the setting, else one per local process, else one."""
    return configured or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def type_proxy(real: type, make: Callable[..., Any], home: str = "torch", is_base: bool = False) -> Any:
    """A stand-in for a type: calls go to `make`, everything else is the real type.

    `home` is the module that holds the stand-in under the type's name, which is how pickle finds it. With `is_base`
    the stand-in is a subclass of the real type, where Python allows one: then issubclass holds for what the real
    type's bases are, and subclasses of the stand-in are subclasses of the real type, made as theirs.

    isinstance and issubclass answer as for the real type, attributes are the real type's, and instances
    *are* real instances. The proxy equals the real type and hashes like it, so tables keyed by type still work.
    """

    class Meta(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return make(*args, **kwargs) if cls is proxy else super().__call__(*args, **kwargs)

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, real) if cls is proxy else super().__instancecheck__(instance)

        def __subclasscheck__(cls, subclass: type) -> bool:
            return (cls is proxy and issubclass(subclass, real)) or super().__subclasscheck__(subclass)

        def __getattr__(cls, name: str) -> Any:
            return getattr(real, name)

        def __eq__(cls, other: Any) -> bool:
            # Also the stand-in of an earlier patch(): torch keeps some tables of types for good.
            return cls is other or (cls is proxy and getattr(other, "__wrapped__", other) is real)

        def __hash__(cls) -> int:
            return hash(real) if cls is proxy else super().__hash__()

    namespace = {"__module__": home, "__qualname__": real.__qualname__, "__doc__": real.__doc__}
    bases = (real,) if is_base and real.__flags__ & _CAN_BE_BASE else ()
    proxy = Meta(real.__name__, bases, {**namespace, "__wrapped__": real})
    return proxy


def rows(translate: DeviceTranslator, is_told: Callable[[str], bool]) -> list[Row]:
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
        place = translate(device)
        if not translate.is_host and getattr(place, "type", place) == translate.target and ":" not in str(place):
            place = translate.ordinal(torch.cuda.current_device())  # as CUDA's own; a vendor's would have no index
        return real_generator(place)

    real_generator = torch.Generator
    device_proxy, generator_proxy = type_proxy(REAL_DEVICE, make_device), type_proxy(real_generator, make_generator)

    def reduce_device(device: torch.device) -> tuple[Any, tuple[Any, ...]]:
        args = (device.type,) if device.index is None else (device.type, device.index)
        return device_proxy, args

    def device_module(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_device_module(device: Any = None) -> Any:
            if translate.is_cuda(device):
                return torch.cuda
            # On the CPU torch.device("cuda") is torch.device("cpu"), and torch.cpu lacks most of torch.cuda.
            is_ours = translate.is_host and (device is None or str(device) == "cpu")
            if is_ours and not torch.compiler.is_dynamo_compiling():
                is_ours = is_told(sys._getframe(1).f_globals.get("__name__", ""))
            return torch.cuda if is_ours else original(device)

        return get_device_module

    why = "cuda devices become this device"
    annotations = _script_annotations({REAL_DEVICE: device_proxy, real_generator: generator_proxy})
    return [
        Patch("torch:device", device_proxy, why),
        Patch("torch:Generator", generator_proxy, why),
        Patch("torch:get_device_module", device_module, "the module of cuda is torch.cuda", kind="wrap"),
        # torch.device pickles as a reference to its type: pickle must find the same object under that name.
        # Workaround: pickle-torch-device
        Entry("copyreg:dispatch_table", reduce_device, "torch.device objects still pickle", key=device_proxy),
        Patch("torch.jit.annotations:try_ann_to_type", annotations, why, kind="wrap"),
        *([] if translate.is_host else _queues(translate, why)),
    ]


def _queues(translate: DeviceTranslator, why: str) -> list[Row]:
    """torch.Stream("cuda") and torch.Event("cuda"), the types of torch.cuda's without the vendor's name."""

    def made(real: type) -> Any:
        def make(*args: Any, **kwargs: Any) -> Any:
            if args:
                args = (translate(args[0]), *args[1:])
            if "device" in kwargs:
                kwargs["device"] = translate(kwargs["device"])
            return real(*args, **kwargs)

        return type_proxy(real, make, is_base=True)

    return [
        Patch(f"torch:{name}", made(getattr(torch, name)), why) for name in ("Stream", "Event") if hasattr(torch, name)
    ]


def _script_annotations(proxies: dict[type, Any]) -> Callable[[Any], Any]:
    """TorchScript recognises these types by identity: show it the objects it compares with."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def try_ann_to_type(ann: Any, *args: Any, **kwargs: Any) -> Any:
            return original(proxies.get(ann, ann) if isinstance(ann, type) else ann, *args, **kwargs)

        return try_ann_to_type

    return wrap
