"""torch.cuda of a simulated DCU: identity, memory, streams, random numbers; run by test_dcu_device.py."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from torch.nn.parallel import comm

from llm_adapt.simulators import SimulatorError
from tests.simulators.dcu_process import check

MIB = 2**20


@check
def identity() -> None:
    """torch presents itself as a DTK build: das in the version, hip set, cuda None, gfx codes, waves of 64."""
    assert torch.__version__.endswith("+das.simulated")
    assert (torch.version.hip, torch.version.cuda) == ("6.3.26093", None)
    assert torch.cuda.is_available()
    assert torch.backends.cuda.is_built()
    assert torch.cuda.device_count() == 8
    assert torch.cuda.get_device_name() == "BW"
    assert torch.cuda.get_device_capability(1) == (9, 3)
    assert torch.cuda.get_arch_list() == ["gfx936"]
    assert torch.cuda.is_bf16_supported()
    assert not torch.cuda.is_tf32_supported()
    properties = torch.cuda.get_device_properties(0)
    assert (properties.gcnArchName, properties.warp_size, properties.total_memory) == ("gfx936", 64, 16 * 2**30)


@check
def what_is_not_public_raises() -> None:
    """Properties that no source gives raise, naming themselves; a misspelt one is no attribute."""
    properties = torch.cuda.get_device_properties(0)
    with pytest.raises(SimulatorError, match="multi_processor_count was read.*not public"):
        _ = properties.multi_processor_count
    with pytest.raises(AttributeError, match="warps"):
        _ = properties.warps


@check
def names_that_are_not_modelled_raise() -> None:
    """Graphs, pools, histories, IPC and the like name themselves."""
    acts = {
        "torch.cuda.CUDAGraph": torch.cuda.CUDAGraph,
        "torch.cuda.MemPool": torch.cuda.MemPool,
        "_cuda_sleep": lambda: torch.cuda._sleep(10),
        "_cuda_ipc_collect": torch.cuda.ipc_collect,
        "_cuda_memorySnapshot": torch.cuda.memory_snapshot,
        "_cuda_record_memory_history": torch.cuda.memory._record_memory_history,
        "_cuda_canDeviceAccessPeer": lambda: torch.cuda.can_device_access_peer(0, 1),
        "_broadcast_coalesced": lambda: comm.broadcast_coalesced([torch.ones(1, device="cuda")], [0, 1]),
        "cudaHostRegister": lambda: torch.cuda.cudart().cudaHostRegister(0, 0, 0),
        "ExternalStream": lambda: torch.cuda.ExternalStream(64),
        "interprocess": lambda: torch.cuda.Event(interprocess=True),
        "set_sync_debug_mode": lambda: torch.cuda.set_sync_debug_mode(1),
    }
    for name, act in acts.items():
        with pytest.raises(SimulatorError, match=name):
            act()


@check
def memory_is_counted() -> None:
    """Allocations, their peak and what stays reserved are counted for each device; empty_cache gives back."""
    gc.collect()
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated(3)
    torch.cuda.reset_peak_memory_stats(3)
    x = torch.empty(4 * MIB, dtype=torch.uint8, device="cuda:3")
    assert torch.cuda.memory_allocated(3) - start == 4 * MIB
    del x
    assert torch.cuda.memory_allocated(3) == start
    assert torch.cuda.max_memory_allocated(3) - start == 4 * MIB
    assert torch.cuda.memory_reserved(3) >= 4 * MIB
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(3) == start
    free, total = torch.cuda.mem_get_info(3)
    assert total - free == torch.cuda.memory_reserved(3)
    stats = torch.cuda.memory_stats(3)
    assert stats["allocation.all.peak"] >= 1
    assert "Allocated memory" in torch.cuda.memory_summary(3)
    assert torch.accelerator.memory_allocated(3) == start


@check
def memory_runs_out() -> None:
    """More than a device has, or than the fraction of it allows, is torch.OutOfMemoryError, and can be survived."""
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        torch.empty(17 * 2**30, dtype=torch.uint8, device="cuda:4")
    torch.cuda.set_per_process_memory_fraction(0.001, 4)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(32 * MIB, dtype=torch.uint8, device="cuda:4")
    torch.cuda.set_per_process_memory_fraction(1.0, 4)
    assert torch.empty(32 * MIB, dtype=torch.uint8, device="cuda:4").numel() == 32 * MIB
    assert torch.cuda.memory_stats(4)["num_ooms"] == 2


@check
def streams() -> None:
    """Streams have devices, priorities and an order; work in one is seen in another."""
    high, usual = torch.cuda.Stream(priority=-5), torch.cuda.Stream(device=1)
    assert (high.priority, usual.priority, usual.device) == (-1, 0, torch.device("cuda:1"))
    assert isinstance(high, torch.Stream)
    assert torch.cuda.Stream.priority_range() == (0, -1)
    with torch.cuda.stream(high):
        assert torch.cuda.current_stream() == high
        x = torch.ones(3, device="cuda") * 2
    assert torch.cuda.current_stream() == torch.cuda.default_stream() != high
    x.record_stream(torch.cuda.current_stream())
    torch.cuda.current_stream().wait_stream(high)
    assert high.query()
    high.synchronize()
    assert x.tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(RuntimeError, match="stream"):
        x.record_stream(torch.Stream(device="cpu"))


@check
def a_stream_brings_its_device() -> None:
    """set_stream and the context of a stream make the stream's device the current one, as torch.cuda does."""
    other = torch.cuda.Stream(device=1)
    with torch.cuda.stream(other):
        assert torch.cuda.current_device() == 1
        assert torch.ones(2, device="cuda").device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    torch.cuda.set_stream(other)
    assert torch.cuda.current_device() == 1
    torch.cuda.set_stream(torch.cuda.default_stream(1))
    torch.cuda.set_device(0)


