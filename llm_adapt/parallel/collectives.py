"""Collectives that gloo lacks, built from those it has.

Checked against torch 2.13 gloo: it has AVG, bfloat16, uneven all_to_all and coalescing; it lacks PREMUL_SUM
and the one-byte floating-point types, and takes flat collectives only in one shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from llm_adapt.errors import CommError

__all__ = ["bytewise", "flat_gather", "flat_scatter", "premultiplied"]

_BYTE_FLOATS = frozenset(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)


def premultiplied(original: Callable[..., Any]) -> Callable[..., Any]:
    """all_reduce and reduce with ReduceOp.PREMUL_SUM: each input times its factor, then the sum.

    NCCL leaves the input of `reduce` on ranks other than dst alone; so does this.
    """
    is_reduce = original.__name__ == "reduce"

    @functools.wraps(original)
    def reduction(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        args, kwargs, factor = _without_factor(args, kwargs)
        if factor is None:
            return original(tensor, *args, **kwargs)
        if not is_reduce:
            tensor.mul_(factor)
            return original(tensor, *args, **kwargs)
        if kwargs.get("async_op"):
            raise CommError("reduce with PREMUL_SUM and async_op=True was asked; gloo has none. Use async_op=False.")
        scaled = tensor * factor
        original(scaled, *args, **kwargs)
        dst = args[0] if args else kwargs.get("dst")
        if dst == dist.get_rank() or kwargs.get("group_dst") == dist.get_rank(kwargs.get("group")):
            tensor.copy_(scaled)
        return None

    return reduction


def flat_scatter(original: Callable[..., Any]) -> Callable[..., Any]:
    """reduce_scatter_tensor with PREMUL_SUM, any shape of equal size, and both spellings of its keywords."""

    @functools.wraps(original)
    def reduce_scatter_tensor(*args: Any, **kwargs: Any) -> Any:
        output, given, args, kwargs = _pair(args, kwargs, "reduce_scatter_tensor")
        args, kwargs, factor = _without_factor(args, kwargs)
        if factor is not None:
            given = given * factor  # NCCL leaves the input alone
        return original(_flat(output, given), given.reshape(-1), *args, **kwargs)

    return reduce_scatter_tensor


def flat_gather(original: Callable[..., Any]) -> Callable[..., Any]:
    """all_gather_into_tensor with any shape of equal size and both spellings of its keywords."""

    @functools.wraps(original)
    def all_gather_into_tensor(*args: Any, **kwargs: Any) -> Any:
        output, given, args, kwargs = _pair(args, kwargs, "all_gather_into_tensor")
        return bytewise(original)(_flat(output, given), given.reshape(-1), *args, **kwargs)

    return all_gather_into_tensor


def bytewise(original: Callable[..., Any]) -> Callable[..., Any]:
    """Move float8 tensors as bytes; nothing is computed on them."""

    @functools.wraps(original)
    def move(*args: Any, **kwargs: Any) -> Any:
        return original(*map(_as_bytes, args), **{name: _as_bytes(value) for name, value in kwargs.items()})

    return move


def _as_bytes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.view(torch.uint8) if value.dtype in _BYTE_FLOATS else value
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return [_as_bytes(item) for item in value]
    return value


def _pair(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
    """Output and input of a flat collective, given by position or as output/input or output_tensor/input_tensor."""
    rest = list(args)
    found = []
    for short in ("output", "input"):
        if rest:
            found.append(rest.pop(0))
            continue
        spelled = [key for key in (short, f"{short}_tensor") if key in kwargs]
        if len(spelled) != 1:
            raise TypeError(f"{name}() needs exactly one of '{short}' and '{short}_tensor'; found {spelled}")
        found.append(kwargs.pop(spelled[0]))
    return found[0], found[1], tuple(rest), kwargs


def _flat(output: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """The output as a flat view; NCCL cares for the number of elements only."""
    if not output.is_contiguous():
        raise CommError(f"A contiguous output was expected; found strides {output.stride()} for {tuple(output.shape)}.")
    return output.view(-1)


def _without_factor(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], float | torch.Tensor | None]:
    """Replace a PREMUL_SUM operation by SUM and hand out its factor; None when there is no such operation."""
    factor: float | torch.Tensor | None = None

    def plain(value: Any) -> Any:
        nonlocal factor
        if isinstance(value, dist.ReduceOp) and getattr(value, "op", value) == dist.ReduceOp.PREMUL_SUM:
            factor = value.factor
            return dist.ReduceOp.SUM
        return value

    return tuple(map(plain, args)), {name: plain(value) for name, value in kwargs.items()}, factor
