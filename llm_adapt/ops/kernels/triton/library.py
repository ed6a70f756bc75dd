"""How our Triton kernels register and start, how they see tensors, and what all of them refuse."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import triton

from llm_adapt.ops.dispatch import Call
from llm_adapt.ops.dispatch.registry import Kernel, find_op

__all__ = ["MOST_PROGRAMS", "block_of", "launch", "programs_at_once", "rows_of", "triton_kernel"]

MOST_PROGRAMS = 65535  # of one axis of a grid: the limit of Triton-MLU, and of triton-ascend
_MOST_COLUMNS = 4096  # of a block: 16 KiB in float32, several of which fit the 192 KiB of an Ascend vector core
_PROGRAMS_AT_ONCE = 512  # where the number of processors is not known
_MOST_IN_A_ROW = 2**27  # their blocks are programs of one grid, and columns are counted in 32 bits
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
P = ParamSpec("P")
R = TypeVar("R")


def triton_kernel(
    op: str, source: str, refuses: Callable[[Call], str | None] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as our Triton kernel of an op.

    Args:
        source: where the formulas come from; the code is our own.
        refuses: reasons of its own.
    """

    def refusal(call: Call) -> str | None:
        if call.device == "cpu" and not _is_interpreted():
            return "Triton has no CPU backend; its interpreter runs there, with TRITON_INTERPRET=1 set before it starts"
        for name, tensor in call.tensors.items():
            if tensor.dtype.is_floating_point and tensor.dtype not in _FLOATS:
                return f"{name} is {tensor.dtype}; takes float32, float16 and bfloat16"
            if 0 in tensor.shape:
                return "takes no empty tensors"
            if tensor.shape[-1:] > (_MOST_IN_A_ROW,):
                return f"takes rows of at most {_MOST_IN_A_ROW} numbers"
        return refuses(call) if refuses else None

    def register(function: Callable[P, R]) -> Callable[P, R]:
        find_op(op).register(Kernel(op, "triton", function, source, refusal))
        return function

    return register


def _is_interpreted() -> bool:
    """Whether @triton.jit made functions of Triton's interpreter; it decides when a kernel is defined."""
    return not isinstance(_probe, triton.JITFunction)


def _jit(function: Callable[..., Any]) -> Any:
    return triton.jit(function)


@_jit
def _probe() -> None:
    """Never launched: its type tells what @triton.jit makes here."""


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as rows of columns that lie side by side; a copy where its strides do not allow a view."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def block_of(columns: int, most: int = _MOST_COLUMNS) -> int:
    """Columns that a program takes at a time: a power of two, as Triton wants it."""
    return min(1 << (columns - 1).bit_length(), most)


def programs_at_once(device: torch.device) -> int:
    """Programs among which rows are shared out where each ends with a sum of its own: few, and none has to wait."""
    return _PROGRAMS_AT_ONCE if device.type != "cuda" else _processors(device.index)


@functools.cache
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _warps_of(block: int, each: int, device: torch.device) -> dict[str, int]:
    """What launches a block on a GPU; elsewhere num_warps is the compiler's: it means other things on NPU and MLU."""
    if device.type != "cuda":
        return {}
    threads = min(max(block // each, 128), 1024)
    return {"num_warps": threads // (64 if torch.version.hip else 32)}


def launch(kernel: Any, programs: int, *arguments: Any, block: int, each: int = 16, **constants: Any) -> None:
    """Start a kernel on the device of its first argument; Triton would take the current device, whatever it is given.

    It may get fewer programs than were asked, never more than a grid can have: kernels over rows go on by themselves.

    Args:
        block: numbers that a program has in hand at a time.
        each: how many of them a thread of a GPU holds.
    """
    device, current = arguments[0].device, contextlib.nullcontext()
    if device.type != "cpu":
        module = getattr(torch, device.type)
        if module.current_device() != device.index:
            current = module.device(device)
    with current:
        kernel[(min(programs, MOST_PROGRAMS),)](*arguments, **constants, **_warps_of(block, each, device))
