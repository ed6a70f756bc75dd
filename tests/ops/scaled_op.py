"""A toy op and a toy kernel library, made for one test and gone after it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from llm_adapt.ops.dispatch import dispatcher as dispatching
from llm_adapt.ops.dispatch import registry
from llm_adapt.ops.dispatch.dispatcher import dispatchers
from llm_adapt.ops.dispatch.in_force import listeners
from llm_adapt.ops.dispatch.registry import Kernel

__all__ = ["TOY", "scaled", "toy_library", "toy_op"]

TOY = "toy"  # name of the library


def inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Calls of the toy op."""
    yield {"x": torch.randn(4, 6, generator=generator).to(dtype)}
    yield {"x": torch.randn(3, 5, generator=generator).to(dtype), "factor": 3.0}
    x = torch.randn(2, 7, generator=generator).to(dtype)
    yield {"x": x, "bias": x[0].clone(), "negative": True}


def scaled(
    x: torch.Tensor, bias: torch.Tensor | None = None, factor: float = 2.0, negative: bool = False
) -> torch.Tensor:
    """y = factor * x + bias, negated where asked. Shapes: x [..., H], bias [H]. Dtypes: of x. Source: this file."""
    y = x * factor if bias is None else x * factor + bias
    return -y if negative else y


@contextlib.contextmanager
def toy_op(**fields: Any) -> Iterator[Callable[..., torch.Tensor]]:
    """The toy op as callers call it; `fields` as of FusedOp."""
    entry = dispatching.fused_op(**{"inputs": inputs} | fields)(scaled)
    try:
        yield entry
    finally:
        del registry._OPS["scaled"], dispatchers["scaled"], listeners["scaled"]


@contextlib.contextmanager
def toy_library(op: str, function: Callable[..., Any], name: str = TOY, **fields: Any) -> Iterator[Kernel]:
    """A kernel library with one kernel, as if it were installed."""
    module = ModuleType(f"llm_adapt.ops.kernels.{name}")
    sys.modules[module.__name__] = module
    kernel = Kernel(op, name, function, "a test", **fields)
    target = registry.find_op(op)
    target.register(kernel)
    known = registry._LIBRARIES.get(name)
    registry._LIBRARIES[name] = ""
    try:
        yield kernel
    finally:
        del target.kernels[name], sys.modules[module.__name__]
        if known is None:
            registry._LIBRARIES.pop(name, None)
        else:
            registry._LIBRARIES[name] = known
        dispatchers[op].start_over()
