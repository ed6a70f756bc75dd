"""Streams and events where work is finished when the call returns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from llm_adapt.frameworks.torch_cuda.devices import REAL_DEVICE

__all__ = ["Event", "Stream", "functions"]


class Stream:
    """A queue that is always empty: work on the CPU is finished when the call returns.

    Args:
        device: CUDA device argument; any ordinal that exists.
        priority: kept for those who read it back.
    """

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device, self.device_index, self.priority = REAL_DEVICE("cpu"), 0, priority
        self.stream_id = self.cuda_stream = kwargs.get("stream_id", 0)

    def synchronize(self) -> None:
        """Return: everything submitted is finished."""

    def wait_event(self, event: Event) -> None:
        """Return: what came before the event is finished."""

    def wait_stream(self, stream: Stream) -> None:
        """Return: what was submitted to the other stream is finished."""

    def query(self) -> bool:
        """True: everything submitted is finished."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """Record an event now."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def is_capturing(self) -> bool:
        """False: there are no graphs."""
        return False

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Lowest and highest priority: there is one."""
        return (0, 0)

    def __enter__(self) -> Stream:
        _entered().append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _entered().pop()


class Event:
    """A point in time of the host clock.

    Args:
        enable_timing: as in torch.cuda.Event; elapsed_time needs it.
    """

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> None:
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

    def ipc_handle(self) -> bytes:
        """Not on the CPU. Raises NotImplementedError."""
        raise NotImplementedError(_NO_IPC)

    @classmethod
    def from_ipc_handle(cls, device: Any, handle: bytes) -> Event:
        """Not on the CPU. Raises NotImplementedError."""
        raise NotImplementedError(_NO_IPC)


_NO_IPC = "An inter-process event was asked; the CPU has none. Use torch.multiprocessing.Event."
_default = Stream()
_thread = threading.local()  # the current stream is each thread's own, as on CUDA


def _entered() -> list[Stream]:
    """Streams this thread has entered; the last one is current."""
    if not hasattr(_thread, "entered"):
        _thread.entered = [_default]
    return _thread.entered  # type: ignore[no-any-return]


def functions(ordinal: Callable[[Any], int]) -> dict[str, Any]:
    """Streams, events, and which stream is current: it is remembered, and orders nothing."""

    class StreamContext:
        """Context manager that makes a stream current; None changes nothing."""

        def __init__(self, stream: Stream | None) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            if self.stream is not None:
                self.stream.__enter__()

        def __exit__(self, *exc: object) -> None:
            if self.stream is not None:
                self.stream.__exit__()

    def stream(stream: Stream | None) -> StreamContext:
        """Context manager that makes a stream current; None changes nothing."""
        return StreamContext(stream)

    def set_stream(stream: Stream | None) -> None:
        """Make a stream current; None changes nothing."""
        if stream is not None:
            _entered()[-1] = stream

    def current_stream(device: Any = None) -> Stream:
        """The current stream."""
        ordinal(device)
        return _entered()[-1]

    def default_stream(device: Any = None) -> Stream:
        """The stream that is current unless another was chosen."""
        ordinal(device)
        return _default

    return {
        "Stream": Stream,
        "Event": Event,
        "StreamContext": StreamContext,
        "stream": stream,
        "set_stream": set_stream,
        "current_stream": current_stream,
        "default_stream": default_stream,
    }
