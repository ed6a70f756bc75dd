"""Megatron's permutations of tokens by the operators moe_permute and moe_unpermute.

T tokens, E experts, K experts a token, H hidden size, R rows after permutation: (token, expert) pairs by expert.

Megatron counts the rows by the map itself unless it pads; the operators are told R. A caller whose R is not the number
of pairs gets rows of zeros with index -1, which add nothing on the way back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = [
    "RowsOfTopk",
    "dropless_rows",
    "fused_permute",
    "fused_permute_with_probs",
    "fused_sort_chunks_by_index",
    "fused_sort_chunks_by_index_with_probs",
    "fused_unpermute",
    "permute",
    "sort_chunks",
    "unpermute",
]

Function = Callable[..., Any]


class RowsOfTopk(int):
    """R = T * K where every token has exactly K rows; the number knows K."""

    topk: int

    def __new__(cls, tokens: int, topk: int) -> RowsOfTopk:
        """Count the rows."""
        found = super().__new__(cls, tokens * topk)
        found.topk = topk
        return found


def dropless_rows(original: Function) -> Function:
    """`MoEAlltoAllTokenDispatcher.preprocess`, whose number of rows says where it is K of each token.

    It is a tensor where tokens are dropped or the map is padded; where each expert is padded it is no such number.
    """

    @functools.wraps(original)
    def preprocess(self: Any, routing_map: torch.Tensor) -> Any:
        found = original(self, routing_map)
        topk = self.config.moe_router_topk
        if not self.drop_and_pad and type(self.num_out_tokens) is int:
            self.num_out_tokens = RowsOfTopk(self.num_out_tokens // topk, topk)
        return found

    return preprocess


def permute(has_te: bool) -> Callable[[Function], Function]:
    """`permute`: (permuted [R, H], their probs [R] or None, sorted_indices [R]).

    From 0.17 on two results follow: None, and tokens_per_expert as it was given, which TransformerEngine alone pads.
    """

    def wrap(original: Function) -> Function:
        is_longer = "tokens_per_expert" in inspect.signature(original).parameters

        @functools.wraps(original)
        def permute(
            tokens: torch.Tensor,
            routing_map: torch.Tensor,
            probs: torch.Tensor | None = None,
            num_out_tokens: Any = None,
            fused: bool = False,
            drop_and_pad: bool = False,
            *padding: Any,
            **newer: Any,
        ) -> Any:
            if fused and has_te:
                given = (tokens, routing_map, probs, num_out_tokens, True, drop_and_pad)
                return original(*given, *padding, **newer)
            found = _permuted(tokens, routing_map, probs, num_out_tokens, drop_and_pad)
            return (*found, None, padding[0] if padding else newer.get("tokens_per_expert")) if is_longer else found

        return permute

    return wrap


def _permuted(
    tokens: torch.Tensor,
    routing_map: torch.Tensor,
    probs: torch.Tensor | None,
    num_out_tokens: Any,
    drop_and_pad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    from llm_adapt.ops.moe_permute import moe_permute

    if not tokens.shape[0]:  # as they are
        indices = torch.empty(0, dtype=torch.int64, device=tokens.device)
        return tokens[:0], None if probs is None else probs.reshape(-1), indices
    topk = num_out_tokens.topk if isinstance(num_out_tokens, RowsOfTopk) else None
    if num_out_tokens is None:
        num_out_tokens, drop_and_pad = routing_map.bool().sum(), False
    count = int(num_out_tokens)  # a tensor of the dispatcher has been brought to the host
    if drop_and_pad:
        count -= count % routing_map.shape[1]  # whole rows of capacity, as Megatron's division leaves them
    permuted, permuted_probs, indices = moe_permute(
        tokens, routing_map, count, probs, drop_and_pad=drop_and_pad, topk=topk
    )
    if topk is not None:
        indices.rows_per_token = topk  # type: ignore[attr-defined]
    return permuted, permuted_probs, indices


def unpermute(has_te: bool) -> Callable[[Function], Function]:
    """`unpermute`: y [T, H], the sum of the rows of each token, weighted by probs where they are given."""

    def wrap(original: Function) -> Function:
        @functools.wraps(original)
        def unpermute(
            permuted_tokens: torch.Tensor,
            sorted_indices: torch.Tensor,
            restore_shape: Sequence[int],
            probs: torch.Tensor | None = None,
            routing_map: torch.Tensor | None = None,
            fused: bool = False,
            drop_and_pad: bool = False,
            *padding: Any,
            **newer: Any,
        ) -> Any:
            # pad_offsets, from 0.17 on, come from TransformerEngine's permutation and mean something to it alone.
            if fused and has_te:
                given = (permuted_tokens, sorted_indices, restore_shape, probs, routing_map)
                return original(*given, True, drop_and_pad, *padding, **newer)
            return _unpermuted(permuted_tokens, sorted_indices, restore_shape, probs, routing_map, drop_and_pad)

        return unpermute

    return wrap


def _unpermuted(
    permuted: torch.Tensor,
    sorted_indices: torch.Tensor,
    restore_shape: Sequence[int],
    probs: torch.Tensor | None,
    routing_map: torch.Tensor | None,
    drop_and_pad: bool,
) -> torch.Tensor:
    from llm_adapt.ops.moe_unpermute import moe_unpermute

    if not restore_shape[0]:  # no row to add to; the probs stay in the graph
        none = permuted[:0]
        return none if probs is None else none + probs.sum().to(none.dtype)
    topk = getattr(sorted_indices, "rows_per_token", None)
    if probs is None:
        return moe_unpermute(permuted, sorted_indices, restore_shape[0], topk=topk)
    return moe_unpermute(
        permuted, sorted_indices, restore_shape[0], probs, routing_map, drop_and_pad=drop_and_pad, topk=topk
    )


def sort_chunks(original: Function) -> Function:
    """`sort_chunks_by_idxs` with fused=True: the chunks in another order, by one gather; unfused as before.

    The sizes stay on their device. Where they are on the host already, Megatron's split and join is as good.
    """

    @functools.wraps(original)
    def sort_chunks_by_idxs(
        input: torch.Tensor,
        split_sizes: torch.Tensor,
        sorted_idxs: torch.Tensor,
        probs: torch.Tensor | None = None,
        fused: bool = False,
    ) -> Any:
        if not fused or split_sizes.device.type == "cpu":
            return original(input, split_sizes, sorted_idxs, probs)
        return _sorted_chunks(input, probs, split_sizes, sorted_idxs)

    return sort_chunks_by_idxs


def _sorted_chunks(
    rows: torch.Tensor, probs: torch.Tensor | None, split_sizes: torch.Tensor, sorted_idxs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows [R, ...] and probs [R], whose chunks of split_sizes [C] stand in the order sorted_idxs [C] afterwards."""
    source = _rows_of_chunks(split_sizes.to(rows.device), sorted_idxs.to(rows.device), rows.shape[0])
    return rows.index_select(0, source), None if probs is None else probs.index_select(0, source)


