"""torch.distributed on this device's collective library: nccl by name, groups, meshes, DDP and FSDP."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.torch_cuda import data_parallel, gathering
from llm_adapt.frameworks.torch_cuda.availability import IsTold
from llm_adapt.frameworks.torch_cuda.devices import DeviceTranslator
from llm_adapt.parallel.backends import NcclOptions, ProcessGroupNCCL, translate_backend
from llm_adapt.patching import Patch, Row
from llm_adapt.report import Report

__all__ = ["rows"]

Wrap = Callable[[Any], Any]
_C10D = ("torch.distributed.distributed_c10d", "torch.distributed")
_MESH = "torch.distributed.device_mesh"


def rows(context: Context, translate: DeviceTranslator, is_told: IsTold) -> list[Row]:
    """Rows for everything in torch.distributed that takes a backend or a device."""
    if not torch.distributed.is_available():
        context.report.add("patch", "torch.distributed", "left alone", "this torch is built without it", "skipped")
        return []
    arguments = functools.partial(_group_arguments, context=context, translate=translate)
    stands = "nccl stands for this device's library"
    found = _everywhere("init_process_group", arguments, stands)
    found += _groups(context, arguments)
    found += _everywhere("is_nccl_available", functools.partial(_nccl_available, is_told=is_told), stands)
    found += _everywhere("is_backend_available", _backend_available, stands)
    if not translate.is_host:  # gloo may be what the script asked for; a vendor's library is not
        told = functools.partial(_told_backend, own=context.adapter.backend, is_told=is_told)
        found += _everywhere("get_backend", told, "this device's library is what the script calls nccl")
        found += gathering.rows()
    found += [
        Patch(f"{module}:ProcessGroupNCCL", ProcessGroupNCCL, "a name to fill options in", kind="add")
        for module in _C10D
    ]
    mesh_type = functools.partial(_mesh_type, translate=translate)
    return [
        *found,
        Patch(f"{_MESH}:DeviceMesh.__init__", mesh_type, "a mesh of this device", kind="wrap"),
        Patch(f"{_MESH}:init_device_mesh", mesh_type, "a mesh of this device", kind="wrap"),
        Patch("torch.distributed:init_device_mesh", mesh_type, "a mesh of this device", kind="wrap"),
        *data_parallel.rows(translate, context.report),
    ]


def _groups(context: Context, arguments: Wrap) -> list[Row]:
    """new_group, and on gloo also what gloo lacks."""
    if context.adapter.backend != "gloo":
        found = _everywhere("new_group", arguments, "nccl is this device's library", (*_C10D, _MESH))
        return found + (_averages(context) if "AVG" in context.adapter.missing_reduce_ops else [])
    from llm_adapt.parallel import collectives
    from llm_adapt.parallel.groups import GroupCache

    c10d = torch.distributed.distributed_c10d
    cache = GroupCache(c10d.new_group, c10d.destroy_process_group)
    shared = arguments(_like(c10d.new_group, cache.new_group))
    destroy = _like(c10d.destroy_process_group, functools.partial(_destroy, cache=cache, report=context.report))
    kept = "a shared group goes with the default group"
    found = _everywhere("new_group", lambda original: shared, "one gloo group per set of ranks", (*_C10D, _MESH))
    found += _everywhere("destroy_process_group", lambda original: destroy, kept)
    lacking: dict[str, Wrap] = {
        "all_reduce": collectives.premultiplied,
        "reduce": collectives.premultiplied_reduce,
        "reduce_scatter": collectives.premultiplied,
        "reduce_scatter_tensor": collectives.flat_scatter,
        "all_gather_into_tensor": collectives.flat_gather,
        "_coalescing_manager": collectives.uncoalesced,
        **dict.fromkeys(("all_gather", "broadcast", "all_to_all_single", "all_to_all"), collectives.bytewise),
        **dict.fromkeys(("gather", "scatter", "send", "recv", "irecv"), collectives.bytewise),
        "isend": collectives.pending_send,
    }
    for name, wrap in lacking.items():
        found += _everywhere(name, wrap, "PREMUL_SUM, float8, flat shapes, coalescing and pending sends on gloo")
    return found


def _averages(context: Context) -> list[Row]:
    """AVG where the library has none."""
    from llm_adapt.parallel.averages import averaged

    wrap = functools.partial(averaged, backend=context.adapter.backend)
    names = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single")
    there = [name for name in names if hasattr(torch.distributed, name)]
    return [row for name in there for row in _everywhere(name, wrap, f"{context.adapter.backend} has no AVG")]


def _destroy(group: Any = None, *, cache: Any, report: Report) -> None:
    if not cache.destroy(group):
        report.once("destroy_process_group(group)", "kept", "gloo groups are shared; they end with the default group")


def _like(original: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the original's name and signature that calls a method."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return call


def _everywhere(name: str, wrap: Wrap, reason: str, modules: tuple[str, ...] = _C10D) -> list[Row]:
    """Rows for a c10d function under all of its names, bound to one and the same object."""
    once = functools.lru_cache(maxsize=None)(wrap)
    return [Patch(f"{module}:{name}", once, reason, kind="wrap") for module in modules]


def _nccl_available(original: Callable[[], bool], is_told: IsTold) -> Callable[[], bool]:
    @functools.wraps(original)
    def is_nccl_available() -> bool:
        return is_told(sys._getframe(1).f_globals.get("__name__", "")) or original()

    return is_nccl_available


def _told_backend(original: Callable[..., str], own: str, is_told: IsTold) -> Callable[..., str]:
    @functools.wraps(original)
    def get_backend(group: Any = None) -> str:
        """nccl for this device's library, to code that knows only CUDA; the truth to code that knows this device."""
        backend = original(group)
        return "nccl" if backend == own and is_told(sys._getframe(1).f_globals.get("__name__", "")) else backend

    return get_backend


def _backend_available(original: Callable[[str], bool]) -> Callable[[str], bool]:
    return functools.wraps(original)(lambda backend: backend.lower() == "nccl" or original(backend))


def _group_arguments(original: Callable[..., Any], context: Context, translate: DeviceTranslator) -> Callable[..., Any]:
    """Translate backend, pg_options and device_id of init_process_group and new_group, however they are given."""
    signature = inspect.signature(original)
    adapter, report = context.adapter, context.report

    @functools.wraps(original)
    def with_backend(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        asked = call.arguments
        if "backend" in asked:
            backend = translate_backend(asked["backend"], adapter)
            if backend != asked["backend"]:
                report.once(f"backend={asked['backend']!r}", backend, f"collectives of {adapter.name}")
            asked["backend"] = backend
        if isinstance(asked.get("pg_options"), NcclOptions):
            report.once("pg_options", "no effect", f"NCCL options mean nothing to {adapter.backend}")
            asked["pg_options"] = None
        if asked.get("device_id") is not None:
            asked["device_id"] = translate(asked["device_id"])
            if adapter.backend in ("gloo", "cncl"):
                # gloo has no device to bind; cncl was seen to hang with one. Workaround: cncl-device-id
                report.once("device_id", "no effect", f"{adapter.backend} binds no device")
                asked["device_id"] = None
        return original(*call.args, **call.kwargs)

    return with_backend


def _mesh_type(original: Callable[..., Any], translate: DeviceTranslator) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def with_device_type(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        if call.arguments.get("device_type") == "cuda":
            call.arguments["device_type"] = translate.target
        return original(*call.args, **call.kwargs)

    return with_device_type
