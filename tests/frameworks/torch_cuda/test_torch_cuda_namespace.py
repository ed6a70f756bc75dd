"""Every name of torch.cuda is accounted for: served, refused with the way out, or left alone for a reason."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import llm_adapt
from llm_adapt.frameworks.torch_cuda import host, namespace
from llm_adapt.report import Report

MODULES = ("", "memory", "random", "streams", "graphs", "profiler", "nvtx", "nccl", "tunable", "sparse")
# Facts about the originals instead of the originals: patch() would replace those here as well.
IDS = {name: id(vars(torch.cuda)[name]) for name in torch.cuda.__all__}
CLASSES = {name for name in torch.cuda.__all__ if isinstance(vars(torch.cuda)[name], type)}
MEMBERS = {name: {key for key in vars(vars(torch.cuda)[name]) if key[0] != "_"} for name in ("Stream", "Event")}
SERVED = ("get_device_name", "set_device", "mem_get_info", "manual_seed", "set_rng_state", "memory_summary", "stream")
PARAMETERS = {name: list(inspect.signature(vars(torch.cuda)[name]).parameters) for name in SERVED}
STREAM = {"synchronize", "wait_event", "wait_stream", "query", "record_event", "cuda_stream", "priority", "stream_id"}
EVENT = {"record", "wait", "query", "synchronize", "elapsed_time", "ipc_handle", "from_ipc_handle"}


def _module(name: str) -> Any:
    return getattr(torch.cuda, name) if name else torch.cuda


@pytest.mark.usefixtures("facade")
def test_every_name_is_accounted_for() -> None:
    """A name of torch.cuda is replaced, or stands in UNCHANGED with the reason, and never both."""
    replaced = {name for name in torch.cuda.__all__ if id(vars(torch.cuda)[name]) != IDS[name]}
    assert set(torch.cuda.__all__) - replaced == set(namespace.UNCHANGED) & set(torch.cuda.__all__)
    assert replaced & set(namespace.UNCHANGED) == set()
    assert all(namespace.UNCHANGED.values())


@pytest.mark.usefixtures("facade")
def test_a_name_without_counterpart_is_refused() -> None:
    """It raises NotImplementedError as soon as it is called, with its name and the way out; a class stays a class."""
    for name in namespace.UNSUPPORTED:
        refused = getattr(torch.cuda, name)
        with pytest.raises(NotImplementedError, match=rf"torch\.cuda\.{name} was asked; .* Way out: \w+"):
            refused()
        assert isinstance(refused, type) == (name in CLASSES)
    for module, names in namespace.UNSUPPORTED_IN.items():
        for name in names:
            with pytest.raises(NotImplementedError, match=rf"torch\.cuda\.{module}\.{name} was asked; .* Way out: \w+"):
                getattr(_module(module), name)()
    from torch.cuda import comm

    for name in namespace.COMM:
        with pytest.raises(NotImplementedError, match=rf"torch\.cuda\.comm\.{name} was asked; .* Way out: \w+"):
            getattr(comm, name)()
    assert set(namespace.COMM) == set(comm.__all__)


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the tables are checked against torch 2.13")
def test_the_tables_are_not_stale() -> None:
    """Every name in a table of the facade exists in torch 2.13."""
    tables = {*namespace.UNSUPPORTED, *namespace.UNCHANGED, *host.NO_EFFECT}
    assert tables <= set(vars(torch.cuda))
    for module, names in namespace.UNSUPPORTED_IN.items():
        assert set(names) <= set(vars(_module(module)))
    assert not set(namespace.UNSUPPORTED) & set(namespace.UNCHANGED)


def test_nothing_is_invented_and_all_is_taken_back() -> None:
    """patch() adds no name to torch.cuda or its submodules, and unpatch() leaves every object as it was."""
    before = {name: dict(vars(_module(name))) for name in MODULES}
    with llm_adapt.patched(device="cpu"):
        for name in MODULES:
            assert set(vars(_module(name))) == set(before[name])
    for name in MODULES:
        now = vars(_module(name))
        assert [key for key in now if now[key] is not before[name][key]] == []


@pytest.mark.usefixtures("facade")
@pytest.mark.parametrize("short", ["memory", "random", "streams", "graphs", "profiler"])
def test_a_submodule_has_the_same_objects(short: str) -> None:
    """`torch.cuda.memory.memory_allocated` and its kin are the objects that torch.cuda has."""
    copies = {name for name in vars(_module(short)) if name in torch.cuda.__all__}
    assert copies
    assert [name for name in copies if getattr(_module(short), name) is not getattr(torch.cuda, name)] == []


@pytest.mark.usefixtures("facade")
def test_streams_and_events_have_the_methods_of_cuda() -> None:
    """The stand-ins have every public method that scripts call on torch.cuda.Stream and Event."""
    assert set(dir(torch.cuda.Stream())) >= STREAM | MEMBERS["Stream"]
    assert set(dir(torch.cuda.Event())) >= EVENT | MEMBERS["Event"]


@pytest.mark.usefixtures("facade")
@pytest.mark.parametrize("name", SERVED)
def test_signatures_are_cuda_s(name: str) -> None:
    """A served function takes the arguments of the original, under the original's names."""
    assert list(inspect.signature(getattr(torch.cuda, name)).parameters) == PARAMETERS[name]