def _rows_of_chunks(sizes: torch.Tensor, order: torch.Tensor, count: int) -> torch.Tensor:
    """For each place [R], the row that comes there. The sizes add up to `count`."""
    starts = sizes.cumsum(0) - sizes
    sizes, starts = sizes[order], starts[order]
    ends = sizes.cumsum(0)
    place = torch.arange(count, device=sizes.device)
    chunk = torch.searchsorted(ends, place, right=True).clamp(max=max(order.shape[0] - 1, 0))
    return place - (ends - sizes)[chunk] + starts[chunk]


def fused_permute(tokens: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: Any = None) -> Any:
    """(permuted [R, H], sorted_indices [R]), as Megatron calls TransformerEngine's."""
    permuted, _, indices = _permuted(tokens, routing_map, None, num_out_tokens, False)
    return permuted, indices


def fused_permute_with_probs(
    tokens: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: Any = None
) -> Any:
    """(permuted [R, H], permuted probs [R], sorted_indices [R]), as Megatron calls TransformerEngine's."""
    return _permuted(tokens, routing_map, probs, num_out_tokens, False)


def fused_unpermute(
    permuted: torch.Tensor,
    sorted_indices: torch.Tensor,
    merging_probs: torch.Tensor | None = None,
    restore_shape: Sequence[int] | None = None,
) -> torch.Tensor:
    """y [T, H], as Megatron calls TransformerEngine's.

    Raises: NotImplementedError for merging_probs: TransformerEngine's indices tell the expert of a row, these do not.
    """
    if merging_probs is not None or restore_shape is None:
        raise NotImplementedError(
            "fused_unpermute was called with merging_probs, or without restore_shape; TransformerEngine is not "
            "installed, and without it neither is known. Call moe_utils.unpermute with probs and routing_map."
        )
    return _unpermuted(permuted, sorted_indices, restore_shape, None, None, False)


def fused_sort_chunks_by_index(
    input: torch.Tensor, split_sizes: torch.Tensor, sorted_indices: torch.Tensor
) -> torch.Tensor:
    """The chunks of the rows in another order."""
    return _sorted_chunks(input, None, split_sizes, sorted_indices)[0]


def fused_sort_chunks_by_index_with_probs(
    input: torch.Tensor, probs: torch.Tensor, split_sizes: torch.Tensor, sorted_indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The chunks of the rows, and of their probs, in another order."""
    return _sorted_chunks(input, probs, split_sizes, sorted_indices)
