"""The reverse of MoE permutation. T = tokens, H = hidden size, E = experts, R = rows: (token, expert) pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llm_adapt.ops.dispatch import fused_op

__all__ = ["moe_unpermute"]


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    def route(tokens: int, experts: int, topk: int) -> torch.Tensor:
        chosen = torch.rand(tokens, experts, generator=generator).topk(topk, dim=1).indices
        return torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, chosen, True)

    def case(tokens: int, hidden: int, experts: int, topk: int) -> tuple[torch.Tensor, dict[str, Any]]:
        routing_map = route(tokens, experts, topk)
        rows = routing_map.t().nonzero()[:, 1]
        return routing_map, {"permuted": draw(len(rows), hidden), "sorted_indices": rows, "num_tokens": tokens}

    yield {**case(12, 16, 8, 2)[1], "topk": 2}
    routing_map, given = case(9, 5, 4, 3)
    yield {**given, "probs": draw(9, 4), "routing_map": routing_map}
    yield {**given, "probs": draw(9, 4).float(), "routing_map": routing_map}
    given["sorted_indices"] = torch.cat([given["sorted_indices"][:20], torch.full((7,), -1)])
    yield {**given, "probs": draw(9, 4), "routing_map": routing_map.int()}
    rows = torch.tensor([0, 3, 4, 1, 2, 0])
    padded = {"permuted": draw(6, 5), "sorted_indices": rows, "num_tokens": 7, "drop_and_pad": True}
    yield {**padded, "probs": draw(7, 2), "routing_map": route(7, 2, 1)}
    yield case(0, 16, 4, 1)[1]


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    chosen = torch.rand(shape[0], 8, generator=generator).topk(2, dim=1).indices
    routing_map = torch.zeros(shape[0], 8, dtype=torch.bool).scatter(1, chosen, True)
    rows = routing_map.t().nonzero()[:, 1]
    permuted = torch.randn(2 * shape[0], shape[1], generator=generator).to(dtype)
    probs = torch.rand(shape[0], 8, generator=generator)
    given = {"probs": probs, "routing_map": routing_map, "topk": 2}
    return {"permuted": permuted, "sorted_indices": rows, "num_tokens": shape[0], **given}


def shrink(arguments: dict[str, Any]) -> dict[str, Any]:
    """A call of fewer columns: the rows stay, since their number is what the routing map says."""
    return arguments | {"permuted": arguments["permuted"][:, :64]}


@fused_op(
    inputs=_inputs,
    differentiable=("permuted", "probs"),
    dynamic=frozenset({"num_tokens"}),
    shrink=shrink,
    example=_example,
    sizes={"Mixtral": (4096, 4096)},
)
def moe_unpermute(
    permuted: torch.Tensor,
    sorted_indices: torch.Tensor,
    num_tokens: int,
    probs: torch.Tensor | None = None,
    routing_map: torch.Tensor | None = None,
    drop_and_pad: bool = False,
    topk: int | None = None,
) -> torch.Tensor:
    """y[t] = sum over rows r with sorted_indices[r] = t of probs[t, expert of r] * permuted[r]; without probs, of rows.

    Rows with a negative index add nothing; a token without rows is 0.
    probs: the expert of a row is found from routing_map, which must be given, as `moe_permute` ordered them;
        with drop_and_pad, where each expert has R / E rows, from E alone.
    num_tokens: T, the rows of restore_shape in Megatron-Core.
    topk: the caller's word that every token has exactly K rows, so that R = T * K. It changes nothing here; kernels
        that can do nothing else ask for it.

    Shapes: permuted [R, H], sorted_indices [R], probs and routing_map [T, E] -> y [T, H].
    Dtypes: products and sums in float32 (float64 for float64), rounded once to the dtype of permuted.
    Raises: ValueError for shapes that do not fit, and for probs without routing_map.
    Source: Megatron-Core 0.16 core/transformer/moe/moe_utils.py, unpermute (which sums in the wider of both dtypes).
    """
    check_rows(permuted, sorted_indices, num_tokens, probs, routing_map, drop_and_pad, topk)
    wide = torch.promote_types(permuted.dtype, torch.float32)
    is_row = sorted_indices >= 0
    # Left out before anything is computed of them: what stands there may be nan.
    rows = torch.where(is_row.unsqueeze(1), permuted, 0).to(wide)
    if probs is not None and routing_map is not None and num_tokens:
        expert = experts_of(sorted_indices, routing_map, drop_and_pad)
        weight = probs[sorted_indices.clamp(min=0), expert].to(wide)
        rows = rows * weight.unsqueeze(1)
    # One token more takes the rows that belong to none.
    token = torch.where(is_row, sorted_indices, num_tokens)
    summed = torch.zeros(num_tokens + 1, permuted.shape[1], dtype=wide, device=permuted.device)
    y = summed.index_add(0, token, rows)[:num_tokens].to(permuted.dtype)
    # Of no tokens there is nothing to weigh; the probs stay in the graph.
    return y if num_tokens or probs is None else y + probs.sum().to(y.dtype)


def experts_of(sorted_indices: torch.Tensor, routing_map: torch.Tensor, drop_and_pad: bool) -> torch.Tensor:
    """The expert [R] of each row; for kernels as well."""
    count, experts = sorted_indices.shape[0], routing_map.shape[1]
    rows = torch.arange(count, device=sorted_indices.device)
    if drop_and_pad:
        return rows // max(count // experts, 1)
    ends = routing_map.detach().bool().sum(0).cumsum(0)
    # Rows beyond the last pair have no expert: any will do, they are not counted.
    return torch.searchsorted(ends, rows, right=True).clamp(max=experts - 1)


def check_rows(
    permuted: torch.Tensor,
    sorted_indices: torch.Tensor,
    num_tokens: int,
    probs: torch.Tensor | None,
    routing_map: torch.Tensor | None,
    drop_and_pad: bool,
    topk: int | None,
) -> None:
    """Refuse arguments of `moe_unpermute` that do not fit; for its kernels as well."""
    if permuted.ndim != 2 or sorted_indices.shape != permuted.shape[:1]:
        raise ValueError(
            f"moe_unpermute: permuted [R, H] and sorted_indices [R] were expected; found {tuple(permuted.shape)} and "
            f"{tuple(sorted_indices.shape)}."
        )
    if num_tokens < 0:
        raise ValueError(f"moe_unpermute: num_tokens={num_tokens} was asked; give 0 or more.")
    if topk is not None and (drop_and_pad or permuted.shape[0] != topk * num_tokens):
        raise ValueError(
            f"moe_unpermute: topk={topk} of {num_tokens} tokens does not go with {permuted.shape[0]} rows, "
            f"drop_and_pad={drop_and_pad}; leave it out where tokens were dropped or padded."
        )
    if (probs is None) != (routing_map is None):
        raise ValueError("moe_unpermute: probs and routing_map say together what a row weighs; give both or neither.")
    if probs is None or routing_map is None:
        if drop_and_pad:
            raise ValueError("moe_unpermute: drop_and_pad tells the experts of rows; without probs leave it False.")
        return
    if probs.shape != routing_map.shape or probs.ndim != 2 or probs.shape[0] != num_tokens:
        raise ValueError(
            f"moe_unpermute: probs and routing_map [T, E] with T={num_tokens} were expected; found "
            f"{tuple(probs.shape)} and {tuple(routing_map.shape)}."
        )
    if drop_and_pad and permuted.shape[0] % probs.shape[1]:
        raise ValueError(
            f"moe_unpermute: drop_and_pad with {permuted.shape[0]} rows of {probs.shape[1]} experts was asked; each "
            "must have the same number."
        )
