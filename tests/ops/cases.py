"""Calls of every op, from the op's own input generators; what the conformance tests run over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from llm_adapt.ops.dispatch.call import Call, describe
from llm_adapt.ops.dispatch.registry import FusedOp, Kernel, all_ops, load_library

__all__ = ["Case", "cases", "has_backward", "host_kernels"]

HOST_LIBRARIES = ("openmp", "torch_native", "chunked", "triton")


class Case(NamedTuple):
    """One call: its op, its number among the op's inputs, its dtype and its arguments."""

    op: FusedOp
    number: int
    dtype: torch.dtype
    arguments: dict[str, Any]

    @property
    def call(self) -> Call:
        """The facts of the call."""
        return describe(self.op.name, self.op.signature, self.arguments, self.op.lists)

    def __str__(self) -> str:
        return f"{self.op.name}-{self.number}-{str(self.dtype).removeprefix('torch.')}"


def cases(dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> Iterator[Case]:
    """Every input of every op in every dtype."""
    for op in all_ops().values():
        if not op.reference.__module__.startswith("llm_adapt.ops."):
            continue  # toys of other tests
        for dtype in dtypes:
            for number, arguments in enumerate(op.inputs(torch.Generator().manual_seed(0), dtype)):
                yield Case(op, number, dtype, op.bind(**arguments))


def host_kernels(op: FusedOp) -> list[Kernel]:
    """Kernels that can run on this machine."""
    usable = [library for library in HOST_LIBRARIES if load_library(library) == ""]
    return [op.kernels[library] for library in usable if library in op.kernels]


def has_backward(op: FusedOp) -> bool:
    """Whether gradients flow through the op."""
    return op.differentiable != () and not op.mutates
