"""DataParallel, DistributedDataParallel and FullyShardedDataParallel. (fully_shard asks its mesh: no rows.)"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from llm_adapt.frameworks.torch_cuda.devices import REAL_DEVICE, DeviceTranslator
from llm_adapt.patching import Patch, Row
from llm_adapt.report import Report

__all__ = ["rows"]

_DDP = "torch.nn.parallel.distributed:DistributedDataParallel"
_FSDP = "torch.distributed.fsdp.fully_sharded_data_parallel:FullyShardedDataParallel"
_BFLOAT16_HOOKS = ("bf16_compress_hook", "bf16_compress_wrapper_hook")


def rows(translate: DeviceTranslator, report: Report) -> list[Row]:
    """Rows for the device arguments of both, and for what they ask of CUDA."""
    ddp = functools.partial(_ddp, translate=translate, report=report)
    fsdp = functools.partial(_fsdp, translate=translate)
    found: list[Row] = [
        Patch(f"{_DDP}.__init__", ddp, "device_ids name this device", kind="wrap"),
        Patch(f"{_DDP}._check_comm_hook", _comm_hook, "bfloat16 needs no version of CUDA and NCCL", kind="wrap"),
        Patch(f"{_FSDP}.__init__", fsdp, "device_id names this device", kind="wrap"),
    ]
    if translate.is_host:
        found += _host_rows(report)
    return found


def _host_rows(report: Report) -> list[Row]:
    """What differs when device memory and host memory are one."""
    offload, single = functools.partial(_offload, report=report), functools.partial(_single, report=report)
    why = "torch 2.13 reads freed memory when it offloads from the CPU to the CPU"
    states = "torch.distributed.fsdp._init_utils:_check_module_states_for_sync_module_states"
    return [
        Patch("torch.distributed.fsdp.api:FullStateDictConfig.__init__", offload, why, kind="wrap"),
        Patch(states, _on_device, "sync_module_states: this device is the CPU", optional=True, versions="torch 2.0 on"),
        Patch("torch.nn.parallel.data_parallel:DataParallel.__init__", single, "one memory, one replica", kind="wrap"),
    ]


def _on_device(module_states: Any) -> None:
    """FSDP refuses parameters in host memory here; they are on the device."""


def _single(original: Callable[..., None], report: Report) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        report.once("nn.DataParallel", "one replica", "the CPU's ordinals are one device; the whole batch goes to it")
        original(self, *args, **kwargs)

    return init


def _ddp(original: Callable[..., None], translate: DeviceTranslator, report: Report) -> Callable[..., None]:
    @functools.wraps(original)
    def init(
        self: Any, module: Any, device_ids: Any = None, output_device: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if translate.is_host:
            if device_ids or output_device is not None:
                report.once("DDP(device_ids=...)", "left out", "torch takes none for a module in host memory")
            device_ids = output_device = None
        else:
            device_ids = None if device_ids is None else [translate(item) for item in device_ids]
            output_device = translate(output_device)
        original(self, module, device_ids, output_device, *args, **kwargs)

    return init


def _comm_hook(original: Callable[..., None]) -> Callable[..., None]:
    """torch's bfloat16 hooks are refused without CUDA 11 and NCCL 2.10; this device's library has its own word."""

    @functools.wraps(original)
    def check(self: Any, hook: Any) -> None:
        if getattr(hook, "__name__", "") not in _BFLOAT16_HOOKS:
            original(self, hook)

    return check


def _fsdp(original: Callable[..., None], translate: DeviceTranslator) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        asked = call.arguments
        asked["device_id"] = translate(asked.get("device_id"))
        if translate.is_host and asked["device_id"] is None:  # without one FSDP wants an accelerator
            asked["device_id"] = REAL_DEVICE("cpu")
        original(*call.args, **call.kwargs)

    return init


def _offload(original: Callable[..., None], report: Report) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, offload_to_cpu: bool = False, *args: Any, **kwargs: Any) -> None:
        if offload_to_cpu:
            report.once("FullStateDictConfig(offload_to_cpu=True)", "no effect", "the parameters are in host memory")
        original(self, False, *args, **kwargs)

    return init
