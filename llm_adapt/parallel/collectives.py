"""Collectives that gloo lacks, built from those it has.

Checked against torch 2.13 gloo: it has AVG, bfloat16, uneven all_to_all and coalescing; it lacks PREMUL_SUM
and the one-byte floating-point types, and takes flat collectives only in one shape.

Workaround: gloo-missing-collectives
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from llm_adapt.errors import CommError

__all__ = [
    "bytewise",
    "flat_gather",
    "flat_scatter",
    "pending_send",
    "premultiplied",
    "premultiplied_reduce",
    "uncoalesced",
]

_BYTE_FLOATS = frozenset(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)


def premultiplied(original: Callable[..., Any]) -> Callable[..., Any]:
    """all_reduce and reduce_scatter with ReduceOp.PREMUL_SUM: each input times its factor, then the sum."""
    signature, changes_input = inspect.signature(original), original.__name__ == "all_reduce"

    @functools.wraps(original)
    def reduction(*args: Any, **kwargs: Any) -> Any:
        call, factor = _without_factor(signature, args, kwargs)
        if factor is None:
            return original(*args, **kwargs)
        if changes_input:
            call.arguments["tensor"].mul_(factor)
        else:  # NCCL leaves the input alone
            call.arguments["input_list"] = [item * factor for item in call.arguments["input_list"]]
        return original(*call.args, **call.kwargs)

    return reduction


def premultiplied_reduce(original: Callable[..., Any]) -> Callable[..., Any]:
    """`reduce` with ReduceOp.PREMUL_SUM; as NCCL, it leaves the input of every rank but dst alone."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def reduce(*args: Any, **kwargs: Any) -> Any:
        call, factor = _without_factor(signature, args, kwargs)
        if factor is None:
            return original(*args, **kwargs)
        asked = call.arguments
        if asked.get("async_op"):
            raise CommError("reduce with PREMUL_SUM and async_op=True was asked; gloo has none. Use async_op=False.")
        tensor, group = asked["tensor"], asked.get("group")
        asked["tensor"] = tensor * factor
        original(*call.args, **call.kwargs)
        if asked.get("dst") == dist.get_rank() or asked.get("group_dst") == dist.get_rank(group):
            tensor.copy_(asked["tensor"])
        return None

    return reduce


def flat_scatter(original: Callable[..., Any]) -> Callable[..., Any]:
    """reduce_scatter_tensor with PREMUL_SUM, any shape of equal size, and both spellings of its keywords."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def reduce_scatter_tensor(*args: Any, **kwargs: Any) -> Any:
        output, given, args, kwargs = _pair(args, kwargs, "reduce_scatter_tensor")
        call, factor = _without_factor(signature, (_flat(output), given.reshape(-1), *args), kwargs)
        if factor is not None:
            call.arguments["input"] = call.arguments["input"] * factor  # NCCL leaves the input alone
        return original(*call.args, **call.kwargs)

    return reduce_scatter_tensor


def flat_gather(original: Callable[..., Any]) -> Callable[..., Any]:
    """all_gather_into_tensor with any shape of equal size and both spellings of its keywords."""
    moved = bytewise(original)

    @functools.wraps(original)
    def all_gather_into_tensor(*args: Any, **kwargs: Any) -> Any:
        output, given, args, kwargs = _pair(args, kwargs, "all_gather_into_tensor")
        return moved(_flat(output), given.reshape(-1), *args, **kwargs)

    return all_gather_into_tensor


def uncoalesced(original: Callable[..., Any]) -> Callable[..., Any]:
    """_coalescing_manager without its device: gloo coalesces collectives at the end, not calls to a device."""

    @functools.wraps(original)
    def manager(group: Any = None, device: Any = None, async_ops: bool = False) -> Any:
        return original(group, None, async_ops)

    return manager


def bytewise(original: Callable[..., Any]) -> Callable[..., Any]:
    """Move float8 tensors as bytes; nothing is computed on them."""

    @functools.wraps(original)
    def move(*args: Any, **kwargs: Any) -> Any:
        return original(*map(_as_bytes, args), **{name: _as_bytes(value) for name, value in kwargs.items()})

    return move


def pending_send(original: Callable[..., Any]) -> Callable[..., Any]:
    """isend of a handle of its own on the tensor's memory; float8 as bytes.

    gloo reads the memory when the receiver is ready, and keeps the tensor object until then, not its memory. Megatron's
    interleaved pipeline schedule frees what it is sending by `tensor.data = torch.empty(1)`, which the allocator of
    CUDA delays: gloo would send what has taken the place since.

    Workaround: gloo-pending-send
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def isend(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.arguments["tensor"] = _as_bytes(call.arguments["tensor"]).detach()
        return original(*call.args, **call.kwargs)

    return isend


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


def _flat(output: torch.Tensor) -> torch.Tensor:
    """The output as a flat view; NCCL cares for the number of elements only."""
    if not output.is_contiguous():
        raise CommError(f"A contiguous output was expected; found strides {output.stride()} for {tuple(output.shape)}.")
    return output.view(-1)


def _without_factor(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[inspect.BoundArguments, float | torch.Tensor | None]:
    """The call with a PREMUL_SUM operation replaced by SUM, and its factor; None when there is no such operation."""
    call = signature.bind(*args, **kwargs)
    op = call.arguments.get("op")
    if not isinstance(op, dist.ReduceOp) or getattr(op, "op", op) != dist.ReduceOp.PREMUL_SUM:
        return call, None
    call.arguments["op"] = dist.ReduceOp.SUM
    factor: float | torch.Tensor = op.factor
    return call, factor
