"""Counterparts: the table of what frameworks and other packages compute in the place of each op.

A counterpart is a Kernel, so that the rules of dispatch hold for it: an argument that it does not take is never
dropped, and it is proved before it is timed. eager.py and eager_updates.py hold what frameworks run, peers.py what
other packages offer beyond the kernel libraries of llm_adapt.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

from llm_adapt.ops.dispatch.call import Call
from llm_adapt.ops.dispatch.registry import Kernel

__all__ = ["EAGER", "WITHOUT", "eager", "eager_of", "only"]

EAGER: dict[str, list[Kernel]] = {}  # op -> formulations, the framework's own function first
# Ops that no framework computes on this machine without a package of its own.
WITHOUT = {
    "linear_fp8": "frameworks have fp8 products through TransformerEngine or torchao only",
    "fp8_scale_update": "a part of TransformerEngine; no framework has it in PyTorch",
}
Refusal = Callable[[Call], str | None]
Function = TypeVar("Function", bound=Callable[..., Any])


def eager(op: str, source: str, takes: Refusal | None = None, **fields: Any) -> Callable[[Function], Function]:
    """Register the decorated function as a formulation of an op.

    Args:
        source: what it is; one that begins with "transformers" needs that package.
        takes: call -> why not this call, None when it can.
    """

    def refuses(call: Call) -> str | None:
        if source.startswith("transformers") and importlib.util.find_spec("transformers") is None:
            return "transformers is not installed"
        return takes(call) if takes is not None else None

    def register(function: Function) -> Function:
        EAGER.setdefault(op, []).append(Kernel(op, "eager", function, source, refuses, **fields))
        return function

    return register


def only(**wanted: Any) -> Refusal:
    """Refuse calls whose options are others than these."""

    def refuses(call: Call) -> str | None:
        wrong = [name for name, value in wanted.items() if call.options.get(name) != value]
        return f"is written for {', '.join(f'{name}={wanted[name]!r}' for name in wrong)}" if wrong else None

    return refuses


def eager_of(op: str) -> tuple[Kernel, ...]:
    """The formulations of an op, to be asked in turn; empty for an op that no framework has."""
    for module in ("eager", "eager_updates"):
        importlib.import_module(f"llm_adapt.cli.bench.{module}")
    return tuple(EAGER.get(op, ()))
