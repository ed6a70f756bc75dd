"""Kernels of attention with the faults that users met, each of which its proof must catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llm_adapt.ops.dispatch.proof import prove
from llm_adapt.ops.dispatch.registry import Kernel, find_op
from tests.ops.attention_loop import drawn

OP = find_op("attention")
REFERENCE = OP.reference
Arguments = dict[str, Any]


def lost_past_512(call: Arguments) -> Any:
    """Keys behind the 512th are seen by all."""
    rows, columns = call["q"].shape[1], call["k"].shape[1]
    seen = torch.ones(rows, columns, dtype=torch.bool).tril()
    seen[:, 512:] = True
    return REFERENCE(**(call | {"causal": "none", "mask": seen}))


def heads_in_turn(call: Arguments) -> Any:
    """Query head h takes key head h modulo their number, not their neighbour's."""
    groups = call["k"].shape[2]
    times = call["q"].shape[2] // groups
    return REFERENCE(**(call | {name: call[name].repeat(1, 1, times, 1) for name in "kv"}))


def no_gradient_of_lse(call: Arguments) -> Any:
    """The log-sum-exp is a number without a gradient."""
    out, lse = REFERENCE(**call)
    return out, lse.detach()


def without(name: str, value: Any) -> Callable[[Arguments], Any]:
    """A kernel that drops an argument."""
    return lambda call: REFERENCE(**(call | {name: value}))


PLAIN = {"causal": "bottom_right"}
FAULTS: dict[str, tuple[Callable[[Arguments], Any], Arguments, tuple[int, int, int]]] = {
    "causal is ignored": (without("causal", "none"), PLAIN, (64, 64, 16)),
    "the alignment is top-left": (without("causal", "top_left"), PLAIN, (48, 64, 16)),
    "the mask ends at 512 keys": (lost_past_512, PLAIN, (640, 640, 16)),
    "the scale is forgotten": (without("scale", 1.0), PLAIN, (64, 64, 16)),
    "the scale is that of padded heads": (without("scale", 32**-0.5), PLAIN, (64, 64, 24)),
    "the window is one too wide": (without("window_left", 17), PLAIN | {"window_left": 16}, (64, 64, 16)),
    "the window is ignored": (without("window_left", -1), PLAIN | {"window_left": 32}, (64, 64, 16)),
    "the softcap is ignored": (without("softcap", 0.0), {"softcap": 2.0}, (64, 64, 16)),
    "the sink is ignored": (without("sinks", None), {"sinks": torch.zeros(4)}, (64, 64, 16)),
    "the slopes are ignored": (without("alibi_slopes", None), {"alibi_slopes": torch.ones(4) / 8}, (64, 64, 16)),
    "heads are grouped in turn": (heads_in_turn, PLAIN, (64, 64, 16)),
    "the log-sum-exp has no gradient": (no_gradient_of_lse, {"return_lse": True}, (64, 64, 16)),
    "the query has no gradient": (
        lambda call: REFERENCE(**(call | {"q": call["q"].detach()})), PLAIN, (64, 64, 16),
    ),
    "padding is seen": (
        without("seqused_k", None), {"seqused_k": torch.tensor([40], dtype=torch.int32)}, (64, 64, 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_fails_its_proof(fault: str, dtype: torch.dtype) -> None:
    """The proof of a right kernel holds on the very call on which that of the wrong one fails."""
    wrong, options, (rows, columns, size) = FAULTS[fault]
    tensors = [drawn(n, 1, length, heads, size, dtype=dtype) for n, length, heads in ((1, rows, 4), (2, columns, 2))]
    call = OP.bind(tensors[0], tensors[1], drawn(3, 1, columns, 2, size, dtype=dtype), **options)
    kernels = (Kernel(OP.name, "vendor", f, "a test") for f in (REFERENCE, Faulty(wrong)))
    right, found = (prove(OP, kernel, call) for kernel in kernels)
    assert right.holds, right.reason
    assert not found.holds


class Faulty:
    """A kernel with the op's signature, of a function of all arguments by name."""

    def __init__(self, function: Callable[[Arguments], Any]) -> None:
        self.function = function
        self.__signature__ = OP.signature

    def __call__(self, **arguments: Any) -> Any:
        """Call it."""
        return self.function(arguments)
