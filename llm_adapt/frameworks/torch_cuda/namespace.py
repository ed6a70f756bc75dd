"""The names of torch.cuda and its submodules, for any device that is not CUDA.

Every public name is accounted for: served by the device, refused with the way out, or left alone because it
already works. tests/frameworks/torch_cuda/test_namespace.py compares this with the installed torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from llm_adapt.frameworks.torch_cuda import cudart, host, nvtx, vendor
from llm_adapt.frameworks.torch_cuda.availability import IsTold, availability, properties
from llm_adapt.frameworks.torch_cuda.devices import DeviceTranslator
from llm_adapt.patching import Patch, Row
from llm_adapt.report import Report

__all__ = ["COMM", "UNCHANGED", "UNSUPPORTED", "UNSUPPORTED_IN", "rows"]

_GRAPHS = "run the step eagerly (Megatron: drop --cuda-graph-impl / --enable-cuda-graph)"
_ALLOCATOR = "use the device's default allocator"
_MONITOR = "use the vendor's monitor"
_PROFILER = "use a host profiler"
UNSUPPORTED = {
    **dict.fromkeys(("CUDAGraph", "graph", "graph_pool_handle", "make_graphed_callables"), _GRAPHS),
    **dict.fromkeys(("CUDAPluggableAllocator", "MemPool", "use_mem_pool", "change_current_allocator"), _ALLOCATOR),
    **dict.fromkeys(("caching_allocator_alloc", "caching_allocator_delete"), _ALLOCATOR),
    **dict.fromkeys(("caching_allocator_enable", "caching_allocator_disabled"), _ALLOCATOR),
    **dict.fromkeys(("get_allocator_backend", "get_per_process_memory_fraction"), _ALLOCATOR),
    **dict.fromkeys(("memory_snapshot", "host_memory_stats", "host_memory_stats_as_nested_dict"), _PROFILER),
    **dict.fromkeys(("reset_accumulated_host_memory_stats", "reset_peak_host_memory_stats"), _PROFILER),
    "memory_stats_as_nested_dict": "use torch.cuda.memory_stats()",
    **dict.fromkeys(("ExternalStream", "get_stream_from_external", "GreenContext"), "create a torch.cuda.Stream"),
    **dict.fromkeys(("current_blas_handle", "current_solver_handle"), "CUDA libraries cannot be called here"),
    **dict.fromkeys(("clock_rate", "power_draw", "temperature"), _MONITOR),
    "memory_usage": "use torch.cuda.memory_allocated()",
}
# Names that only a submodule has: submodule -> names -> way out.
UNSUPPORTED_IN = {
    "memory": dict.fromkeys(("_snapshot", "_dump_snapshot"), _PROFILER),
    "nccl": dict.fromkeys((*torch.cuda.nccl.__all__, "init_rank", "unique_id", "version"), "use torch.distributed"),
    "tunable": dict.fromkeys(torch.cuda.tunable.__all__, "leave TunableOp off: it tunes cuBLAS"),
}

# torch.cuda.comm is torch.nn.parallel.comm.
COMM = ("broadcast", "broadcast_coalesced", "gather", "reduce_add", "reduce_add_coalesced", "scatter")

UNCHANGED = {
    **dict.fromkeys(
        ("amp", "graphs", "jiterator", "memory", "nccl", "nvtx", "profiler"), "a module; its names are rows"
    ),
    **dict.fromkeys(("random", "sparse", "streams", "tunable"), "a module; its names are rows"),
    **dict.fromkeys(("CudaError", "DeferredCudaCallError", "cudaStatus"), "an error type of torch"),
    **dict.fromkeys(("get_arch_list", "get_gencode_flags"), "torch's own answer, nothing compiled, is the truth"),
    **dict.fromkeys(("has_half", "has_magma"), "a constant of the build"),
}

_SUBMODULES = ("memory", "random", "streams", "graphs", "profiler", "_utils")


def rows(translate: DeviceTranslator, report: Report, is_told: IsTold) -> list[Row]:
    """One row per name of torch.cuda, per copy of it in a submodule, and per name that only a submodule has."""
    table: dict[str, Any] = {name: _refusal(name, way_out, translate) for name, way_out in UNSUPPORTED.items()}
    if translate.is_host:
        table.update(host.functions(translate, report))
        table.update({name: _no_effect(name, why, report) for name, why in host.NO_EFFECT.items()})
        count: Callable[[], int] = lambda: translate.count  # noqa: E731
    else:
        table.update(vendor.functions(translate))
        count = table["device_count"]
    table.update(availability(is_told, count, torch.cuda.is_available, torch.cuda.device_count))
    shown = "get_device_properties"
    if shown in table:
        table[shown] = properties(is_told, table[shown], torch.cuda.get_device_properties)
    table.update(_legacy_types(torch.cuda, _own_module(translate)))
    for name in set(torch.cuda.__all__) - set(table) - set(UNCHANGED):  # the vendor has none, or torch is newer
        table[name] = _refusal(name, f"it is not in torch.{translate.target}", translate)
    table.update(cudart.functions(report, table["mem_get_info"]))
    found: list[Row] = []
    for name, new in table.items():
        found += _with_copies(name, new, f"torch.cuda on {translate.adapter.name}")
    if not translate.is_host:
        found += vendor.stream_handles(translate)
    return found + nvtx.rows(translate, report) + _submodules(translate, report) + _comm(translate)


def _with_copies(name: str, new: Any, reason: str) -> list[Row]:
    """A row for torch.cuda and for every submodule that holds the same object under that name."""
    if name not in vars(torch.cuda):
        return []  # an older torch; nothing is invented
    original = vars(torch.cuda)[name]
    found: list[Row] = [Patch(f"torch.cuda:{name}", new, reason)]
    for short in _SUBMODULES:
        module = sys.modules.get(f"torch.cuda.{short}")
        if isinstance(module, ModuleType) and vars(module).get(name) is original:
            found.append(Patch(f"torch.cuda.{short}:{name}", new, reason, rebind=False))
    return found


def _submodules(translate: DeviceTranslator, report: Report) -> list[Row]:
    """Names that torch.cuda itself does not have."""
    table = {
        (module, name): _refusal(f"{module}.{name}", way_out, translate)
        for module, names in UNSUPPORTED_IN.items()
        for name, way_out in names.items()
    }
    why = f"{translate.adapter.title} has no allocator of CUDA's; use a host profiler"
    table["memory", "_record_memory_history"] = _no_effect("memory._record_memory_history", why, report)
    if not translate.is_host:
        table |= {("memory", name): new for name, new in vendor.memory_history(translate).items()}
    sparse_types = _legacy_types(torch.cuda.sparse, getattr(_own_module(translate), "sparse", None))
    table |= {("sparse", name): new for name, new in sparse_types.items()}
    why = f"torch.cuda on {translate.adapter.name}"
    return [
        Patch(f"torch.cuda.{module}:{name}", new, why)
        for (module, name), new in table.items()
        if hasattr(getattr(torch.cuda, module), name)  # else an older torch; nothing is invented
    ]


def _comm(translate: DeviceTranslator) -> list[Row]:
    """Copies between the devices of one process, where torch is built without them."""
    if hasattr(torch._C, "_broadcast"):
        return []
    way_out = "start one process per device and use torch.distributed"
    return [
        Patch(f"torch.nn.parallel.comm:{name}", _refusal(f"comm.{name}", way_out, translate), "torch has none here")
        for name in COMM
    ]


def _own_module(translate: DeviceTranslator) -> Any:
    return torch if translate.is_host else getattr(torch, translate.target)


def _legacy_types(cuda: ModuleType, own: Any) -> dict[str, Any]:
    """torch.cuda.FloatTensor and its kin are the device's own legacy types."""
    names = [name for name in vars(cuda) if name.endswith(("Tensor", "Storage")) and name[0] != "_"]
    return {name: getattr(own, name) for name in names if hasattr(own, name)}


def _refusal(name: str, way_out: str, translate: DeviceTranslator) -> Any:
    """A function, or a class where the original is one, that raises as soon as it is called."""
    message = f"torch.cuda.{name} was asked; {translate.adapter.title} has no counterpart. Way out: {way_out}."

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(message)

    if isinstance(getattr(torch.cuda, name, None), type):
        return type(name, (), {"__init__": refuse, "__doc__": message, "__module__": __name__})
    refuse.__doc__ = message
    return refuse


def _no_effect(name: str, why: str, report: Report) -> Callable[..., None]:
    def no_effect(*args: Any, **kwargs: Any) -> None:
        report.once(f"torch.cuda.{name}", "no effect", why)

    no_effect.__doc__ = why
    return no_effect
