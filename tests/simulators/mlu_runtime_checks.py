"""torch.mlu on a simulated MLU; run by test_mlu_device.py. The first check wants a device that nobody used yet."""

from __future__ import annotations

import pytest
import torch
import torch_mlu

from tests.simulators.mlu_process import check

GIB = 2**30


@check
def generators_come_with_the_first_tensor() -> None:
    """default_generators is empty until the device is used: Megatron's index into it fails before."""
    assert torch.mlu.is_available()
    torch.mlu.manual_seed_all(3)
    assert torch.mlu.default_generators == []
    assert not torch.mlu.is_initialized()
    torch.ones(1, device="mlu:0")
    assert len(torch.mlu.default_generators) == torch.mlu.device_count() == 8
    assert torch.mlu.default_generators[0].device == torch.device("mlu:0")
    assert torch.mlu.initial_seed() == 3


@check
def names_without_a_record_raise() -> None:
    """A name that public sources do not record of torch.mlu is an AttributeError that says so."""
    for owner, name in ((torch.mlu, "MemPool"), (torch.mlu, "utilization"), (torch_mlu, "anything")):
        with pytest.raises(AttributeError, match="not recorded in public sources"):
            getattr(owner, name)
    with pytest.raises(AttributeError, match="use torch.distributed"):
        torch.mlu.cncl.all_reduce  # noqa: B018
    with pytest.raises(TypeError, match="unexpected keyword"):
        torch.mlu.memory_allocated(unit="MiB")


@check
def identity() -> None:
    """Name, capability and memory are an MLU590's; fields without a public value raise, CUDA's do not exist."""
    properties = torch.mlu.get_device_properties(0)
    assert (properties.name, properties.major, properties.minor) == ("MLU590-M9", 5, 0)
    assert torch.mlu.get_device_capability("mlu:1") == (5, 0)
    assert properties.total_memory == int(94.8 * GIB)
    for field in ("multi_processor_count", "cluster_count", "frequency"):
        with pytest.raises(NotImplementedError, match=f"DeviceProp.{field} was asked"):
            getattr(properties, field)
    for field in ("warp_size", "is_integrated", "gcnArchName"):
        assert not hasattr(properties, field)
    with pytest.raises(AssertionError, match="Invalid device id"):
        torch.mlu.get_device_properties(8)
    assert (torch.mlu.is_bf16_supported(), torch.mlu.is_fp8_supported()) == (True, False)
    assert torch.version.mlu is None
    assert torch.accelerator.current_accelerator().type == "mlu"


@check
def what_has_no_twin_raises() -> None:
    """Graphs, the runtime's C interface, peers and snapshots say that the simulator has none."""
    for act in (
        torch.mlu.MLUGraph,
        torch.mlu.graph_pool_handle,
        torch.mlu.cnrt,
        torch.mlu.memory_snapshot,
        torch.mlu.memory._record_memory_history,
        lambda: torch.mlu.can_device_access_peer(0, 1),
        lambda: torch.mlu.ExternalStream(1),
        lambda: torch.mlu.Event(interprocess=True),
        lambda: torch.mlu.Event().hardware_time(),
    ):
        with pytest.raises(NotImplementedError, match=r"torch\.mlu"):
            act()
    assert not torch.mlu.is_current_stream_capturing()


@check
def current_device() -> None:
    """set_device and the device context choose; other kinds of device and ordinals raise."""
    torch.mlu.set_device(2)
    assert torch.mlu.current_device() == 2
    with torch.mlu.device("mlu:5"):
        assert torch.mlu.current_device() == 5
    torch.mlu.set_device("mlu:0")
    with pytest.raises(ValueError, match="Expected a mlu device"):
        torch.mlu.set_device("cuda:0")
    with pytest.raises(RuntimeError, match="CNRT error"):
        torch.mlu.set_device(9)


@check
def memory_is_counted() -> None:
    """Allocated, peak and reserved bytes follow tensors, for each device alone."""
    torch.mlu.empty_cache()
    before = torch.mlu.memory_allocated(3)
    x = torch.empty(1000, device="mlu:3")
    assert torch.mlu.memory_allocated(3) - before == 4000
    y = x + 1
    del x, y
    assert torch.mlu.memory_allocated("mlu:3") == before
    assert torch.mlu.max_memory_allocated(3) == before + 8000
    assert torch.mlu.memory_reserved(3) == before + 8000
    torch.mlu.empty_cache()
    torch.mlu.reset_peak_memory_stats(3)
    assert torch.mlu.memory_reserved(3) == torch.mlu.max_memory_allocated(3) == before
    assert torch.mlu.mem_get_info(3) == (int(94.8 * GIB) - before, int(94.8 * GIB))
    assert "reserved_bytes" in torch.mlu.memory_summary(3)


