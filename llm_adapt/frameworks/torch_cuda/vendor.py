"""The torch.cuda API on a vendor's own torch module (torch.npu, torch.mlu).

Not yet run on hardware. A name of torch.cuda is served by the vendor's function of that name, with
CUDA device arguments translated. Where the vendor has none, the name stays refused (namespace.py).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.frameworks.torch_cuda.devices import DeviceTranslator, type_proxy

__all__ = ["functions", "memory_history", "ranges"]

_DEVICE_ARGUMENTS = ("device", "peer_device")
# The vendor's module for NVTX ranges: torch.npu.mstx (torch_npu 2.13), torch.mlu.cnpx (torch_mlu 1.22).
_RANGES = {"npu": "mstx", "mlu": "cnpx"}
_ALIASES = {"CUDAGraph": {"npu": "NPUGraph", "mlu": "MLUGraph"}}


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
    capability = translate.adapter.cuda_capability
    if capability is not None:
        table["get_device_capability"] = lambda device=None: capability
    return table


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
        return type_proxy(own, call, home="torch.cuda")
    wrapped: Callable[..., Any] = functools.wraps(own)(call)
    return wrapped
