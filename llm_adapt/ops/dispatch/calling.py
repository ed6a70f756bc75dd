"""Calling: a kernel as a function of all of its op's arguments by position, and what autocast means for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.ops.dispatch.registry import FusedOp, Kernel

__all__ = ["as_autocast", "outside_autocast", "positional"]


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


def as_autocast(op: FusedOp, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as a kernel gets them: inside autocast those that the op declares are cast as torch's own do."""
    if not op.autocast or not torch._C._is_any_autocast_enabled():
        return arguments
    return arguments | {name: _cast(arguments[name]) for name in op.autocast}


def outside_autocast(op: FusedOp, function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Call with autocast off, which would cast inside the kernel; the op's own casts are made first."""
    is_cast = [name in op.autocast for name in op.signature.parameters]

    def without_autocast(*arguments: Any) -> Any:
        arguments = tuple(_cast(item) if cast else item for item, cast in zip(arguments, is_cast, strict=True))
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return without_autocast


def _cast(value: Any) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return value.to(torch.get_autocast_dtype(value.device.type)) if is_float else value
