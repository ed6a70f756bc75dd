"""torch.cuda code on a device that is not CUDA: one facade for the CPU, Ascend NPU and Cambricon MLU.

CUDA and DCU need none. The rooms: devices (translation), tensors and tensor_types (entry points that take a
device, and what a tensor says of its place), namespace (torch.cuda.*; host and vendor are its two answers),
accelerator, availability (who is told that CUDA is there), modules (a moved Parameter stays itself), amp, switches,
serialization, distributed, tooling, compiler.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

from llm_adapt.frameworks.context import Context
from llm_adapt.patching import Patch, Row

__all__ = ["rows"]


def rows(context: Context) -> list[Row]:
    """All rows of the facade; none where the device is torch.cuda itself."""
    adapter, settings, report = context.adapter, context.settings, context.report
    if not adapter.needs_facade:
        report.add("patch", "torch.cuda", "left alone", f"{adapter.title} is torch.cuda")
        if settings.simulate is None:
            return []
        from llm_adapt.frameworks.torch_cuda.tooling import spawned_children

        return [
            spawned_children(dataclasses.asdict(settings))
        ]  # they must simulate the device before they import torch
    import torch

    from llm_adapt.frameworks.torch_cuda import (
        accelerator,
        amp,
        availability,
        compiler,
        devices,
        distributed,
        libraries,
        modules,
        namespace,
        serialization,
        switches,
        tensor_types,
        tensors,
        tooling,
    )

    is_host = adapter.device_type == "cpu"
    count = devices.logical_devices(settings.cpu_devices) if is_host else _vendor_count(torch, context)
    translate = devices.DeviceTranslator(adapter, count)
    is_told = availability.is_told_on(translate.target)
    found: list[Row] = [
        *devices.rows(translate, is_told),
        *tensors.rows(translate, report),
        *tensor_types.rows(translate, is_told),
        *modules.rows(translate),
        *namespace.rows(translate, report, is_told),
        *accelerator.rows(translate, report, is_told),
        *amp.rows(translate),
        *switches.rows(report, translate.is_host),
        *serialization.rows(translate, is_told),
        *libraries.rows(translate),
        *distributed.rows(context, translate, is_told),
        *tooling.rows(translate, report, dataclasses.asdict(settings)),
    ]
    found += compiler.rows(translate, is_told, found)
    return [_named(row) for row in tooling.script_builtins(found)]


def _vendor_count(torch: Any, context: Context) -> int:
    return int(getattr(torch, context.adapter.device_type).device_count())


def _named(row: Row) -> Row:
    """The row with a replacement that answers to the name it is installed under: pickle finds it by that name."""
    if not isinstance(row, Patch):
        return row
    if row.kind != "wrap":
        return dataclasses.replace(row, new=_answering(row.new, row.target))
    wrap = row.new
    return dataclasses.replace(row, new=lambda original: _answering(wrap(original), row.target))


def _answering(new: Any, target: str) -> Any:
    module, _, name = target.partition(":")
    home = new.__globals__["__name__"] if isinstance(new, types.FunctionType) else getattr(new, "__module__", None)
    if isinstance(new, (types.FunctionType, type)) and str(home).partition(".")[0] == "llm_adapt":
        new.__module__, new.__qualname__, new.__name__ = module, name, name.rpartition(".")[2]
    return new
