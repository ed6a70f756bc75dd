"""Which activation of our operators a module or function of transformers computes, told by its numbers.

A class of activations is tried once, in float64, on numbers from far below to far above zero, in every form that its
constructor has. That is done outside of what torch.compile traces: the answer is a constant there.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from llm_adapt.frameworks.transformers.probe import undisturbed
from llm_adapt.report import Report

__all__ = ["name_of", "reporter"]

# Two forms of one formula differ by the digits of their constants, two formulas by more.
_TOLERANCE = 1e-8
_FUNCTIONS: dict[Any, str] = {F.silu: "silu", F.relu: "relu", F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid"}
_FUNCTIONS |= {torch.relu: "relu", F.gelu: "gelu"}


def name_of(act: Any) -> str | None:
    """The name, in llm_adapt.ops.activation, of what `act` computes; None when it is something else.

    A module with hooks, or with a forward of its own, is something else: it must be called.
    """
    if isinstance(act, torch.nn.Module):
        if act._forward_hooks or act._forward_pre_hooks or act._backward_hooks or act._backward_pre_hooks:
            return None
        if "forward" in act.__dict__:
            return None
        if type(act) is torch.nn.GELU:
            return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)
        return _name_of_class(type(act))
    return _name_of_function(act)


def _constant(function: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    """Mark for dynamo: called while it traces, the result is a constant of the compiled code."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def _known_class(cls: type) -> str | None:
    with undisturbed(), torch.no_grad():
        names = {_probe(act) for act in _instances(cls)}
    return names.pop() if len(names) == 1 else None


@_constant
def _name_of_class(cls: Any) -> str | None:
    return _known_class(cls)


@_constant
def _name_of_function(function: Any) -> str | None:
    try:
        return _FUNCTIONS.get(function)
    except TypeError:  # not to be hashed: no function of torch's
        return None


def _instances(cls: type) -> Iterator[Any]:
    """One of each form that the constructor has; none where it takes more than switches, which make another formula."""
    found = inspect.signature(cls).parameters.values()
    parameters = [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if all(isinstance(p.default, bool) for p in parameters):
        for values in itertools.product((False, True), repeat=len(parameters)):
            yield cls(**dict(zip([p.name for p in parameters], values, strict=True)))


def _probe(act: torch.nn.Module) -> str | None:
    from llm_adapt.ops.activation import FUNCTIONS

    if any(True for _ in itertools.chain(act.parameters(), act.buffers())):
        return None
    # The linear part of a gelu, its bend, and tails where clipped forms differ.
    pieces = ((-40.0, 40.0, 81), (-4.0, 4.0, 101))
    x = torch.cat([torch.linspace(*piece, dtype=torch.float64, device="cpu") for piece in pieces])
    found = act(x.clone())
    for name, function in FUNCTIONS.items():
        if _are_equal(found, function(x)):
            return name
    return None


def _are_equal(found: Any, expected: torch.Tensor) -> bool:
    is_alike = isinstance(found, torch.Tensor) and (found.shape, found.dtype) == (expected.shape, expected.dtype)
    return is_alike and bool(torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE))


def reporter(report: Report) -> Callable[[str, str, str], None]:
    """`report.once` as compiled code may call it: it is called while torch.compile traces, and costs nothing later."""

    def once(subject: str, choice: str, reason: str) -> None:
        report.once(subject, choice, reason)

    once._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return once
