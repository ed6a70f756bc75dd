"""Counts: the bytes that a call must move and the operations that it must do, by formula, whoever computes it.

Bytes are the compulsory traffic: every tensor that is read is read once, every result is written once, nothing that
lies between is counted. Backward reads the upstream gradient and what its formula needs again, and writes the
gradients. Operations: a product of matrices M x K and K x N is 2MKN; elsewhere each addition, product, division, root
or exponential of the formula is one; comparisons and copies are none. Backward counts as twice the forward, what is
computed again there is not counted. So no kernel looks better for doing more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llm_adapt.ops.dispatch.registry import FusedOp

__all__ = ["FORMULAS", "Counts", "Formula", "bytes_of", "count", "pairs_seen"]

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Counts:
    """What one call needs: bytes and operations of the forward, and those that backward adds."""

    forward_bytes: float
    backward_bytes: float
    forward_flops: float
    backward_flops: float

    def of(self, with_backward: bool) -> tuple[float, float]:
        """(bytes, operations) of a forward, or of forward and backward."""
        if not with_backward:
            return self.forward_bytes, self.forward_flops
        return self.forward_bytes + self.backward_bytes, self.forward_flops + self.backward_flops


@dataclass(frozen=True)
class Formula:
    """How an op is counted.

    Attributes:
        words: the operations in words, as documentation and JSON have it.
        flops: arguments -> operations of the forward.
        again: arguments that backward reads again; "output" = the results.
        unread: arguments that are not read, only written.
        unwritten: of the arguments that the op may change, those that this call does not.
        reads: argument -> the share of it that is read, where that is less than all.
    """

    words: str
    flops: Callable[[Arguments], float]
    again: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    unwritten: tuple[str, ...] = ()
    reads: Mapping[str, Callable[[Arguments], float]] | None = None


def bytes_of(value: Any) -> float:
    """Bytes of a tensor, or of a list of them; what an expanded tensor repeats counts once."""
    if isinstance(value, torch.Tensor):
        sizes = (size for size, stride in zip(value.shape, value.stride(), strict=True) if stride or size == 0)
        return float(math.prod(sizes) * value.element_size())
    return sum(map(bytes_of, value)) if isinstance(value, (list, tuple)) else 0.0


def count(
    op: FusedOp, arguments: Arguments, outputs: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor] = ()
) -> Counts | None:
    """Count a call.

    Args:
        arguments: all of the op's arguments.
        outputs: the tensors that it returned.
        wanted: the tensors whose gradient is asked.

    Returns:
        the counts; None for an op that has no formula.
    """
    formula = FORMULAS.get(op.name)
    if formula is None:
        return None
    outputs, wanted = list(outputs), list(wanted)
    shares = formula.reads or {}
    read = sum(
        bytes_of(value) * (shares[name](arguments) if name in shares else 1.0)
        for name, value in arguments.items()
        if name not in formula.unread
    )
    changed = sum(bytes_of(arguments[name]) for name in op.mutates if name not in formula.unwritten)
    written = changed + bytes_of([item for item in outputs if not _is_among(item, arguments)])
    again = sum(bytes_of(outputs if name == "output" else arguments[name]) for name in formula.again)
    upstream = bytes_of([item for item in outputs if item.requires_grad])
    flops = formula.flops(arguments)
    backward = again + upstream + bytes_of(wanted) if wanted else 0.0
    return Counts(read + written, backward, flops, 2 * flops if wanted else 0.0)


def _is_among(item: torch.Tensor, arguments: Arguments) -> bool:
    flat = (one for value in arguments.values() for one in (value if isinstance(value, (list, tuple)) else [value]))
    return any(item is one for one in flat)


def pairs_seen(queries: int, keys: int, causal: bool) -> float:
    """How many (query, key) pairs a causal call sees, aligned at the bottom right; without `causal` all."""
    if not causal:
        return float(queries * keys)
    return float(sum(min(keys, max(0, keys - queries + row + 1)) for row in range(queries)))


def _each(name: str, per_element: float) -> Callable[[Arguments], float]:
    """So many operations for each element of a tensor, or of all tensors of a list."""

    def flops(arguments: Arguments) -> float:
        value = arguments[name]
        tensors = value if isinstance(value, (list, tuple)) else [value]
        return float(per_element * sum(tensor.numel() for tensor in tensors))

    return flops


def _attention(a: Arguments) -> float:
    layout = a["layout"]
    if layout == "thd":
        raise ValueError("The operations of attention are counted for bshd, sbhd and bhsd.")
    order = [layout.index(letter) for letter in "bshd"]
    batch, queries, heads, size = (a["q"].shape[axis] for axis in order)
    keys, value_size = a["k"].shape[order[1]], a["v"].shape[-1]
    return float(2 * batch * heads * pairs_seen(queries, keys, a["causal"] != "none") * (size + value_size))


def _decode(a: Arguments) -> float:
    heads, size = a["q"].shape[-2:]
    return float(2 * a["q"].shape[1] * heads * int(a["cache_seqlens"].sum()) * (size + a["v_cache"].shape[-1]))


def _cache_share(a: Arguments) -> float:
    cached = a["k_cache"].shape[0] * a["k_cache"].shape[1]
    return float(a["cache_seqlens"].sum() / max(cached, 1))


def _softmax(a: Arguments) -> float:
    queries, keys = a["x"].shape[-2:]
    return float(5 * a["x"].numel() / max(queries * keys, 1) * pairs_seen(queries, keys, a["causal"]))


def _visible_share(a: Arguments) -> float:
    queries, keys = a["x"].shape[-2:]
    return float(pairs_seen(queries, keys, a["causal"]) / max(queries * keys, 1))


def _grouped(a: Arguments) -> float:
    outputs = a["weight"].shape[1 if a["transposed"] else 2]
    return float(2 * int(a["tokens_per_expert"].sum()) * a["x"].shape[-1] * outputs)


def _linear(a: Arguments) -> float:
    return float(2 * a["x"].numel() * a["weight"].shape[0])


def _head_and_loss(a: Arguments) -> float:
    tokens, hidden = a["hidden"].numel() // a["hidden"].shape[-1], a["hidden"].shape[-1]
    return float(tokens * a["weight"].shape[0] * (2 * hidden + 3))


def _glu(a: Arguments) -> float:
    results = a["x"].numel() if a["up"] is not None else a["x"].numel() // 2
    return float(results * (5 + (a["weights"] is not None)))


def _unpermute(a: Arguments) -> float:
    return float(a["permuted"].numel() * (1 + (a["probs"] is not None)))


def _permute(a: Arguments) -> float:
    return 0.0


def _wgrad(a: Arguments) -> float:
    tokens = a["x"].numel() // a["x"].shape[-1]
    return float(2 * tokens * a["main_grad"].numel())


_NORM = ("x", "weight")
FORMULAS: dict[str, Formula] = {
    "activation": Formula("9 each: bias, and a gelu of 8", _each("x", 9), ("x", "bias")),
    "adamw": Formula("12 each: two moments, bias corrections, root, decay", _each("params", 12), unwritten=("grads",)),
    "add_rms_norm": Formula(
        "5 each: sum, square, its sum, times 1/rms, times weight", _each("x", 5), ("output", "weight")
    ),
    "attention": Formula(
        "2 (head size + value size) for each pair seen", _attention, ("q", "k", "v", "output")
    ),
    "clip_grads": Formula("3 each: square, sum, product", _each("grads", 3)),
    "cross_entropy": Formula("3 each: minus max, exp, sum", _each("logits", 3), ("logits", "target")),
    "decode_attention": Formula(
        "2 (head size + value size) for each cached key", _decode,
        reads={"k_cache": _cache_share, "v_cache": _cache_share},
    ),
    "dequantize_fp8": Formula("1 each", _each("q", 1)),
    "dequantize_int8": Formula("1 each", _each("q", 1)),
    "dropout_add": Formula("3 each: bias, times 1/(1 - p), residual", _each("x", 3)),
    "fp8_scale_update": Formula("2 a tensor", _each("scale", 2)),
    "fused_linear_cross_entropy": Formula(
        "2 hidden + 3 for each logit", _head_and_loss, ("hidden", "weight", "target")
    ),
    "glu": Formula("5 each: silu of 4, times up; 1 more with weights", _glu, ("x", "up", "weights")),
    "grouped_gemm": Formula("2MKN over the experts' rows", _grouped, ("x", "weight", "tokens_per_expert")),
    "layer_norm": Formula("7 each: mean, minus mean, square, its sum, scale, weight, bias", _each("x", 7), _NORM),
    "linear_fp8": Formula("2MKN", _linear, ("x", "weight")),
    "linear_int8": Formula("2MKN", _linear),
    "moe_permute": Formula("none: copies", _permute, ("routing_map",)),
    "moe_unpermute": Formula(
        "1 each of the rows, 2 with probs", _unpermute, ("permuted", "sorted_indices", "probs", "routing_map")
    ),
    "multi_tensor_l2norm": Formula("2 each: square, sum", _each("tensors", 2)),
    "multi_tensor_scale": Formula("1 each", _each("tensors", 1), unread=("outputs",)),
    "quantize_fp8": Formula("2 each: times scale, rounded", _each("x", 2)),
    "quantize_int8": Formula("2 each: divided by the scale, rounded", _each("x", 2)),
    "rms_norm": Formula("4 each: square, its sum, times 1/rms, times weight", _each("x", 4), _NORM),
    "rope": Formula("3 each: two products and a sum", _each("x", 3), ("cos", "sin")),
    "router_aux_loss": Formula("1 each: sum over tokens", _each("probs", 1), ("tokens_per_expert",)),
    "router_z_loss": Formula("3 each: minus max, exp, sum", _each("logits", 3), ("logits",)),
    "scaled_masked_softmax": Formula(
        "5 for each score seen: scale, minus max, exp, sum, division", _softmax, ("output",),
        reads={"x": _visible_share},
    ),
    "softmax_partials": Formula("3 each: minus max, exp, sum", _each("logits", 3), ("logits", "target")),
    "topk_router": Formula("4 each: exp, sum, division, bias", _each("logits", 4), ("logits",)),
    "wgrad_accumulate": Formula("2MKN", _wgrad),
}  # fmt: skip
