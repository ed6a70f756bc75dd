"""Calling: a kernel as a function of all of its op's arguments by position, and what autocast means for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.ops.dispatch.registry import FusedOp, Kernel

__all__ = ["outside_autocast", "positional"]


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


def outside_autocast(op: FusedOp, function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Call with autocast off, which would cast inside the kernel; the op's own casts are made first."""
    cast = [name in op.autocast for name in op.signature.parameters]

    def without_autocast(*arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        arguments = tuple(
            _cast(item, dtype) if is_cast else item for item, is_cast in zip(arguments, cast, strict=True)
        )
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return without_autocast


def _cast(value: Any, dtype: torch.dtype) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return value.to(dtype) if is_float else value
