"""The names of torch._C that torch.cuda is made of, over the simulator's extension module."""

from __future__ import annotations

import datetime
import enum
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from llm_adapt.simulators.base import SimulatorError
from llm_adapt.simulators.dcu.machine import Machine
from llm_adapt.simulators.dcu.missing import CLASSES, FUNCTIONS, class_that_raises, function_that_raises
from llm_adapt.simulators.dcu.nvtx import nvtx_module
from llm_adapt.simulators.dcu.properties import DeviceProperties
from llm_adapt.simulators.dcu.streams import event_base, stream_base

__all__ = ["add_names"]


class _CudaError(enum.IntEnum):
    """The two results that a call without hardware can have."""

    success = 0
    invalid_device = 101


class _Process:
    """Whether the device was used in this process, or in one that it was forked from."""

    is_initialized = False
    is_bad_fork = False

    def forked(self) -> None:
        """HIP cannot be used again in a child that was forked after its first use."""
        self.is_bad_fork = self.is_bad_fork or self.is_initialized


def add_names(c: ModuleType, library: Any, machine: Machine) -> None:
    """Give torch._C what a CUDA build has, before torch.cuda looks.

    Args:
        c: torch._C, just imported.
        library: the simulator's extension module.
        machine: what is simulated.
    """
    process = _Process()
    os.register_at_fork(after_in_child=process.forked)
    names: dict[str, Any] = {name: function_that_raises(name) for name in FUNCTIONS}
    names |= {name: class_that_raises(name) for name in CLASSES}
    names |= _devices(library, machine, process) | _streams(library) | _memory(library)
    names |= {
        "_has_cuda": True,
        "_CudaDeviceProperties": DeviceProperties,
        "_CudaStreamBase": stream_base(c, library),
        "_CudaEventBase": event_base(c, library),
        "_cudart": _cudart(library),
        "_nvtx": nvtx_module(),
        "_c10d_init": _with_rccl(c._c10d_init, library),  # type: ignore[attr-defined]
    }
    for name, value in names.items():
        setattr(c, name, value)


def _with_rccl(init: Callable[[], bool], library: Any) -> Callable[[], bool]:
    """torch._C._c10d_init that adds RCCL under the name it has on ROCm, before torch.distributed looks for it."""

    def init_and_add() -> bool:
        found = init()
        library.bind_rccl()
        c10d = sys.modules["torch._C._distributed_c10d"]
        c10d.ProcessGroupNCCL = library.ProcessGroupNCCL  # type: ignore[attr-defined]
        c10d._DEFAULT_PG_NCCL_TIMEOUT = datetime.timedelta(minutes=10)  # type: ignore[attr-defined]
        return found

    return init_and_add


def _devices(library: Any, machine: Machine, process: _Process) -> dict[str, Any]:
    properties = DeviceProperties(machine)

    def init() -> None:
        cuda = sys.modules["torch.cuda"]
        cuda.default_generators = tuple(  # type: ignore[attr-defined]
            library.default_generator(index) for index in range(machine.num_devices)
        )
        cuda._get_device_properties = lambda device: properties  # type: ignore[attr-defined]
        process.is_initialized = True

    def set_debug_mode(mode: int) -> None:
        if mode:
            raise SimulatorError("torch.cuda.set_sync_debug_mode was called; the DCU simulator works synchronously.")

    return {
        "_cuda_init": init,
        "_cuda_isInBadFork": lambda: process.is_bad_fork,
        "_cuda_getDeviceCount": library.device_count,
        "_cuda_getDevice": library.current_device,
        "_cuda_setDevice": library.set_device,
        "_cuda_exchangeDevice": library.exchange_device,
        "_cuda_maybeExchangeDevice": library.maybe_exchange_device,
        "_cuda_hasPrimaryContext": lambda device: process.is_initialized,
        "_cuda_getArchFlags": lambda: machine.chip.gfx,
        "_cuda_synchronize": lambda: None,  # all work is done when its call returns
        "_cuda_set_sync_debug_mode": set_debug_mode,
        "_cuda_get_sync_debug_mode": lambda: 0,
        "_cuda_tunableop_is_enabled": lambda: False,
        "_cuda_clearCublasWorkspaces": lambda: None,  # products here keep no workspace
        # RCCL's version in DTK is not public, and torch.distributed asks for it while it reports another error.
        "_nccl_version": lambda: 0,
        "_nccl_version_suffix": lambda: b"simulated",
    }


def _streams(library: Any) -> dict[str, Callable[..., Any]]:
    return {
        "_cuda_getCurrentStream": library.current_stream,
        "_cuda_getDefaultStream": library.default_stream,
        "_cuda_getCurrentRawStream": lambda device: library.current_stream(device)[0],
        "_cuda_setStream": lambda stream_id, device_index, device_type: library.set_stream(stream_id, device_index),
        "_cuda_isCurrentStreamCapturing": lambda: False,
    }


def _memory(library: Any) -> dict[str, Callable[..., Any]]:
    return {
        "_cuda_memoryStats": library.memory_stats,
        "_cuda_resetPeakMemoryStats": library.reset_peak,
        "_cuda_resetAccumulatedMemoryStats": library.reset_accumulated,
        "_cuda_emptyCache": library.empty_cache,
        "_cuda_setMemoryFraction": library.set_memory_fraction,
        "_cuda_cudaCachingAllocator_is_enabled": lambda: True,
        "_cuda_getAllocatorBackend": lambda: "native",
        "_cuda_isHistoryEnabled": lambda: False,
    }


def _cudart(library: Any) -> ModuleType:
    """torch._C._cudart: the runtime calls that Python code makes."""
    module = ModuleType("torch._C._cudart")
    names = {
        "cudaError": _CudaError,
        "cudaGetErrorString": lambda error: error.name.replace("_", " "),
        "cudaMemGetInfo": library.memory_info,
        # A profiler that is not attached has nothing to start.
        "cudaProfilerStart": lambda: _CudaError.success,
        "cudaProfilerStop": lambda: _CudaError.success,
    }
    for name in ("cudaHostRegister", "cudaHostUnregister", "cudaStreamCreate", "cudaStreamDestroy"):
        names[name] = function_that_raises(name, f"torch.cuda.cudart().{name}")
    for name, value in names.items():
        setattr(module, name, value)
    return module
