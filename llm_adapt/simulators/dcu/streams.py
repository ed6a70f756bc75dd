"""The base classes of torch.cuda.Stream and torch.cuda.Event, over torch.Stream and torch.Event of the device."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from llm_adapt.simulators.base import SimulatorError

__all__ = ["event_base", "stream_base"]


def stream_base(c: ModuleType, library: Any) -> type:
    """torch._C._CudaStreamBase.

    Args:
        c: torch._C.
        library: the simulator's extension module.
    """

    class _CudaStreamBase(c.Stream):  # type: ignore[misc, name-defined]
        def __new__(
            cls,
            priority: int = 0,
            stream_id: int = 0,
            device_index: int = 0,
            device_type: int = 0,
            stream_ptr: int = 0,
        ) -> Any:
            if stream_ptr:
                raise SimulatorError(
                    f"torch.cuda.ExternalStream({stream_ptr:#x}) was asked; the DCU simulator has no HIP runtime that "
                    "streams could come from."
                )
            if not device_type:
                stream_id, device_index, device_type = library.new_stream(library.current_device(), priority)
            return super().__new__(cls, stream_id=stream_id, device_index=device_index, device_type=device_type)

        @property
        def cuda_stream(self) -> int:
            return int(self.stream_id)

        @property
        def priority(self) -> int:
            return int(library.stream_priority(self.stream_id))

        @staticmethod
        def priority_range() -> tuple[int, int]:
            return 0, -1

    return _CudaStreamBase


def event_base(c: ModuleType, library: Any) -> type:
    """torch._C._CudaEventBase.

    Args:
        c: torch._C.
        library: the simulator's extension module.
    """

    class _CudaEventBase(c.Event):  # type: ignore[misc, name-defined]
        def __new__(
            cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
        ) -> Any:
            if interprocess or external:
                raise SimulatorError(
                    "torch.cuda.Event(interprocess=True or external=True) was asked; the DCU simulator has no events "
                    "for other processes or for graphs."
                )
            return super().__new__(cls, "cuda", enable_timing=enable_timing, blocking=blocking)

        @property
        def cuda_event(self) -> int:
            return int(self.event_id)

        def elapsed_time(self, other: Any) -> float:
            # torch.Event's own takes no object of a class derived from it.
            return float(library.elapsed_ms(self.event_id, other.event_id))

        @classmethod
        def from_ipc_handle(cls, device: Any, handle: bytes) -> Any:
            raise SimulatorError("torch.cuda.Event.from_ipc_handle was called; the DCU simulator has no HIP IPC.")

        def ipc_handle(self) -> bytes:
            raise SimulatorError("torch.cuda.Event.ipc_handle was called; the DCU simulator has no HIP IPC.")

    return _CudaEventBase
