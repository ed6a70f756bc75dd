"""torch.distributed on this device's collective library: nccl by name, groups, meshes, DDP and FSDP."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.torch_cuda.devices import DeviceTranslator
from llm_adapt.parallel.backends import NcclOptions, ProcessGroupNCCL, translate_backend
from llm_adapt.patching import Patch, Row

__all__ = ["rows"]

Wrap = Callable[[Any], Any]
_C10D = ("torch.distributed.distributed_c10d", "torch.distributed")
_MESH = "torch.distributed.device_mesh"


def rows(context: Context, translate: DeviceTranslator) -> list[Row]:
    """Rows for everything in torch.distributed that takes a backend or a device."""
    if not torch.distributed.is_available():
        context.report.add("patch", "torch.distributed", "left alone", "this torch is built without it", "skipped")
        return []
    arguments = functools.partial(_group_arguments, context=context, translate=translate)
    found = _everywhere("init_process_group", arguments, "nccl is this device's library")
    found += _groups(context, arguments)
    found += _everywhere("is_nccl_available", lambda original: lambda: True, "nccl stands for this device's library")
    found += _everywhere("is_backend_available", _backend_available, "nccl stands for this device's library")
    found += [
        Patch(f"{module}:ProcessGroupNCCL", ProcessGroupNCCL, "a name to fill options in", kind="add")
        for module in _C10D
    ]
    mesh_type = functools.partial(_mesh_type, translate=translate)
    found += [
        Patch(f"{_MESH}:DeviceMesh.__init__", mesh_type, "a mesh of this device", kind="wrap"),
        Patch(f"{_MESH}:init_device_mesh", mesh_type, "a mesh of this device", kind="wrap"),
        Patch("torch.distributed:init_device_mesh", mesh_type, "a mesh of this device", kind="wrap"),
        Patch(
            "torch.nn.parallel.distributed:DistributedDataParallel.__init__",
            functools.partial(_ddp, translate=translate),
            "device_ids name this device",
            kind="wrap",
        ),
        Patch(
            "torch.distributed.fsdp.fully_sharded_data_parallel:FullyShardedDataParallel.__init__",
            functools.partial(_fsdp, translate=translate),
            "device_id names this device",
            kind="wrap",
        ),
    ]
    return found


def _groups(context: Context, arguments: Wrap) -> list[Row]:
    """new_group, and on gloo also what gloo lacks."""
    if context.adapter.backend != "gloo":
        return _everywhere("new_group", arguments, "nccl is this device's library")
    from llm_adapt.parallel.collectives import bytewise, flat_gather, flat_scatter, premultiplied
    from llm_adapt.parallel.groups import GroupCache

    c10d = torch.distributed.distributed_c10d
    cache = GroupCache(c10d.new_group, c10d.destroy_process_group)
    shared = arguments(_like(c10d.new_group, cache.new_group))
    destroy = _like(c10d.destroy_process_group, cache.destroy)
    found = _everywhere("new_group", lambda original: shared, "one gloo group per set of ranks")
    found += _everywhere("destroy_process_group", lambda original: destroy, "a shared group goes with its last user")
    lacking: dict[str, Wrap] = {
        "all_reduce": premultiplied,
        "reduce": premultiplied,
        "reduce_scatter_tensor": flat_scatter,
        "all_gather_into_tensor": flat_gather,
        **dict.fromkeys(("all_gather", "broadcast", "all_to_all_single", "all_to_all"), bytewise),
        **dict.fromkeys(("gather", "scatter", "send", "recv", "isend", "irecv"), bytewise),
    }
    for name, wrap in lacking.items():
        found += _everywhere(name, wrap, "PREMUL_SUM, float8 and flat shapes on gloo")
    return found


def _like(original: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the original's name and signature that calls a method."""
    return functools.wraps(original)(lambda *args, **kwargs: method(*args, **kwargs))


def _everywhere(name: str, wrap: Wrap, reason: str) -> list[Row]:
    """Rows for a c10d function under both of its names, bound to one and the same object."""
    once = functools.lru_cache(maxsize=None)(wrap)
    return [Patch(f"{module}:{name}", once, reason, kind="wrap") for module in _C10D]


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
                # gloo has no device to bind; cncl was seen to hang with one (docs/workarounds.md).
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


def _ddp(original: Callable[..., None], translate: DeviceTranslator) -> Callable[..., None]:
    @functools.wraps(original)
    def init(
        self: Any, module: Any, device_ids: Any = None, output_device: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if translate.is_host:
            device_ids = output_device = None  # torch refuses device ids for a module on the CPU
        else:
            device_ids = None if device_ids is None else [translate(item) for item in device_ids]
            output_device = translate(output_device)
        original(self, module, device_ids, output_device, *args, **kwargs)

    return init


def _fsdp(original: Callable[..., None], translate: DeviceTranslator) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, module: Any, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        original(self, module, *args, device_id=translate(device_id), **kwargs)

    return init
