"""Calling: a kernel as a function of all of its op's arguments by position, and what autocast means for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.ops.dispatch.registry import FusedOp, Kernel

__all__ = ["as_autocast", "autocast_dtype", "outside_autocast", "positional"]


def positional(op: FusedOp, kernel: Kernel | None) -> Callable[..., Any]:
    """A kernel, or the reference, as a function of all of the op's arguments by position."""
    function = op.reference if kernel is None else kernel.function
    taken = set(op.signature.parameters) if kernel is None else kernel.honours
    parameters = list(op.signature.parameters.values())
    passed = [p for p in parameters if p.name in taken]
    if len(passed) == len(parameters) and not any(p.kind is p.KEYWORD_ONLY for p in passed):
        return function
    given = ", ".join(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name for p in passed)
    source = f"lambda {', '.join(p.name for p in parameters)}: _function({given})"
    found: Callable[..., Any] = eval(source, {"_function": function})
    return found


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts floating-point tensors of a device to; None where it is off, or not there as on meta."""
    if not device or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def as_autocast(op: FusedOp, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as a kernel gets them: inside autocast those that the op declares are cast as torch's own do."""
    if not op.autocast or not torch._C._is_any_autocast_enabled():
        return arguments
    dtype = autocast_dtype(_device_of(arguments[op.autocast[0]]))
    return arguments | {name: _cast(arguments[name], dtype) for name in op.autocast}


def outside_autocast(op: FusedOp, function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Call with autocast off, which would cast inside the kernel; the op's own casts are made first.

    To the dtype that is in force now: what is bound is bound for it.
    """
    if not device or not torch.amp.is_autocast_available(device):
        return function
    is_cast = [name in op.autocast for name in op.signature.parameters]
    dtype = autocast_dtype(device)

    def without_autocast(*arguments: Any) -> Any:
        arguments = tuple(_cast(item, dtype) if cast else item for item, cast in zip(arguments, is_cast, strict=True))
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return without_autocast


def _device_of(value: Any) -> str:
    return value.device.type if isinstance(value, torch.Tensor) else ""


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return value.to(dtype) if is_float and dtype is not None else value