@check
def events() -> None:
    """Events are points in time; elapsed_time wants two that are recorded and timed."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    assert start.query()
    with pytest.raises(RuntimeError, match="must be recorded"):
        start.elapsed_time(end)
    start.record()
    torch.ones(64, 64, device="cuda").matmul(torch.ones(64, 64, device="cuda"))
    end.record()
    end.synchronize()
    assert 0 < start.elapsed_time(end) < 60_000
    plain = torch.cuda.Event()
    plain.record()
    with pytest.raises((RuntimeError, ValueError), match="enable_timing"):
        plain.elapsed_time(end)
    torch.cuda.current_stream().wait_event(plain)


@check
def random_numbers() -> None:
    """Each device has a generator of seed and Philox offset, whose state can be kept and put back."""
    torch.manual_seed(5)
    first = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(5)
    assert torch.equal(first, torch.rand(4, device="cuda"))
    state = torch.cuda.get_rng_state()
    assert (state.numel(), state[0].item()) == (16, 5)
    second = torch.randn(4, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(second, torch.randn(4, device="cuda"))
    assert not torch.equal(second, torch.randn(4, device="cuda"))
    generator = torch.Generator("cuda:1").manual_seed(9)
    drawn = torch.randperm(10, device="cuda:1", generator=generator)
    assert torch.equal(drawn, torch.randperm(10, device="cuda:1", generator=generator.manual_seed(9)))
    assert len(torch.cuda.default_generators) == 8
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device="cuda", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="RNG state"):
        torch.cuda.default_generators[0].set_state(torch.zeros(3, dtype=torch.uint8))


@check
def host_random_numbers_stay() -> None:
    """Drawing on the device leaves the generator of the host where it was."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    torch.nn.functional.dropout(torch.ones(8, device="cuda"))
    torch.rand(4, device="cuda")
    assert torch.equal(torch.rand(3), expected)


@check
def pinned_memory() -> None:
    """Pinned memory is remembered, copies that do not block give it, and a DataLoader pins what it loads."""
    assert not torch.ones(3).is_pinned()
    assert torch.ones(3).pin_memory().is_pinned()
    assert torch.empty(3, pin_memory=True)[1:].is_pinned()
    assert torch.ones(3, device="cuda").to("cpu", non_blocking=True).is_pinned()
    with pytest.raises(RuntimeError, match="pinned"):
        torch.empty(3, device="cuda", pin_memory=True)
    data = torch.utils.data.TensorDataset(torch.arange(8.0))
    for workers in (0, 1):
        loader = torch.utils.data.DataLoader(data, batch_size=4, pin_memory=True, num_workers=workers)
        batches = [batch for (batch,) in loader]
        assert [batch.is_pinned() for batch in batches] == [True, True]
        assert sum(float(batch.cuda(non_blocking=True).sum()) for batch in batches) == 28.0


@check
def forked_children() -> None:
    """A child forked after the device was used cannot use it, and says so."""
    torch.ones(1, device="cuda")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.cuda.init()
            torch.zeros(1).cuda()
            said = "nothing"
        except RuntimeError as error:
            said = str(error)
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 4096).decode()
    os.waitpid(child, 0)
    assert "Cannot re-initialize CUDA in forked subprocess" in said


@check
def accelerator() -> None:
    """torch.accelerator knows the device as its own."""
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    assert torch.accelerator.device_count() == 8
    with torch.cuda.device(2):
        assert torch.accelerator.current_device_index() == 2
    torch.accelerator.synchronize()


@check
def tensor_types() -> None:
    """torch.cuda.FloatTensor and its kin make tensors, convert to themselves and know their own."""
    made = torch.cuda.FloatTensor([1.0, 2.0])
    assert (made.device, made.dtype, made.tolist()) == (torch.device("cuda:0"), torch.float32, [1.0, 2.0])
    assert torch.cuda.LongTensor(2, 3).shape == (2, 3)
    assert isinstance(made, torch.cuda.FloatTensor)
    assert not isinstance(made, torch.cuda.HalfTensor)
    assert not isinstance(torch.ones(1), torch.cuda.FloatTensor)
    assert made.type(torch.cuda.HalfTensor).type() == "torch.cuda.HalfTensor"
    with pytest.raises(TypeError, match="takes sizes or one sequence"):
        torch.cuda.IntTensor(made)


@check
def profiling() -> None:
    """The profiler sees operators of the device, and ranges for a profiler of its vendor nest."""
    with torch.profiler.profile() as profile:
        torch.ones(8, device="cuda").mul_(2)
    assert "aten::mul_" in {event.name for event in profile.events()}
    assert [torch.cuda.nvtx.range_push("a"), torch.cuda.nvtx.range_push("b")] == [0, 1]
    assert [torch.cuda.nvtx.range_pop(), torch.cuda.nvtx.range_pop()] == [1, 0]
    with torch.cuda.nvtx.range("c"):
        torch.cuda.nvtx.mark("d")