@pytest.mark.usefixtures("facade")
@pytest.mark.parametrize(
    "find",
    [
        lambda: torch.zeros,
        lambda: torch.Tensor.to,
        lambda: torch.Tensor.cuda,
        lambda: torch.fft.fftfreq,
        lambda: torch.cuda.is_available,
        lambda: torch.cuda.synchronize,
        lambda: torch.cuda.memory_allocated,
        lambda: torch.cuda.manual_seed_all,
        lambda: torch.cuda.Stream,
        lambda: torch.cuda.CUDAGraph,
        lambda: torch.cuda.nvtx.range_push,
        lambda: torch.device,
        lambda: torch.Generator,
        lambda: torch.load,
        lambda: torch.get_autocast_gpu_dtype,
        lambda: torch.nn.Module.to,
        lambda: torch.distributed.all_reduce,
        lambda: torch.distributed.new_group,
    ],
)
def test_replacements_pickle_by_name(find: Callable[[], Any]) -> None:
    """A function or class of the facade can be handed to another process, under the name of what it replaces."""
    assert pickle.loads(pickle.dumps(find())) is find()


@pytest.mark.usefixtures("facade")
@pytest.mark.parametrize("name", host.NO_EFFECT)
def test_what_has_no_effect_is_noted_once(name: str, facade: Report) -> None:
    """A call that does nothing on the CPU is accepted, and stands in the report once, with the reason."""
    for _ in range(3):
        assert getattr(torch.cuda, name)(1) is None
    lines = [line for line in facade.lines if line.section == "effect"]
    assert [(line.subject, line.choice) for line in lines] == [(f"torch.cuda.{name}", "no effect")]
    assert lines[0].reason == host.NO_EFFECT[name]


def test_the_memory_history(noted: Callable[[], list[str]]) -> None:
    """torch.cuda.memory._record_memory_history is noted once; a snapshot of it is refused."""
    torch.cuda.memory._record_memory_history(max_entries=10)
    torch.cuda.memory._record_memory_history(enabled=None)
    assert noted() == ["torch.cuda.memory._record_memory_history"]
    with pytest.raises(NotImplementedError, match="_dump_snapshot"):
        torch.cuda.memory._dump_snapshot("snapshot.pickle")


@pytest.mark.usefixtures("facade")
def test_graphs_are_refused() -> None:
    """CUDA graphs raise NotImplementedError at the first call, with the advice to run eagerly."""
    for act in (torch.cuda.CUDAGraph, torch.cuda.graphs.CUDAGraph, lambda: torch.cuda.graph(None)):
        with pytest.raises(NotImplementedError, match="run the step eagerly"):
            act()
    assert torch.cuda.is_current_stream_capturing() is False
