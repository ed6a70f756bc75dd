"""MoE permutation. T = tokens, H = hidden size, E = experts, R = rows after it: (token, expert) pairs by expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llm_adapt.ops.dispatch import fused_op

__all__ = ["moe_permute"]


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    def route(tokens: int, experts: int, topk: int) -> torch.Tensor:
        chosen = torch.rand(tokens, experts, generator=generator).topk(topk, dim=1).indices
        return torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, chosen, True)

    yield {"tokens": draw(12, 16), "routing_map": route(12, 8, 2), "num_out_tokens": 24, "topk": 2}
    yield {"tokens": draw(9, 5), "routing_map": route(9, 4, 3), "num_out_tokens": 27, "probs": draw(9, 4)}
    yield {"tokens": draw(9, 5), "routing_map": route(9, 4, 1).int(), "num_out_tokens": 13, "probs": draw(9, 4)}
    yield {"tokens": draw(9, 5), "routing_map": route(9, 4, 2), "num_out_tokens": 11}
    padded = {"num_out_tokens": 12, "drop_and_pad": True}
    yield {"tokens": draw(8, 16), "routing_map": route(8, 4, 1), "probs": draw(8, 4), **padded}
    yield {"tokens": draw(0, 16), "routing_map": route(0, 4, 1), "num_out_tokens": 0}


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    chosen = torch.rand(shape[0], 8, generator=generator).topk(2, dim=1).indices
    routing_map = torch.zeros(shape[0], 8, dtype=torch.bool).scatter(1, chosen, True)
    tokens = torch.randn(shape, generator=generator).to(dtype)
    return {"tokens": tokens, "routing_map": routing_map, "num_out_tokens": 2 * shape[0], "topk": 2}


def shrink(arguments: dict[str, Any]) -> dict[str, Any]:
    """A call of fewer columns: the rows stay, since their number is what the routing map says."""
    return arguments | {"tokens": arguments["tokens"][:, :64]}


@fused_op(
    inputs=_inputs,
    differentiable=("tokens", "probs"),
    dynamic=frozenset({"num_out_tokens"}),
    shrink=shrink,
    example=_example,
    sizes={"Mixtral": (4096, 4096)},
)
def moe_permute(
    tokens: torch.Tensor,
    routing_map: torch.Tensor,
    num_out_tokens: int,
    probs: torch.Tensor | None = None,
    drop_and_pad: bool = False,
    topk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """permuted[r] = tokens[sorted_indices[r]], permuted_probs[r] = probs[sorted_indices[r], expert of r].

    The rows of an expert are those tokens whose map is not 0 in its column, in their order; expert 0 comes first.
    num_out_tokens: R. A number that only the device knows would have to be waited for, so the caller says it: T * K
        without dropping. Pairs beyond R are left out. Rows beyond the pairs are zero and have index -1.
    drop_and_pad: every expert has R / E rows: the tokens that chose it, in their order, then those that did not.
    topk: the caller's word that every token has exactly K experts, so that R = T * K. It changes nothing here; kernels
        that can do nothing else ask for it.

    Shapes: tokens [T, H], routing_map [T, E], probs [T, E] -> permuted [R, H], permuted_probs [R] or None,
        sorted_indices [R] int64.
    Dtypes: nothing is rounded. The gradient of a token is a sum over its rows in the dtype of tokens, as upstream.
    Raises: ValueError for shapes that do not fit.
    Source: Megatron-Core 0.16 core/transformer/moe/moe_utils.py, permute; without num_out_tokens it counts the map.
    """
    experts = checked_experts(tokens, routing_map, num_out_tokens, probs, drop_and_pad, topk)
    chosen = routing_map.detach().bool().t()
    if drop_and_pad:
        # False sorts behind True, and equals stay in their order.
        order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        indices = order[:, : num_out_tokens // experts].reshape(-1)
        expert = torch.arange(num_out_tokens, device=tokens.device) // max(num_out_tokens // experts, 1)
        return tokens.index_select(0, indices), None if probs is None else probs[indices, expert], indices
    pair = _pairs(chosen, num_out_tokens)
    is_row = pair >= 0
    if not tokens.shape[0]:  # sums of nothing, which stay in the graph
        permuted = tokens.sum(0, keepdim=True).to(tokens.dtype).expand(num_out_tokens, -1)
        return permuted, None if probs is None else probs.sum().to(probs.dtype).expand(num_out_tokens), pair
    indices, expert = pair.clamp(min=0) % tokens.shape[0], pair.clamp(min=0) // tokens.shape[0]
    permuted = torch.where(is_row.unsqueeze(1), tokens.index_select(0, indices), 0)
    permuted_probs = None if probs is None else torch.where(is_row, probs[indices, expert], 0)
    return permuted, permuted_probs, torch.where(is_row, indices, -1)


def _pairs(chosen: torch.Tensor, count: int) -> torch.Tensor:
    """The places [R] of the first `count` True in a matrix counted row by row, -1 beyond: nonzero without waiting."""
    flat = chosen.reshape(-1)
    row = flat.cumsum(0) - 1
    # One row more takes all that is not wanted.
    row = torch.where(flat & (row < count), row, count)
    found = torch.full((count + 1,), -1, dtype=torch.int64, device=chosen.device)
    return found.scatter(0, row, torch.arange(flat.shape[0], device=chosen.device))[:count]


def checked_experts(
    tokens: torch.Tensor,
    routing_map: torch.Tensor,
    num_out_tokens: int,
    probs: torch.Tensor | None,
    drop_and_pad: bool,
    topk: int | None,
) -> int:
    """The number of experts, after the arguments of `moe_permute` were checked; for its kernels as well."""
    if tokens.ndim != 2 or routing_map.ndim != 2 or routing_map.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"moe_permute: tokens [T, H] and routing_map [T, E] were expected; found {tuple(tokens.shape)} and "
            f"{tuple(routing_map.shape)}. Flatten the tokens."
        )
    if probs is not None and probs.shape != routing_map.shape:
        raise ValueError(f"moe_permute: probs must be of shape {tuple(routing_map.shape)}; found {tuple(probs.shape)}.")
    experts = routing_map.shape[1]
    if num_out_tokens < 0:
        raise ValueError(f"moe_permute: num_out_tokens={num_out_tokens} was asked; give 0 or more.")
    if drop_and_pad and (num_out_tokens % experts or num_out_tokens > experts * tokens.shape[0]):
        raise ValueError(
            f"moe_permute: drop_and_pad with num_out_tokens={num_out_tokens} was asked; it must be a multiple of the "
            f"{experts} experts, each of at most {tokens.shape[0]} rows."
        )
    if topk is not None and (drop_and_pad or num_out_tokens != topk * tokens.shape[0]):
        raise ValueError(
            f"moe_permute: topk={topk} of {tokens.shape[0]} tokens does not go with num_out_tokens={num_out_tokens}, "
            f"drop_and_pad={drop_and_pad}; leave it out where tokens are dropped or padded."
        )
    return experts
