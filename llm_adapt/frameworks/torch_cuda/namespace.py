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

from llm_adapt.frameworks.torch_cuda import host, vendor
from llm_adapt.frameworks.torch_cuda.availability import availability
from llm_adapt.frameworks.torch_cuda.devices import DeviceTranslator
from llm_adapt.patching import Patch, Row
from llm_adapt.report import Report

__all__ = ["UNCHANGED", "UNSUPPORTED", "rows"]

_GRAPHS = "run the step eagerly (Megatron: drop --cuda-graph-impl / --enable-cuda-graph)"
_ALLOCATOR = "use the device's default allocator"
UNSUPPORTED = {
    "CUDAGraph": _GRAPHS,
    "graph": _GRAPHS,
    "graph_pool_handle": _GRAPHS,
    "make_graphed_callables": _GRAPHS,
    "CUDAPluggableAllocator": _ALLOCATOR,
    "MemPool": _ALLOCATOR,
    "use_mem_pool": _ALLOCATOR,
    "caching_allocator_alloc": _ALLOCATOR,
    "caching_allocator_delete": _ALLOCATOR,
    "caching_allocator_enable": _ALLOCATOR,
    "caching_allocator_disabled": _ALLOCATOR,
    "change_current_allocator": _ALLOCATOR,
    "get_allocator_backend": _ALLOCATOR,
    "get_per_process_memory_fraction": _ALLOCATOR,
    "memory_snapshot": "use a host profiler",
    "memory_stats_as_nested_dict": "use torch.cuda.memory_stats()",
    "host_memory_stats": "use a host profiler",
    "host_memory_stats_as_nested_dict": "use a host profiler",
    "reset_accumulated_host_memory_stats": "use a host profiler",
    "reset_peak_host_memory_stats": "use a host profiler",
    "ExternalStream": "create a torch.cuda.Stream",
    "get_stream_from_external": "create a torch.cuda.Stream",
    "GreenContext": "use torch.cuda.Stream",
    "current_blas_handle": "CUDA libraries cannot be called here",
    "current_solver_handle": "CUDA libraries cannot be called here",
    "clock_rate": "use the vendor's monitor",
    "power_draw": "use the vendor's monitor",
    "temperature": "use the vendor's monitor",
    "memory_usage": "use torch.cuda.memory_allocated()",
}

UNCHANGED = {
    **dict.fromkeys(
        ("amp", "graphs", "jiterator", "memory", "nccl", "nvtx", "profiler"), "a module; its names are rows"
    ),
    **dict.fromkeys(("random", "sparse", "streams", "tunable"), "a module; its names are rows"),
    **dict.fromkeys(("CudaError", "DeferredCudaCallError", "cudaStatus", "check_error"), "an error type of torch"),
    **dict.fromkeys(("get_arch_list", "get_gencode_flags"), "torch's own answer, nothing compiled, is the truth"),
    **dict.fromkeys(("has_half", "has_magma"), "a constant of the build"),
}

_SUBMODULES = ("memory", "random", "streams", "graphs", "_utils")
_NVTX = ("mark", "range_push", "range_pop", "range_start", "range_end")


def rows(translate: DeviceTranslator, report: Report) -> list[Row]:
    """One row per name of torch.cuda, and per copy of it in a submodule."""
    table: dict[str, Any] = {}
    for name, way_out in UNSUPPORTED.items():
        table[name] = _refusal(
            name, way_out, translate.adapter.title, isinstance(getattr(torch.cuda, name, None), type)
        )
    if translate.is_host:
        table.update(host.functions(translate))
        table.update({name: _no_effect(name, why, report) for name, why in host.NO_EFFECT.items()})
        count: Callable[[], int] = lambda: translate.count  # noqa: E731
    else:
        table.update(vendor.functions(translate))
        count = table["device_count"]
    table.update(availability(translate.target, count, torch.cuda.is_available, torch.cuda.device_count))
    table.update(_legacy_types(translate))
    found: list[Row] = []
    for name, new in table.items():
        found += _with_copies(name, new, f"torch.cuda on {translate.adapter.name}")
    found += [Patch(f"torch.cuda.nvtx:{name}", new, "ranges") for name, new in _nvtx(translate, report).items()]
    return found


def _with_copies(name: str, new: Any, reason: str) -> list[Row]:
    """A row for torch.cuda and for every submodule that holds the same object under that name."""
    original = vars(torch.cuda).get(name)
    found: list[Row] = [Patch(f"torch.cuda:{name}", new, reason, kind="add")]
    for short in _SUBMODULES:
        module = sys.modules.get(f"torch.cuda.{short}")
        if isinstance(module, ModuleType) and original is not None and vars(module).get(name) is original:
            found.append(Patch(f"torch.cuda.{short}:{name}", new, reason, rebind=False))
    return found


def _legacy_types(translate: DeviceTranslator) -> dict[str, Any]:
    """torch.cuda.FloatTensor and its kin are the device's own legacy types."""
    own = torch if translate.is_host else getattr(torch, translate.target)
    names = [name for name in torch.cuda.__all__ if name.endswith(("Tensor", "Storage"))]
    return {name: getattr(own, name) for name in names if hasattr(own, name)}


def _refusal(name: str, way_out: str, title: str, is_class: bool) -> Any:
    """A function, or a class where the original is one, that raises as soon as it is called."""
    message = f"torch.cuda.{name} was asked; {title} has no counterpart through llm_adapt. Way out: {way_out}."

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(message)

    if is_class:
        return type(name, (), {"__init__": refuse, "__doc__": message})
    refuse.__name__, refuse.__doc__ = name, message
    return refuse


def _no_effect(name: str, why: str, report: Report) -> Callable[..., None]:
    def no_effect(*args: Any, **kwargs: Any) -> None:
        report.once(f"torch.cuda.{name}", "no effect", why)

    no_effect.__name__, no_effect.__doc__ = name, why
    return no_effect


def _nvtx(translate: DeviceTranslator, report: Report) -> dict[str, Any]:
    """NVTX ranges: the vendor's own where it has them, else accepted without effect."""
    if not translate.is_host and (found := vendor.ranges(translate)):
        return found
    why = "there is no NVIDIA profiler to show ranges; torch.profiler.record_function works everywhere"
    depth = [0]

    def range_push(msg: str) -> int:
        """Depth of the new range."""
        report.once("torch.cuda.nvtx", "no effect", why)
        depth[0] += 1
        return depth[0] - 1

    def range_pop() -> int:
        """Depth of the range that ends."""
        depth[0] = max(0, depth[0] - 1)
        return depth[0]

    def ignore(*args: Any, **kwargs: Any) -> int:
        """A mark or a free range."""
        report.once("torch.cuda.nvtx", "no effect", why)
        return 0

    table = dict.fromkeys(_NVTX, ignore)
    return {**table, "range_push": range_push, "range_pop": range_pop}
