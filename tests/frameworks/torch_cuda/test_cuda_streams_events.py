"""torch.cuda streams, events and device selection on the CPU."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from llm_adapt.errors import DeviceError

pytestmark = pytest.mark.usefixtures("facade")


def test_the_current_device() -> None:
    """set_device and the device context choose the current ordinal, also after an exception."""
    assert torch.cuda.current_device() == 0
    torch.cuda.set_device("cuda:1")
    assert torch.cuda.current_device() == 1
    torch.cuda.set_device(torch.device("cuda"))  # a tensor's device: the current one
    assert torch.cuda.current_device() == 1
    with pytest.raises(ZeroDivisionError), torch.cuda.device(0):
        assert torch.cuda.current_device() == 0
        raise ZeroDivisionError
    assert torch.cuda.current_device() == 1
    for nothing in (None, -1):
        with torch.cuda.device(nothing):
            assert torch.cuda.current_device() == 1
    with torch.cuda.device_of(torch.ones(1)):
        assert torch.cuda.current_device() == 1
    torch.cuda.set_device(0)


def test_an_ordinal_that_does_not_exist() -> None:
    """Every function that takes a device refuses an ordinal beyond the last, and says how many there are."""
    for act in (
        torch.cuda.set_device,
        torch.cuda.device,
        torch.cuda.synchronize,
        torch.cuda.get_device_properties,
        torch.cuda.get_device_name,
        torch.cuda.get_device_capability,
        torch.cuda.memory_allocated,
        torch.cuda.mem_get_info,
        torch.cuda.get_rng_state,
        torch.cuda.current_stream,
    ):
        with pytest.raises(DeviceError, match="Device ordinal 2 was asked; 2 exist"):
            act(2)


def test_elapsed_time() -> None:
    """Two events measure the time between them, in milliseconds."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    time.sleep(0.05)
    end.record(torch.cuda.current_stream())
    end.synchronize()
    assert end.query()
    assert 50 <= start.elapsed_time(end) < 5000
    assert end.elapsed_time(start) == -start.elapsed_time(end)


def test_elapsed_time_needs_timing_and_records() -> None:
    """An event without timing, or one that was not recorded, raises as on CUDA."""
    timed, untimed = torch.cuda.Event(enable_timing=True), torch.cuda.Event()
    untimed.record()
    with pytest.raises(RuntimeError, match="enable_timing=True"):
        untimed.elapsed_time(timed)
    with pytest.raises(RuntimeError, match="recorded"):
        timed.elapsed_time(torch.cuda.Event(enable_timing=True))
    assert not torch.cuda.Stream().record_event().enable_timing
    for act in (timed.ipc_handle, lambda: torch.cuda.Event.from_ipc_handle("cuda:0", b"")):
        with pytest.raises(NotImplementedError, match="inter-process event"):
            act()


def test_the_current_stream() -> None:
    """The stream of a context is the current one inside it, nested and by set_stream, and each thread has its own."""
    default = torch.cuda.default_stream()
    outer, inner = torch.cuda.Stream(), torch.cuda.Stream(device="cuda:1", priority=-1)
    with torch.cuda.stream(outer):
        with torch.cuda.stream(inner), torch.cuda.stream(None):
            assert torch.cuda.current_stream() is inner
        with outer, torch.cuda.stream(outer):
            assert torch.cuda.current_stream("cuda") is outer
        seen: list[object] = []
        thread = threading.Thread(target=lambda: seen.append(torch.cuda.current_stream()))
        thread.start()
        thread.join()
        assert seen == [default]
        assert torch.cuda.current_stream() is outer
    assert torch.cuda.current_stream() is default
    torch.cuda.set_stream(inner)
    assert torch.cuda.current_stream() is inner
    torch.cuda.set_stream(default)
    assert (inner.priority, outer.cuda_stream, outer.device.type) == (-1, 0, "cpu")
    assert isinstance(inner, torch.cuda.Stream)
    assert torch.cuda.Stream.priority_range() == (0, 0)


def test_overlapped_code_computes() -> None:
    """A copy on a side stream, waited for and recorded, gives the numbers of code without streams."""
    side, done = torch.cuda.Stream(), torch.cuda.Event()
    batch = torch.arange(4.0).pin_memory()
    with torch.cuda.stream(side):
        x = batch.cuda(non_blocking=True) * 2
        done.record(side)
    torch.cuda.current_stream().wait_event(done)
    torch.cuda.current_stream().wait_stream(side)
    x.record_stream(torch.cuda.current_stream())
    side.synchronize()
    torch.cuda.synchronize()
    assert side.query()
    assert not side.is_capturing()
    assert x.tolist() == [0.0, 2.0, 4.0, 6.0]


def test_counts_and_properties() -> None:
    """As many devices as were asked for; properties name the host and its memory, and invent nothing else."""
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 2
    properties = torch.cuda.get_device_properties("cuda:1")
    assert "llm_adapt" in properties.name
    assert torch.cuda.get_device_name(0) == properties.name
    assert torch.cuda.get_device_capability() == (properties.major, properties.minor) == (8, 0)
    assert properties.total_memory == torch.cuda.mem_get_info()[1] > 0
    assert properties.multi_processor_count >= 1
    with pytest.raises(AttributeError, match="warp_size"):
        _ = properties.warp_size
    assert torch.cuda.is_bf16_supported()
    assert torch.cuda.is_initialized()
    assert torch.cuda.init() is None
    assert torch.cuda.can_device_access_peer(0, 1)
    assert not torch.cuda.can_device_access_peer(0, 0)
    assert torch.cuda.get_arch_list() == []
    assert isinstance(torch.cuda.utilization(), int)
    assert isinstance(torch.cuda.list_gpu_processes(), str)
    assert torch.cuda.get_sync_debug_mode() == 0
