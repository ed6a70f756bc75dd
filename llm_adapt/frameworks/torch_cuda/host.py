"""The torch.cuda API on the CPU: what each name does where the device is host memory.

Work on the CPU is finished when a call returns, so streams and events order nothing and synchronize waits for
nothing; an event still takes the time. The random stream of the "device" is the CPU's default generator,
because that is what tensors on it draw from. Memory figures are those of the whole process and of the host.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import torch

from llm_adapt.frameworks.torch_cuda.devices import REAL_DEVICE, DeviceTranslator

__all__ = ["NO_EFFECT", "Event", "Stream", "functions"]

# Accepted and reported, because a script may rely on them: name -> why there is nothing to do.
NO_EFFECT = {
    "set_per_process_memory_fraction": "the CPU's memory is not divided; use ulimit or a cgroup",
    "set_sync_debug_mode": "the CPU never waits for a device",
    "_record_memory_history": "the CPU has no device allocator; use a heap profiler",
    "ipc_collect": "the CPU shares memory by file descriptors",
}


class Stream:
    """A queue that is always empty: work on the CPU is finished when the call returns.

    Args:
        device: CUDA device argument; any ordinal that exists.
        priority: kept for those who read it back.
    """

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device, self.priority = REAL_DEVICE("cpu"), priority
        self.stream_id = self.cuda_stream = kwargs.get("stream_id", 0)

    def synchronize(self) -> None:
        """Return: everything submitted is finished."""

    wait_event = wait_stream = lambda self, other: None

    def query(self) -> bool:
        """True: everything submitted is finished."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """Record an event now."""
        event = Event(enable_timing=True) if event is None else event
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class Event:
    """A point in time of the host clock.

    Args:
        enable_timing: as in torch.cuda.Event; elapsed_time needs it.
    """

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.enable_timing = enable_timing
        self._time_s: float | None = None

    def record(self, stream: Any = None) -> None:
        """Take the time."""
        self._time_s = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Return: what came before is finished."""

    def synchronize(self) -> None:
        """Return: what came before is finished."""

    def query(self) -> bool:
        """True: what came before is finished."""
        return True

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this event to `end_event`.

        Raises:
            RuntimeError: timing is off, or one of the events has not been recorded.
        """
        if not (self.enable_timing and end_event.enable_timing):
            raise RuntimeError("elapsed_time was asked of an event without enable_timing=True; create both with it.")
        if self._time_s is None or end_event._time_s is None:
            raise RuntimeError("elapsed_time was asked before both events were recorded; call record() first.")
        return (end_event._time_s - self._time_s) * 1000.0


class DeviceProperties(SimpleNamespace):
    """What torch.cuda.get_device_properties returns on the CPU; a name it lacks raises AttributeError."""


def functions(translate: DeviceTranslator) -> dict[str, Any]:
    """Name -> what `torch.cuda.<name>` is on the CPU."""
    current = functools.partial(getattr, translate, "current")
    ordinal = functools.partial(translate.index, current=current)
    table: dict[str, Any] = {}
    table.update(_selection(translate, ordinal))
    table.update(_properties(translate, ordinal))
    table.update(_streams(ordinal))
    table.update(_random(translate, ordinal))
    table.update(_memory(ordinal))
    return table


def _selection(translate: DeviceTranslator, ordinal: Callable[[Any], int]) -> dict[str, Any]:
    """Which ordinal is current."""

    class device:
        """Context manager that makes an ordinal current; None and -1 change nothing."""

        def __init__(self, device: Any) -> None:
            self.idx = translate.current if device is None else ordinal(device)

        def __enter__(self) -> None:
            self.previous, translate.current = translate.current, self.idx

        def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
            translate.current = self.previous

    def current_device() -> int:
        """The current ordinal."""
        return translate.current

    def set_device(device: Any) -> None:
        """Make an ordinal current. Raises DeviceError when there is no such ordinal."""
        translate.current = ordinal(device)

    def nothing(*args: Any, **kwargs: Any) -> None:
        """No effect on the CPU."""

    def synchronize(device: Any = None) -> None:
        """Return: work on the CPU is finished when a call returns."""
        ordinal(device)

    def call_now(callable: Callable[[], Any], **kwargs: Any) -> Any:
        """Call at once: there is no CUDA context to wait for."""
        return callable()

    return {
        "device": device,
        "device_of": lambda tensor: device(None),
        "current_device": current_device,
        "set_device": set_device,
        "synchronize": synchronize,
        "init": nothing,
        "is_initialized": lambda: True,
        "_lazy_init": nothing,
        "_lazy_call": call_now,
        "_sleep": nothing,
        "get_sync_debug_mode": lambda: 0,
        "can_device_access_peer": lambda device, peer_device: ordinal(device) != ordinal(peer_device),
        "is_current_stream_capturing": lambda: False,
        "cudart": lambda: _Cudart(translate),
    }


class _Cudart:
    """The few runtime calls that training scripts make."""

    def __init__(self, translate: DeviceTranslator) -> None:
        self._translate = translate

    def cudaProfilerStart(self) -> int:
        """Nothing to start: profile the CPU with torch.profiler or py-spy."""
        return 0

    def cudaProfilerStop(self) -> int:
        """Nothing to stop."""
        return 0

    def cudaMemGetInfo(self, device: int = 0) -> tuple[int, int]:
        """Free and total bytes of host memory."""
        return _host_memory()

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(f"torch.cuda.cudart().{name} was asked; the CPU has no CUDA runtime. Guard the call.")


def _properties(translate: DeviceTranslator, ordinal: Callable[[Any], int]) -> dict[str, Any]:
    capability = translate.adapter.cuda_capability or (8, 0)
    name = f"{platform.processor() or platform.machine()} (host memory presented as cuda by llm_adapt)"

    def get_device_properties(device: Any = None) -> DeviceProperties:
        """Name, capability, memory and processor count of the host."""
        ordinal(device)
        return DeviceProperties(
            name=name,
            major=capability[0],
            minor=capability[1],
            total_memory=_host_memory()[1],
            multi_processor_count=os.cpu_count() or 1,
            is_integrated=True,
            is_multi_gpu_board=False,
        )

    def get_device_capability(device: Any = None) -> tuple[int, int]:
        """The capability CUDA code is told; see the adapter."""
        ordinal(device)
        return capability

    def get_device_name(device: Any = None) -> str:
        """The processor's name, marked as the CPU."""
        ordinal(device)
        return name

    return {
        "get_device_properties": get_device_properties,
        "get_device_capability": get_device_capability,
        "get_device_name": get_device_name,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_tf32_supported": lambda: False,
        "utilization": lambda device=None: round(100 * os.getloadavg()[0] / (os.cpu_count() or 1)),
        "list_gpu_processes": lambda device=None: "llm_adapt: the CPU is in use; see ps or top",
    }


