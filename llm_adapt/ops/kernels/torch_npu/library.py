"""How kernels of torch_npu register, and what all of them refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch_npu

from llm_adapt.ops.dispatch import Call, kernel

__all__ = ["SCHEMA", "npu_kernel"]

SCHEMA = "torch_npu 2.13.0 schema and op-plugin document of "
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
P = ParamSpec("P")
R = TypeVar("R")


def npu_kernel(
    op: str,
    *needs: str,
    refuses: Callable[[Call], str | None] | None = None,
    takes_empty: bool = False,
    **fields: Any,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as torch_npu's kernel of an op.

    Args:
        needs: functions of torch_npu that it calls. Older versions lack some: then it refuses, and says so.
        refuses: reasons of its own.
        takes_empty: tensors without elements are not refused.
        fields: further fields of Kernel.
    """
    absent = [name for name in needs if not hasattr(torch_npu, name)]

    def refusal(call: Call) -> str | None:
        if absent:
            return f"the torch_npu installed has no {', '.join(absent)}"
        for name, tensor in call.tensors.items():
            if tensor.dtype.is_floating_point and tensor.dtype not in _FLOATS:
                return f"{name} is {tensor.dtype}; takes float32, float16 and bfloat16"
            if not takes_empty and 0 in tensor.shape:
                return "takes no empty tensors"
        return refuses(call) if refuses else None

    return kernel(op, SCHEMA + ", ".join(needs), refuses=refusal, **fields)
