"""Which ordinal is current, and what it is: all of them are the one host."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from types import SimpleNamespace, TracebackType
from typing import Any

from llm_adapt.frameworks.torch_cuda.devices import DeviceTranslator
from llm_adapt.frameworks.torch_cuda.host.memory import host_memory

__all__ = ["functions"]


class DeviceProperties(SimpleNamespace):
    """What torch.cuda.get_device_properties returns on the CPU; a name it lacks raises AttributeError."""


def functions(translate: DeviceTranslator, ordinal: Callable[[Any], int]) -> dict[str, Any]:
    """Selection, synchronisation and properties."""
    return {**_selection(translate, ordinal), **_properties(translate, ordinal)}


def _selection(translate: DeviceTranslator, ordinal: Callable[[Any], int]) -> dict[str, Any]:
    class device:
        """Context manager that makes an ordinal current; None and -1 change nothing."""

        def __init__(self, device: Any) -> None:
            self.idx = ordinal(device)

        def __enter__(self) -> None:
            self.previous, translate.current = translate.current, self.idx

        def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
            translate.current = self.previous

    class device_of(device):
        """Context manager for the ordinal of a tensor: the current one, all of them hold it."""

        def __init__(self, obj: Any) -> None:
            super().__init__(None)

    def current_device() -> int:
        """The current ordinal."""
        return translate.current

    def set_device(device: Any) -> None:
        """Make an ordinal current. Raises DeviceError when there is no such ordinal."""
        translate.current = ordinal(device)

    def init() -> None:
        """Nothing to initialise."""

    def synchronize(device: Any = None) -> None:
        """Return: work on the CPU is finished when a call returns."""
        ordinal(device)

    def call_now(callable: Callable[[], Any], **kwargs: Any) -> Any:
        """Call at once: there is no CUDA context to wait for."""
        return callable()

    def can_device_access_peer(device: Any, peer_device: Any) -> bool:
        """True for two ordinals: both are host memory."""
        return ordinal(device) != ordinal(peer_device)

    return {
        "device": device,
        "device_of": device_of,
        "current_device": current_device,
        "set_device": set_device,
        "synchronize": synchronize,
        "init": init,
        "is_initialized": lambda: True,
        "_lazy_init": init,
        "_lazy_call": call_now,
        "_sleep": lambda cycles: None,
        "get_sync_debug_mode": lambda: 0,
        "can_device_access_peer": can_device_access_peer,
        "is_current_stream_capturing": lambda: False,
    }


def _properties(translate: DeviceTranslator, ordinal: Callable[[Any], int]) -> dict[str, Any]:
    capability = translate.adapter.cuda_capability or (8, 0)
    properties = DeviceProperties(
        name=f"{platform.processor() or platform.machine()} (host memory presented as cuda by llm_adapt)",
        major=capability[0],
        minor=capability[1],
        total_memory=host_memory()[1],
        multi_processor_count=os.cpu_count() or 1,
        is_integrated=True,
        is_multi_gpu_board=False,
    )

    def get_device_properties(device: Any = None) -> DeviceProperties:
        """Name, capability, memory and processor count of the host."""
        ordinal(device)
        return properties

    def get_device_capability(device: Any = None) -> tuple[int, int]:
        """The capability CUDA code is told; see the adapter."""
        ordinal(device)
        return capability

    def get_device_name(device: Any = None) -> str:
        """The processor's name, marked as the CPU."""
        ordinal(device)
        return str(properties.name)

    def utilization(device: Any = None) -> int:
        """Processes that ran or waited in the last minute, in percent of the processors."""
        ordinal(device)
        return round(100 * os.getloadavg()[0] / (os.cpu_count() or 1))

    return {
        "get_device_properties": get_device_properties,
        "get_device_capability": get_device_capability,
        "get_device_name": get_device_name,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_tf32_supported": lambda: False,
        "utilization": utilization,
        "list_gpu_processes": lambda device=None: "llm_adapt: the CPU is in use; see ps or top",
    }
