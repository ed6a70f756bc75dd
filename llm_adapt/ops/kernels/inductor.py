"""References compiled by torch.compile: what its inductor fuses by itself. Source: torch 2.13, torch.compile.

In no device's order: the first call of a kind compiles for seconds, and may pay for it or not. Ask for it where
`llm-adapt bench --ops "order=inductor>torch_native"` says that it wins, with `ops="rope=inductor"`. Inside code that is
compiled as a whole the reference itself is traced, and there is nothing to choose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.ops.dispatch import Call
from llm_adapt.ops.dispatch.registry import Kernel, find_op

__all__ = ["OPS"]

# Ops of several passes over memory, which one fused kernel may read and write once.
OPS = ("activation", "add_rms_norm", "cross_entropy", "glu", "layer_norm", "rms_norm", "rope", "scaled_masked_softmax")


def _compiled(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as torch.compile makes it, at the first call: importing dynamo takes over a second."""

    @functools.cache
    def compile_once() -> Callable[..., Any]:
        # Not fullgraph: beyond torch's limit of compiled kinds (8) that would raise, where torch warns and goes eager.
        return torch.compile(reference)

    @functools.wraps(reference)
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return compile_once()(*args, **kwargs)

    return kernel


def _empty(call: Call) -> str | None:
    return "has nothing to fuse for empty tensors" if any(0 in t.shape for t in call.tensors.values()) else None


for _name in OPS:
    _op = find_op(_name)
    _op.register(Kernel(_name, "inductor", _compiled(_op.reference), "torch.compile of torch 2.13", _empty))
