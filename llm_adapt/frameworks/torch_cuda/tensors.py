"""Factories, Tensor.to and its kin, Module.to: every entry point of torch that takes a device.

Thin wrappers on the entry points, none on the rest and no global mode: an op without a device argument
costs nothing (measured in benchmarks/overhead.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.errors import DeviceError
from llm_adapt.frameworks.torch_cuda.devices import REAL_DEVICE, DeviceTranslator
from llm_adapt.patching import Patch, Row
from llm_adapt.report import Report

__all__ = ["factory_targets", "rows"]

_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like", "normal")
_NEW = ("new", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")

_ABSENT: Any = object()
_COPY = 2  # position of `copy` after the device: Tensor.to(device, dtype, non_blocking, copy)
_NO_PINNING = ("pin_memory", "no effect", "host memory needs no pinning on the CPU")

WHY = "takes a device"


def factory_targets() -> list[str]:
    """Targets of every public factory with a `device=` argument, from torch's own list."""
    from torch.utils._device import _device_constructors

    # torch caches this set; taken now, it holds the originals that torch functions are dispatched with.
    found = []
    for function in _device_constructors():
        name = function.__name__
        for module in (torch, torch.fft, torch.nested):
            public = name.removeprefix("fft_")
            if getattr(module, public, None) is function:
                found.append(f"{module.__name__}:{public}")
    return sorted([*found, *(f"torch:{name}" for name in _LIKE), "torch.nested:as_nested_tensor"])


def rows(translate: DeviceTranslator, report: Report) -> list[Row]:
    """Rows for the entry points of torch, torch.Tensor and torch.nn.Module."""
    factory = functools.partial(_factory, translate=translate, report=report)
    targets = [*factory_targets(), *(f"torch:Tensor.{name}" for name in _NEW)]
    found: list[Row] = [Patch(target, factory, WHY, kind="wrap") for target in targets]
    found += [
        Patch("torch:Tensor.to", functools.partial(_tensor_to, translate=translate), WHY, kind="wrap"),
        Patch("torch:Tensor.cuda", _tensor_cuda(translate), "moves to this device"),
        Patch("torch.nn:Module.to", functools.partial(_module_to, translate=translate), WHY, kind="wrap"),
        Patch("torch:set_default_device", functools.partial(_first, translate=translate), WHY, kind="wrap"),
    ]
    if translate.is_host:
        return found + _host_rows(report)
    pinned = functools.partial(_method_first, translate=translate)
    return found + [Patch(f"torch:Tensor.{name}", pinned, WHY, kind="wrap") for name in ("pin_memory", "is_pinned")]


def _host_rows(report: Report) -> list[Row]:
    """What differs when device memory and host memory are one."""
    why, pinned = "device-to-host copies: code after it may change the device tensor", "host memory needs no pinning"
    return [
        Patch("torch:Tensor.cpu", _tensor_cpu, why, kind="wrap"),
        Patch("torch:Tensor.pin_memory", _pin_memory(report), pinned),
        Patch("torch:Tensor.is_pinned", _is_pinned, pinned),
        Patch("torch:Tensor.record_stream", _record_stream, "work on the CPU is finished when the call returns"),
    ]


def _factory(original: Callable[..., Any], translate: DeviceTranslator, report: Report) -> Callable[..., Any]:
    is_host = translate.is_host

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = translate(kwargs["device"])
        if is_host and "pin_memory" in kwargs and kwargs["pin_memory"]:
            report.once(*_NO_PINNING)
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    return factory


def _first(original: Callable[..., Any], translate: DeviceTranslator) -> Callable[..., Any]:
    """For functions whose first argument is the device."""

    @functools.wraps(original)
    def with_device(device: Any, *args: Any, **kwargs: Any) -> Any:
        return original(translate(device), *args, **kwargs)

    return with_device


def _method_first(original: Callable[..., Any], translate: DeviceTranslator) -> Callable[..., Any]:
    """For methods whose one argument is the device, which may be left out."""

    @functools.wraps(original)
    def method(self: torch.Tensor, device: Any = None) -> Any:
        return original(self) if device is None else original(self, translate(device))

    return method


def _tensor_to(original: Callable[..., Any], translate: DeviceTranslator) -> Callable[..., Any]:
    """Tensor.to. On the CPU "cpu" copies, as a device-to-host transfer does: a snapshot must stay what it was."""
    known, copies_to_host, real = translate.known.get, translate.is_host, REAL_DEVICE

    @functools.wraps(original)
    def to(self: torch.Tensor, device: Any = _ABSENT, *args: Any, **kwargs: Any) -> torch.Tensor:
        # The first argument may be a dtype or a tensor as well. This is the facade's most frequent call.
        kind = type(device)
        if kind is real or kind is str:
            device = known(device) or translate(device)
        elif device is _ABSENT:
            return original(self, **kwargs)  # type: ignore[no-any-return]
        elif kind is not torch.dtype:
            device = translate(device)
        if copies_to_host and type(device) is str and device == "cpu":
            if len(args) > _COPY:
                args = (*args[:_COPY], True, *args[_COPY + 1 :])
            else:
                kwargs["copy"] = True
        if args or kwargs:
            return original(self, device, *args, **kwargs)  # type: ignore[no-any-return]
        return original(self, device)  # type: ignore[no-any-return]

    return to


def _module_to(original: Callable[..., Any], translate: DeviceTranslator) -> Callable[..., Any]:
    @functools.wraps(original)
    def to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        if args:
            args = (translate(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = translate(kwargs["device"])
        return original(self, *args, **kwargs)  # type: ignore[no-any-return]

    return to


def _tensor_cuda(translate: DeviceTranslator) -> Callable[..., Any]:
    def cuda(
        self: torch.Tensor,
        device: Any = None,
        non_blocking: bool = False,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> torch.Tensor:
        """The tensor on the device that stands for cuda; the tensor itself when it is there already."""
        place = REAL_DEVICE(translate.target) if device is None else translate(device)
        if not isinstance(place, REAL_DEVICE) or place.type != translate.target:
            raise DeviceError(f"Tensor.cuda({device!r}) was asked; pass 'cuda', 'cuda:N', an ordinal or nothing.")
        return self.to(place, non_blocking=non_blocking, memory_format=memory_format)

    return cuda


def _tensor_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def cpu(self: torch.Tensor, memory_format: torch.memory_format = torch.preserve_format) -> torch.Tensor:
        return self.to("cpu", memory_format=memory_format)  # the string: it copies

    return cpu


def _pin_memory(report: Report) -> Callable[..., Any]:
    def pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
        """The tensor itself: it lies in host memory."""
        report.once(*_NO_PINNING)
        return self

    return pin_memory


def _is_pinned(self: torch.Tensor, device: Any = None) -> bool:
    """True: host memory is as good as pinned where there is no other memory."""
    return True


def _record_stream(self: torch.Tensor, stream: Any) -> None:
    """Nothing to record: work on the CPU is finished when the call returns."""
