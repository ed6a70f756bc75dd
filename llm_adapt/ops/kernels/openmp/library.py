"""The compiled library: its functions, how its kernels register, and how they see tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd.function import once_differentiable

from llm_adapt.ops.dispatch import Call, TensorFacts
from llm_adapt.ops.dispatch.registry import Kernel, find_op
from llm_adapt.ops.kernels.openmp.build import built_library

__all__ = ["TYPES", "first_order", "function", "gradients_wanted", "openmp_kernel", "pointer", "rows_of", "too_few"]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Type of numbers.h
_ARGUMENTS = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}
P = ParamSpec("P")
R = TypeVar("R")


def _load() -> ctypes.CDLL:
    """Load it after torch, so that it finds torch's OpenMP, and with it torch's threads."""
    path = built_library()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"the openmp kernels were built and cannot be loaded: {error}") from error


_LIBRARY = _load()


def function(name: str, arguments: str, returns: Any = None) -> Callable[..., Any]:
    """A function of the library.

    Args:
        arguments: a letter each: p = pointer or None, l = int64, i = int, f = float32.
    """
    found = getattr(_LIBRARY, f"llm_adapt_{name}")
    found.argtypes = [_ARGUMENTS[letter] for letter in arguments if letter != " "]
    found.restype = returns
    return found  # type: ignore[no-any-return]


def openmp_kernel(
    op: str, source: str, refuses: Callable[[Call], str | None]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as our kernel of an op.

    Args:
        source: where the formulas come from; the code is our own.
        refuses: reasons of its own, shapes that do not fit among them: the reference then says what is wrong.
    """

    def refusal(call: Call) -> str | None:
        for name, tensor in call.tensors.items():
            if tensor.device != "cpu":
                return f"{name} is on {tensor.device}; computes on the CPU"
            if tensor.dtype.is_floating_point and tensor.dtype not in TYPES:
                return f"{name} is {tensor.dtype}; takes float32, float16 and bfloat16"
        return refuses(call)

    def register(function: Callable[P, R]) -> Callable[P, R]:
        find_op(op).register(Kernel(op, "openmp", function, source, refusal))
        return function

    return register


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """once_differentiable, whose price is paid only where a gradient of the gradient could be asked.

    autograd runs backward with gradients switched on for create_graph=True alone.
    """
    guarded = once_differentiable(backward)

    @functools.wraps(backward)
    def quick(ctx: Any, *upstream: torch.Tensor | None) -> Any:
        return guarded(ctx, *upstream) if torch.is_grad_enabled() else backward(ctx, *upstream)

    return quick


def gradients_wanted(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd has to know of this call; without it a call is shorter."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor lies."""
    return None if tensor is None else tensor.data_ptr()


def rows_of(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The tensor as rows a fixed distance apart, and that distance; a copy where its strides do not allow a view."""
    columns = tensor.shape[-1]
    if tensor.is_contiguous():
        return tensor, columns
    rows = tensor.reshape(-1, columns)
    if columns > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def too_few(tensor: TensorFacts, least: int) -> str | None:
    """Why a call of so few numbers is refused: autograd and ctypes take longer than they save.

    Each limit was measured on one core (EPYC of family 26, torch 2.13) against torch's own, forward and backward.
    """
    is_slower = 0 < tensor.shape.numel() < least
    return f"is no faster than torch's own for fewer than {least} numbers" if is_slower else None
