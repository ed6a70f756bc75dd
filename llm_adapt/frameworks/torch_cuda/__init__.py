"""torch.cuda code on a device that is not CUDA: one facade for the CPU, Ascend NPU and Cambricon MLU.

CUDA and DCU need none. The rooms: devices (translation), tensors (entry points that take a device), namespace
(torch.cuda.*; host and vendor are its two answers), availability (who is told that CUDA is there), amp,
serialization, distributed, tooling.
"""

from __future__ import annotations

from typing import Any

from llm_adapt.frameworks.context import Context
from llm_adapt.patching import Row

__all__ = ["rows"]


def rows(context: Context) -> list[Row]:
    """All rows of the facade; none where the device is torch.cuda itself."""
    if not context.adapter.needs_facade:
        context.report.add("patch", "torch.cuda", "left alone", f"{context.adapter.title} is torch.cuda")
        return []
    import torch

    from llm_adapt.frameworks.torch_cuda import amp, devices, distributed, namespace, serialization, tensors, tooling

    is_host = context.adapter.device_type == "cpu"
    count = devices.logical_devices(context.settings.cpu_devices) if is_host else _vendor_count(torch, context)
    translate = devices.DeviceTranslator(context.adapter, count)
    child = {
        "device": context.adapter.name,
        "strict": context.settings.strict,
        "cpu_devices": context.settings.cpu_devices,
    }
    found: list[Row] = []
    found += devices.rows(translate)
    found += tooling.script_builtins(tensors.rows(translate, context.report))
    found += namespace.rows(translate, context.report)
    found += amp.rows(translate)
    found += serialization.rows(translate)
    found += distributed.rows(context, translate)
    found += tooling.rows(translate, context.report, child)
    return found


def _vendor_count(torch: Any, context: Context) -> int:
    return int(getattr(torch, context.adapter.device_type).device_count())
