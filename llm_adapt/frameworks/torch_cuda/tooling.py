"""What stands around the tensors: TorchScript, child processes, the profiler, the data loader, the optimizers."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

from llm_adapt.frameworks.torch_cuda.devices import DeviceTranslator
from llm_adapt.patching import Entry, Patch, Row, split_target
from llm_adapt.report import Report

__all__ = ["rows", "script_builtins"]


def rows(translate: DeviceTranslator, report: Report, child_arguments: dict[str, Any]) -> list[Row]:
    """Rows for child processes, the data loader, the profiler and the optimizers.

    Args:
        child_arguments: patch() arguments with which a spawned child patches itself.
    """
    found: list[Row] = [
        spawned_children(child_arguments),
        Patch(
            "torch.utils.data.dataloader:DataLoader.__init__",
            functools.partial(_data_loader, translate=translate, report=report),
            "pin_memory for this device",
            kind="wrap",
        ),
        Patch(
            "torch.profiler.profiler:_KinetoProfile.__init__",
            functools.partial(_profile, report=report, title=translate.adapter.title),
            "ProfilerActivity.CUDA where no CUDA is",
            kind="wrap",
        ),
    ]
    return found + (_optimizers() if translate.is_host else [])


def spawned_children(child_arguments: dict[str, Any]) -> Row:
    """Children that multiprocessing spawns patch themselves with these arguments of patch()."""
    return Patch(
        "multiprocessing.spawn:get_preparation_data",
        functools.partial(_prepare_child, child_arguments=child_arguments),
        "spawned processes patch themselves before they import the script",
        kind="wrap",
    )


class PatchChild:
    """Unpickled by a spawned child before it imports its main module; unpickling it patches the child.

    It unpickles as a line of code, because the child knows its parent's sys.path, and with it llm_adapt, only
    after unpickling.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        paths = f"import sys; sys.path[:] = {sys.path!r}"
        return exec, (f"{paths}; from llm_adapt.session import patch_child; patch_child({self.arguments!r})", {})


def _prepare_child(original: Callable[..., dict[str, Any]], child_arguments: dict[str, Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_preparation_data(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**original(*args, **kwargs), "llm_adapt": PatchChild(child_arguments)}

    return get_preparation_data


def _data_loader(original: Callable[..., None], translate: DeviceTranslator, report: Report) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        asked = call.arguments
        if asked.get("pin_memory") and translate.is_host:
            report.once("DataLoader(pin_memory=True)", "no effect", "host memory needs no pinning on the CPU")
            asked["pin_memory"] = False
        if asked.get("pin_memory_device"):
            asked["pin_memory_device"] = "" if translate.is_host else str(translate(asked["pin_memory_device"]))
        original(*call.args, **call.kwargs)

    return init


def _profile(original: Callable[..., None], report: Report, title: str) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, *args: Any, activities: Iterable[Any] | None = None, **kwargs: Any) -> None:
        from torch.profiler import ProfilerActivity

        if activities is not None:
            activities = set(activities)
            if ProfilerActivity.CUDA in activities:
                report.once("ProfilerActivity.CUDA", "left out", f"torch.profiler records no {title} activity")
                activities = (activities - {ProfilerActivity.CUDA}) or {ProfilerActivity.CPU}
        original(self, *args, activities=activities, **kwargs)

    return init


def _optimizers() -> list[Row]:
    """Rows by which optimizers with capturable=True compute in host memory; every module of torch.optim has a copy."""
    import torch.optim  # noqa: F401  (sys.modules has its modules)

    name, why = "_get_capturable_supported_devices", "capturable=True is right without a graph, too"
    modules = [module for module in sys.modules if module.startswith("torch.optim.")]
    return [
        Patch(f"{module}:{name}", _capturable, why, versions="torch 2.2 on", rebind=False)
        for module in sorted(modules)
        if hasattr(sys.modules[module], name)  # an older torch has none
    ]


def _capturable(supports_xla: bool = True) -> list[str]:
    """Devices of optimizers with capturable=True; torch.jit.script compiles this text when it compiles one of them."""
    found = ["cuda", "xpu", "hpu", "cpu"]
    if supports_xla:
        found.append("xla")
    return found


def script_builtins(rows: Iterable[Row]) -> list[Row]:
    """Wrap the rows of TorchScript builtins so that torch.jit.script still recognises them.

    TorchScript finds builtins by the identity of the function or type: the wrapper gets the entry of the
    original, and compiled code calls the operator itself (a device in scripted code is not translated).
    """
    import torch
    from torch.jit._builtins import _get_builtin_table  # Workaround: script-builtins

    table = _get_builtin_table()
    modules = {"torch": torch, "torch.fft": torch.fft}
    found: list[Row] = []
    for row in rows:
        module, name = split_target(row.target)
        original = getattr(modules.get(module), name, None) if isinstance(row, Patch) else None
        operator = table.get(id(original)) if original is not None else None
        if operator is None or not isinstance(row, Patch):
            found.append(row)
            continue
        wrapper = row.new(original) if row.kind == "wrap" else row.new
        found.append(Patch(row.target, wrapper, row.reason))
        found.append(
            Entry(
                "torch.jit._builtins:_builtin_table",
                operator,
                "torch.jit.script knows it",
                key=id(wrapper),
                label=row.target,
            )
        )
    return found