@check
def memory_ends() -> None:
    """Beyond the device's memory, or the fraction that was set, torch.OutOfMemoryError is raised and survived."""
    with pytest.raises(torch.OutOfMemoryError, match="MLU out of memory"):
        torch.empty(95 * GIB, dtype=torch.uint8, device="mlu:4")
    torch.mlu.set_per_process_memory_fraction(0.001, 4)
    with pytest.raises(torch.OutOfMemoryError, match="limit of 0.001"):
        torch.empty(GIB, dtype=torch.uint8, device="mlu:4")
    torch.mlu.set_per_process_memory_fraction(1.0, 4)
    assert torch.mlu.memory_stats(4)["num_ooms"] == 2
    with pytest.raises(ValueError, match="between 0 and 1"):
        torch.mlu.set_per_process_memory_fraction(1.5)


@check
def streams_and_events() -> None:
    """Streams can be current and waited for; an event that was never recorded answers True; others are timed."""
    stream, before = torch.mlu.Stream(priority=7), torch.mlu.current_stream()
    with torch.mlu.stream(stream):
        assert torch.mlu.current_stream() == stream
        torch.ones(1, device="mlu").record_stream(stream)
    assert torch.mlu.current_stream() == before == torch.mlu.default_stream()
    stream.wait_stream(before)
    assert torch.mlu.Event().query()
    start, end = torch.mlu.Event(enable_timing=True), torch.mlu.Event(enable_timing=True)
    with pytest.raises(RuntimeError, match="CNRT error: both events must be recorded"):
        start.elapsed_time(end)
    start.record()
    stream.record_event(end)
    assert start.elapsed_time(end) >= 0
    with pytest.raises(RuntimeError, match="enable_timing"):
        start.elapsed_time(stream.record_event())
    stream.synchronize()
    torch.mlu.synchronize("mlu:1")


@check
def random_numbers_repeat() -> None:
    """The same seed or state gives the same numbers, each device its own, and an offset that moves on."""
    torch.manual_seed(7)
    first = torch.rand(4, device="mlu")
    state = torch.mlu.get_rng_state()
    second = torch.rand(4, device="mlu")
    assert not torch.equal(first, second)
    torch.mlu.set_rng_state(state)
    assert torch.equal(torch.rand(4, device="mlu"), second)
    torch.mlu.manual_seed(7)
    assert torch.equal(torch.rand(4, device="mlu"), first)
    host = torch.get_rng_state()
    torch.randn(4, device="mlu")
    torch.nn.functional.dropout(torch.ones(9, device="mlu"), 0.5)
    torch.randperm(5, device="mlu")
    assert torch.equal(torch.get_rng_state(), host)
    assert len(torch.mlu.get_rng_state_all()) == 8
    with pytest.raises(RuntimeError, match="RNG state is wrong size"):
        torch.mlu.set_rng_state(torch.zeros(5, dtype=torch.uint8))


@check
def generators_of_one_s_own() -> None:
    """torch.Generator("mlu") seeds one call; a host's generator is refused."""
    mine = torch.Generator("mlu").manual_seed(5)
    first = torch.randn(3, device="mlu", generator=mine)
    assert torch.equal(first, torch.randn(3, device="mlu", generator=torch.Generator("mlu").manual_seed(5)))
    assert not torch.equal(first, torch.randn(3, device="mlu", generator=mine))
    with pytest.raises(RuntimeError, match="device type"):
        torch.empty(3, device="mlu").normal_(generator=torch.Generator())


@check
def switches() -> None:
    """The TF32 switches hold bools and refuse all else; other names do not exist."""
    assert torch.backends.mlu.matmul.allow_tf32 is False
    torch.backends.cnnl.allow_tf32 = False
    assert torch.backends.cnnl.allow_tf32 is False
    with pytest.raises(RuntimeError, match="takes a bool"):
        torch.backends.mlu.matmul.allow_tf32 = 1
    with pytest.raises(AttributeError):
        torch.backends.mlu.matmul.allow_fp16_reduced_precision_reduction = True
    assert torch.mlu.cnpx.range_push("a") == 0
    assert torch.mlu.cnpx.range_pop() == 0
