"""torch.mlu.streams: streams and events. Work is done when it is called, so all streams are always drained."""

from __future__ import annotations

import time
from typing import Any

import torch

from .device_index import index_of

__all__ = ["Event", "ExternalStream", "Stream", "current_stream", "default_stream", "set_stream", "stream"]


class Stream(torch.Stream):
    """A stream; priorities from 0 to -3, and others are not rejected either (record on MLU590)."""

    def __new__(cls, device: Any = None, priority: int = 0, **ids: int) -> Stream:
        """A new stream, or the one that stream_id, device_index and device_type name."""
        if ids:
            return super().__new__(cls, priority=priority, **ids)
        return super().__new__(cls, device=torch.device("mlu", index_of(device)), priority=priority)

    def record_event(self, event: Any = None) -> Any:
        """Record an event, a new one without an argument; it is returned."""
        event = Event() if event is None else event
        event.record(self)
        return event

    @property
    def mlu_stream(self) -> int:
        """Number of the stream; not a queue's address, as it is on hardware."""
        return self.stream_id


class ExternalStream(Stream):
    """Not modelled: a stream of another library."""

    def __new__(cls, stream_ptr: int, device: Any = None, **kwargs: Any) -> ExternalStream:
        """Raise: no other library has queues here."""
        raise NotImplementedError("torch.mlu.ExternalStream: the MLU simulator has no queues of other libraries.")


class Event(torch.Event):
    """An event; query() is True before it is recorded (record on MLU590)."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Event:
        """A new event; one for several processes is not modelled."""
        if interprocess:
            raise NotImplementedError("torch.mlu.Event(interprocess=True): the MLU simulator shares no events.")
        event = super().__new__(cls, device="mlu", enable_timing=enable_timing, blocking=blocking)
        event._is_timed, event._recorded = enable_timing, None
        return event

    _is_timed: bool
    _recorded: float | None

    def record(self, stream: torch.Stream | None = None) -> None:
        """Record the event on a stream, the current one without an argument."""
        super().record(current_stream() if stream is None else stream)
        self._recorded = time.perf_counter()

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this event to another, by the host's clock.

        Raises:
            RuntimeError: one of them is not recorded, or was made without enable_timing.
        """
        if not (self._is_timed and end_event._is_timed):
            raise RuntimeError("CNRT error: both events must be created with argument 'enable_timing=True'.")
        if self._recorded is None or end_event._recorded is None:
            raise RuntimeError("CNRT error: both events must be recorded before calculating elapsed time.")
        return float(end_event._recorded - self._recorded) * 1e3

    def hardware_time(self, *args: Any) -> float:
        """Not modelled: time by the device's clock."""
        raise NotImplementedError("torch.mlu.Event.hardware_time: the MLU simulator has no hardware clock.")

    def ipc_handle(self) -> bytes:
        """Not modelled: events of several processes."""
        raise NotImplementedError("torch.mlu.Event.ipc_handle: the MLU simulator shares no events.")


def _as_mlu(stream: torch.Stream) -> Stream:
    return Stream(stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type)


def current_stream(device: Any = None) -> Stream:
    """The stream that is current on a device."""
    return _as_mlu(torch.accelerator.current_stream(index_of(device)))


def default_stream(device: Any = None) -> Stream:
    """The stream that is current where none was set."""
    kind = torch.accelerator.current_stream(index_of(device)).device_type
    return Stream(stream_id=0, device_index=index_of(device), device_type=kind)


def set_stream(stream: torch.Stream | None) -> None:
    """Make a stream the current one of its device; None changes nothing."""
    if stream is not None:
        torch.accelerator.set_stream(stream)


class StreamContext:
    """Context in which a stream, and its device, are current; None changes nothing."""

    def __init__(self, stream: torch.Stream | None) -> None:
        self.stream = stream
        self._before: tuple[Any, ...] = ()

    def __enter__(self) -> None:
        if self.stream is not None:
            device = torch.accelerator.current_device_index()
            self._before = (device, torch.accelerator.current_stream(self.stream.device_index))
            torch.accelerator.set_stream(self.stream)

    def __exit__(self, *error: object) -> None:
        if self._before:
            device, stream = self._before
            torch.accelerator.set_stream(stream)
            torch.accelerator.set_device_index(device)


def stream(stream: torch.Stream | None) -> StreamContext:
    """StreamContext(stream)."""
    return StreamContext(stream)
