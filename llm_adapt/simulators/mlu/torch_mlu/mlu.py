"""torch.mlu: devices, and the names of its rooms (memory, random numbers, streams, graphs, AMP)."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch_mlu import _native

from . import amp, cncl, cnpx, graphs, memory, random, streams
from .device_index import index_of
from .graphs import MLUGraph, graph, graph_pool_handle, is_current_stream_capturing, make_graphed_callables
from .memory import (
    empty_cache,
    ipc_collect,
    max_memory_allocated,
    max_memory_reserved,
    mem_get_info,
    memory_allocated,
    memory_reserved,
    memory_snapshot,
    memory_stats,
    memory_summary,
    reset_peak_memory_stats,
    set_per_process_memory_fraction,
)
from .random import (
    get_rng_state,
    get_rng_state_all,
    initial_seed,
    manual_seed,
    manual_seed_all,
    seed,
    seed_all,
    set_rng_state,
    set_rng_state_all,
)
from .streams import Event, ExternalStream, Stream, current_stream, default_stream, set_stream, stream

__all__ = [
    "Event", "ExternalStream", "MLUGraph", "Stream", "amp", "can_device_access_peer", "cncl", "cnpx", "cnrt",
    "current_device", "current_stream", "default_generators", "default_stream", "device", "device_count",
    "empty_cache", "get_amp_supported_dtype", "get_device_capability", "get_device_name", "get_device_properties",
    "get_rng_state", "get_rng_state_all", "graph", "graph_pool_handle", "graphs", "init", "initial_seed",
    "ipc_collect", "is_available", "is_bf16_supported", "is_current_stream_capturing", "is_fp8_supported",
    "is_initialized", "is_tf32_supported", "make_graphed_callables", "manual_seed", "manual_seed_all",
    "max_memory_allocated", "max_memory_reserved", "mem_get_info", "memory", "memory_allocated", "memory_reserved",
    "memory_snapshot", "memory_stats", "memory_summary", "random", "reset_peak_memory_stats", "seed", "seed_all",
    "set_device", "set_per_process_memory_fraction", "set_rng_state", "set_rng_state_all", "set_stream", "stream",
    "streams", "synchronize",
]  # fmt: skip

# Empty until the first tensor is on the device, as on an MLU590: who indexes it before gets an IndexError.
default_generators: Any = []
_initialized = False
_queued: list[Callable[[], Any]] = []


def is_available() -> bool:
    """Whether there is an MLU; leaves the driver alone."""
    return device_count() > 0


def device_count() -> int:
    """MLUs that this process sees."""
    return int(_native.device_count())


def is_initialized() -> bool:
    """Whether the device was used already."""
    return _initialized and not _is_in_bad_fork()


def init() -> None:
    """Use the device: afterwards default_generators has one generator for each."""
    _lazy_init()


def _is_in_bad_fork() -> bool:
    return False


def _lazy_init() -> None:
    global _initialized, default_generators
    if _initialized:
        return
    if device_count() == 0:
        raise RuntimeError("No MLU is visible: CN_VISIBLE_DEVICES, MLU_VISIBLE_DEVICES or MLU_SIM_DEVICES hides all.")
    default_generators = tuple(_native.default_generator(index) for index in range(device_count()))
    _initialized = True
    for call in _queued:
        call()
    _queued.clear()


def _lazy_call(call: Callable[[], Any], **kwargs: Any) -> None:
    """Call now, or once the device is used."""
    if _initialized:
        call()
    else:
        _queued.append(call)


def current_device() -> int:
    """Index of the current MLU."""
    _lazy_init()
    return int(_native.current_device())


def set_device(device: Any) -> None:
    """Make an MLU the current one; a negative index changes nothing."""
    index = index_of(device)
    if index >= 0:
        _native.exchange_device(index)


def _exchange_device(index: int) -> int:
    return int(_native.exchange_device(index)) if index >= 0 else -1


_maybe_exchange_device = _exchange_device


class device:
    """Context in which one MLU is the current one; None changes nothing."""

    def __init__(self, device: Any) -> None:
        self.idx = index_of(device) if device is not None else -1
        self.prev_idx = -1

    def __enter__(self) -> None:
        self.prev_idx = _exchange_device(self.idx)

    def __exit__(self, *error: object) -> None:
        _exchange_device(self.prev_idx)


class device_of(device):
    """Context in which the MLU of a tensor is the current one."""

    def __init__(self, obj: torch.Tensor) -> None:
        super().__init__(obj.get_device() if obj.device.type == "mlu" else None)


def synchronize(device: Any = None) -> None:
    """Wait for the device; its work here is done when it is called."""
    torch.accelerator.synchronize(index_of(device))


def get_device_name(device: Any = None) -> str:
    """Name of the simulated model."""
    return str(get_device_properties(device).name)


def get_device_capability(device: Any = None) -> tuple[int, int]:
    """(5, 0) for an MLU590.

    Raises:
        NotImplementedError: the model's second number is not public.
    """
    properties = get_device_properties(device)
    return properties.major, properties.minor


class DeviceProp(SimpleNamespace):
    """What torch_mlu tells of a device; a field whose value is not public raises, others do not exist."""

    def __getattr__(self, name: str) -> Any:
        if name in _UNKNOWN_FIELDS:
            raise NotImplementedError(
                f"DeviceProp.{name} was asked; its value for {self.name} is not public, and the simulator invents none."
            )
        raise AttributeError(f"DeviceProp of torch_mlu has no field {name!r}.")


_UNKNOWN_FIELDS = (
    "minor", "core_num_per_cluster", "cluster_count", "multi_processor_count", "supports_linear_memory",
    "frequency", "dram_bandwidth",
)  # fmt: skip


def get_device_properties(device: Any = None) -> DeviceProp:
    """Name, capability and memory of an MLU."""
    _lazy_init()
    index = index_of(device)
    if not 0 <= index < device_count():
        raise AssertionError(f"Invalid device id: {index} was asked, and there are {device_count()} devices.")
    major = _native.major_capability()
    known = {"name": os.environ["MLU_SIM_MODEL"], "major": major, "total_memory": _native.total_memory()}
    if major == 5:
        known["minor"] = 0
    return DeviceProp(**known)


def can_device_access_peer(device: Any, peer_device: Any) -> bool:
    """Not modelled: which MLUs reach each other is not public."""
    raise NotImplementedError("torch.mlu.can_device_access_peer: which MLUs reach each other is not public.")


def is_bf16_supported() -> bool:
    """True, as the 2026 build answers for every device."""
    return True


def is_tf32_supported() -> bool:
    """True, as the 2026 build answers for every device."""
    return True


def is_fp8_supported() -> bool:
    """Whether the capability is 6 or more."""
    return bool(_native.major_capability() >= 6)


def get_amp_supported_dtype() -> list[torch.dtype]:
    """What torch.autocast("mlu") casts to."""
    return [torch.float16, torch.bfloat16]


def cnrt() -> Any:
    """Not modelled: the runtime's C interface."""
    raise NotImplementedError("torch.mlu.cnrt: the MLU simulator has no Neuware runtime.")


def migrate_if_asked() -> None:
    """TORCH_MLU_GPU_MIGRATION=1 switches the vendor's migration on when torch_mlu is imported."""
    if os.environ.get("TORCH_MLU_GPU_MIGRATION") == "1":
        importlib.import_module("torch_mlu.utils.gpu_migration.migration")


def __getattr__(name: str) -> Any:
    raise AttributeError(f"torch.mlu.{name} is not recorded in public sources; the MLU simulator does not have it.")