def _streams(ordinal: Callable[[Any], int]) -> dict[str, Any]:
    only = Stream()

    class StreamContext:
        """Context manager that changes nothing: there is one stream."""

        def __init__(self, stream: Stream | None) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            return None

        def __exit__(self, *exc: object) -> None:
            return None

    def one_stream(device: Any = None) -> Stream:
        """The only stream."""
        ordinal(device)
        return only

    return {
        "Stream": Stream,
        "Event": Event,
        "StreamContext": StreamContext,
        "stream": StreamContext,
        "set_stream": lambda stream: None,
        "current_stream": one_stream,
        "default_stream": one_stream,
    }


def _random(translate: DeviceTranslator, ordinal: Callable[[Any], int]) -> dict[str, Any]:
    """Random numbers of the device: those of the CPU's default generator."""
    generator = torch.default_generator

    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        """State of the generator, as a ByteTensor."""
        ordinal(device)
        return generator.get_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
        """Set the state of the generator."""
        ordinal(device)
        generator.set_state(new_state)

    def manual_seed(seed: int) -> None:
        """Seed the generator."""
        generator.manual_seed(int(seed))

    def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
        """Set the state; every ordinal has the same generator, so the current ordinal's state counts."""
        states = list(new_states)
        generator.set_state(states[min(translate.current, len(states) - 1)])

    return {
        "default_generators": (generator,) * translate.count,
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "get_rng_state_all": lambda: [generator.get_state()] * translate.count,
        "set_rng_state_all": set_rng_state_all,
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed,
        "seed": lambda: generator.seed(),
        "seed_all": lambda: generator.seed(),
        "initial_seed": lambda: generator.initial_seed(),
    }


def _status_bytes(field: str) -> int:
    """A memory field of /proc/self/status in bytes; 0 where there is no such file."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _host_memory() -> tuple[int, int]:
    """Available and total bytes of host memory."""
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def _memory(ordinal: Callable[[Any], int]) -> dict[str, Any]:
    """Memory figures: resident bytes of this process, and of the host."""

    def resident(device: Any = None) -> int:
        """Bytes of host memory that this process occupies."""
        ordinal(device)
        return _status_bytes("VmRSS")

    def peak(device: Any = None) -> int:
        """Largest number of bytes that this process occupied since the last reset."""
        ordinal(device)
        return _status_bytes("VmHWM")

    def reset_peak(device: Any = None) -> None:
        """Start a new peak, where the system allows it (Linux)."""
        ordinal(device)
        clear = Path("/proc/self/clear_refs")
        if clear.exists() and os.access(clear, os.W_OK):
            clear.write_text("5")

    def memory_stats(device: Any = None) -> dict[str, int]:
        """Process figures under the allocator's names; names the CPU has no figure for are absent."""
        now, high = resident(device), peak(device)
        kinds = ("allocated_bytes", "reserved_bytes", "active_bytes")
        stats = {f"{kind}.all.{when}": value for kind in kinds for when, value in (("current", now), ("peak", high))}
        return {**stats, "num_ooms": 0, "num_alloc_retries": 0}

    def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
        """The figures of memory_stats as text."""
        return "\n".join(f"{name:32s} {value:>16,d}" for name, value in memory_stats(device).items())

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        """Free and total bytes of host memory."""
        ordinal(device)
        return _host_memory()

    def nothing(*args: Any, **kwargs: Any) -> None:
        """No effect on the CPU."""

    names = {name: resident for name in ("memory_allocated", "memory_reserved", "memory_cached", "device_memory_used")}
    names |= {name: peak for name in ("max_memory_allocated", "max_memory_reserved", "max_memory_cached")}
    resets = ("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached")
    return {
        **names,
        **dict.fromkeys(resets, reset_peak),
        "reset_accumulated_memory_stats": nothing,
        "memory_stats": memory_stats,
        "memory_summary": memory_summary,
        "mem_get_info": mem_get_info,
        "empty_cache": nothing,
    }
