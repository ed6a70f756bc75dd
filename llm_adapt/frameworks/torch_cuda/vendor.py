"""The torch.cuda API on a vendor's own torch module (torch.npu, torch.mlu).

Not yet run on hardware. A name of torch.cuda is served by the vendor's function of that name, with
CUDA device arguments translated. Where the vendor has none, the name stays refused (namespace.py).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llm_adapt.frameworks.torch_cuda.devices import DeviceTranslator, type_proxy
from llm_adapt.patching import Patch, Row

__all__ = ["functions", "memory_history", "ranges", "stream_handles"]

_DEVICE_ARGUMENTS = ("device", "peer_device")
# The vendor's module for NVTX ranges: torch.npu.mstx (torch_npu 2.13), torch.mlu.cnpx (torch_mlu 1.22).
_RANGES = {"npu": "mstx", "mlu": "cnpx"}
# An NPU multiplies float32 in float32 or in its own HF32; torch_npu has no question of that name.
_ANSWERS: dict[str, dict[str, Any]] = {"npu": {"is_tf32_supported": lambda: False}}
_ALIASES = {"CUDAGraph": {"npu": "NPUGraph", "mlu": "MLUGraph"}}


class DefaultGenerators(Sequence[torch.Generator]):
    """torch.cuda.default_generators over the vendor's, which is empty, and another object, before the device starts.

    Looking into it starts the device. Megatron-Core reads `default_generators[i]` in a lazy call of its own.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def _now(self) -> Sequence[torch.Generator]:
        if not self._module.default_generators:
            self._module._lazy_init()
        found: Sequence[torch.Generator] = self._module.default_generators
        return found

    def __getitem__(self, index: Any) -> Any:
        return self._now()[index]

    def __len__(self) -> int:
        return len(self._now())


class DeviceProperties:
    """A vendor's device properties for CUDA code: the capability is the adapter's; what is left empty is missing.

    Args:
        own: the vendor's properties, whose fields of CUDA hold None where they mean nothing.
        capability: (major, minor) that CUDA code is told; None to tell none.
    """

    def __init__(self, own: Any, capability: tuple[int, int] | None) -> None:
        self._own = own
        if capability is not None:
            self.major, self.minor = capability

    def __getattr__(self, name: str) -> Any:
        value = None if name.startswith("__") else getattr(self._own, name)
        if value is None:
            raise AttributeError(f"get_device_properties().{name} was asked; {self._own.name} has none.")
        return value

    def __repr__(self) -> str:
        return repr(self._own)


def functions(translate: DeviceTranslator) -> dict[str, Any]:
    """Name -> what `torch.cuda.<name>` is on this vendor's device."""
    module = getattr(torch, translate.target)
    table: dict[str, Any] = {}
    for name in (*torch.cuda.__all__, "_lazy_call", "_lazy_init"):
        original = getattr(torch.cuda, name, None)
        if inspect.ismodule(original) or name.endswith(("Tensor", "Storage")):
            continue
        own = getattr(module, _ALIASES.get(name, {}).get(translate.target, name), None)
        if own is not None:
            table[name] = _translated(own, translate)
    if hasattr(module, "default_generators"):
        table["default_generators"] = DefaultGenerators(module)
    _complete(table, translate)
    return table


def _complete(table: dict[str, Any], translate: DeviceTranslator) -> None:
    """What the vendor leaves empty or calls by another name."""
    capability = translate.adapter.cuda_capability
    if capability is not None:
        table["get_device_capability"] = lambda device=None: capability
    if "get_device_properties" in table:
        shown = table["get_device_properties"]
        table["get_device_properties"] = lambda device=None: DeviceProperties(shown(device), capability)
    if "ExternalStream" in table:
        external = table["ExternalStream"]
        table.setdefault("get_stream_from_external", lambda data_ptr, device=None: external(data_ptr, device))
    for name, answer in _ANSWERS.get(translate.target, {}).items():
        table.setdefault(name, answer)


def stream_handles(translate: DeviceTranslator) -> list[Row]:
    """`Stream.cuda_stream`, the handle that is passed to compiled kernels, is the vendor's (npu_stream, mlu_stream)."""
    own, handle = getattr(getattr(torch, translate.target), "Stream", None), f"{translate.target}_stream"
    if own is None or not hasattr(own, handle):
        return []
    place = f"{own.__module__}:{own.__qualname__}.cuda_stream"
    return [Patch(place, property(lambda stream: getattr(stream, handle)), "the stream's handle", kind="add")]


def memory_history(translate: DeviceTranslator) -> dict[str, Any]:
    """The allocator's history, which torch keeps under private names of torch.cuda.memory; empty without one."""
    module = getattr(getattr(torch, translate.target), "memory", None)
    names = ("_record_memory_history", "_snapshot", "_dump_snapshot")
    return {name: _translated(getattr(module, name), translate) for name in names if hasattr(module, name)}


def ranges(translate: DeviceTranslator) -> dict[str, Any]:
    """The vendor's NVTX twin; empty where it has none."""
    module = getattr(getattr(torch, translate.target), _RANGES.get(translate.target, ""), None)
    names = ("mark", "range_push", "range_pop", "range_start", "range_end")
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def _translated(own: Any, translate: DeviceTranslator) -> Any:
    """`own` with its device arguments translated; `own` itself when it takes none."""
    if not callable(own):
        return own
    try:
        names = list(inspect.signature(own).parameters)
    except (TypeError, ValueError):  # C functions without a signature
        names = ["device"]
    if not any(name in names for name in _DEVICE_ARGUMENTS):
        return own

    def place(value: Any) -> Any:
        return value if type(value) is int and value < 0 else translate(value)  # torch.cuda.device(-1) does nothing

    def call(*args: Any, **kwargs: Any) -> Any:
        fixed = [place(arg) if name in _DEVICE_ARGUMENTS else arg for name, arg in zip(names, args, strict=False)]
        for name in _DEVICE_ARGUMENTS:
            if name in kwargs:
                kwargs[name] = place(kwargs[name])
        return own(*fixed, *args[len(fixed) :], **kwargs)

    if isinstance(own, type):
        return type_proxy(own, call, home="torch.cuda", is_base=True)
    wrapped: Callable[..., Any] = functools.wraps(own)(call)
    return wrapped
