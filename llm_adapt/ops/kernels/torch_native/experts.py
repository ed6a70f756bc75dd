"""Mixtures of experts on the CPU. T tokens, E experts, K experts a token, H hidden size, R rows (token, expert).

The indices come from torch.nonzero, whose size the host reads: elsewhere it would have to wait for the device.
Source: torch 2.13 nonzero, index_select, embedding_bag and topk.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llm_adapt.ops.autograd import Function
from llm_adapt.ops.dispatch import Call, kernel
from llm_adapt.ops.moe_permute import checked_experts
from llm_adapt.ops.moe_unpermute import check_rows, experts_of
from llm_adapt.ops.topk_router import check_groups, check_router, chosen_probs, scores_of

__all__ = ["moe_permute", "moe_unpermute", "topk_router"]

_FEW = 8  # so many times torch.max takes less time than torch.topk once
_SMALL = 2**19  # elements that are added up at once: sorting the rows of tokens costs more
_SMALL_FORWARD = 2**21  # the same of 16 bits without gradients, where blocks would convert each row on its own
_BLOCK = 2**18  # elements of a block: smaller ones cost more calls than the cache saves


def _elsewhere(call: Call) -> str | None:
    return None if call.device == "cpu" else "reads indices on the host: on the CPU only"


@kernel("moe_permute", "torch.nonzero and torch.index_select", refuses=_elsewhere)
def moe_permute(
    tokens: torch.Tensor,
    routing_map: torch.Tensor,
    num_out_tokens: int,
    probs: torch.Tensor | None = None,
    topk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The pairs that are there, counted on the host; no row is masked unless some are missing."""
    experts = checked_experts(tokens, routing_map, num_out_tokens, probs, False, topk)
    expert, indices = routing_map.detach().t().nonzero()[:num_out_tokens].t().contiguous()
    permuted = tokens.index_select(0, indices)
    permuted_probs = None if probs is None else probs.reshape(-1).index_select(0, indices * experts + expert)
    if missing := num_out_tokens - indices.shape[0]:
        permuted, indices = F.pad(permuted, (0, 0, 0, missing)), F.pad(indices, (0, missing), value=-1)
        permuted_probs = None if permuted_probs is None else F.pad(permuted_probs, (0, missing))
    return permuted, permuted_probs, indices


class _SumOfRows(Function):
    """y[t] = sum of weight[r] rows[r] over the rows of a token, block by block in float32. Saved: the inputs."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor | None, token: torch.Tensor, num_tokens: int
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight, token)
        wide = torch.promote_types(rows.dtype, torch.float32)
        counts = torch.bincount(token + 1, minlength=num_tokens + 1)  # at 0: the rows of no token, which come first
        order, ends = token.argsort(stable=True), counts.cumsum(0)
        weight = None if weight is None else weight.index_select(0, order)
        if weight is None or wide == rows.dtype:  # bags of 16 bits are added up in float32 as well
            left = int(counts[0])
            chosen = None if weight is None else weight[left:]
            return _bags(rows, order[left:], ends[:-1] - left, chosen)
        y = rows.new_empty(num_tokens, rows.shape[1])
        size = max(1, _BLOCK // max(1, rows.shape[1]) * num_tokens // max(1, rows.shape[0]))
        marks = [*ends[:-1:size].tolist(), rows.shape[0]]
        for block, (start, stop) in enumerate(itertools.pairwise(marks)):
            mine = slice(block * size, (block + 1) * size)
            part = rows.index_select(0, order[start:stop]).to(wide)
            chosen = None if weight is None else weight[start:stop]
            inside = torch.arange(stop - start, device=rows.device)
            y[mine] = _bags(part, inside, ends[:-1][mine] - start, chosen)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, token = ctx.saved_tensors
        wide = torch.promote_types(rows.dtype, torch.float32)
        is_row = token >= 0
        token = token.clamp(min=0)
        if weight is None:
            grad = upstream.index_select(0, token) if upstream.shape[0] else torch.zeros_like(rows)
            return (grad if is_row.all() else grad.masked_fill(~is_row[:, None], 0)), None, None, None
        grad, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
        for mine in _blocks(rows):
            if wide == rows.dtype:
                part = torch.index_select(upstream, 0, token[mine], out=grad[mine])
            else:
                part = upstream.index_select(0, token[mine]).to(wide)
            torch.sum(part * rows[mine], 1, out=grad_weight[mine])
            torch.mul(part, weight[mine, None], out=grad[mine])
        if not is_row.all():  # what stands there may be nan
            grad, grad_weight = grad.masked_fill(~is_row[:, None], 0), grad_weight.masked_fill(~is_row, 0)
        return grad, grad_weight, None, None


def _bags(rows: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """The sums [T, H] of the rows of each bag, weighted."""
    return F.embedding_bag(order, rows, starts, mode="sum", per_sample_weights=weight)


def _pairs_in_order(sorted_indices: torch.Tensor, routing_map: torch.Tensor) -> torch.Tensor | None:
    """Where the probability [R] of each row lies in probs, if the rows are the map's pairs in moe_permute's order."""
    expert, token = routing_map.detach().t().nonzero(as_tuple=True)
    if not torch.equal(token, sorted_indices):
        return None
    return torch.add(expert, token, alpha=routing_map.shape[1])


def _blocks(rows: torch.Tensor) -> Iterator[slice]:
    size = max(1, _BLOCK // max(1, rows.shape[1]))
    return (slice(start, start + size) for start in range(0, rows.shape[0], size))


def _not_unpermuted(call: Call) -> str | None:
    if not call.permuted.shape[-1:].numel() or not call.permuted.shape[0]:
        return "takes at least one row and one column"
    return _elsewhere(call)


@kernel("moe_unpermute", "torch.nn.functional.embedding_bag", refuses=_not_unpermuted)
def moe_unpermute(
    permuted: torch.Tensor,
    sorted_indices: torch.Tensor,
    num_tokens: int,
    probs: torch.Tensor | None = None,
    routing_map: torch.Tensor | None = None,
    drop_and_pad: bool = False,
    topk: int | None = None,
) -> torch.Tensor:
    """The rows of a token are gathered and summed where they are, with no float32 copy of them all."""
    check_rows(permuted, sorted_indices, num_tokens, probs, routing_map, drop_and_pad, topk)
    weight, wide = None, torch.promote_types(permuted.dtype, torch.float32)
    if probs is not None and routing_map is not None:
        pair = None if drop_and_pad else _pairs_in_order(sorted_indices, routing_map)
        has_all = pair is not None
        if pair is None:
            pair = sorted_indices.clamp(min=0) * probs.shape[1] + experts_of(sorted_indices, routing_map, drop_and_pad)
        weight = probs.reshape(-1).index_select(0, pair).to(wide)
        most = _SMALL if torch.is_grad_enabled() else _SMALL_FORWARD if wide != permuted.dtype else 0
        is_small = permuted.numel() <= most
        if is_small and (has_all or bool((sorted_indices >= 0).all())):
            weighted = permuted * weight.unsqueeze(1)  # before the zeros, which are then in the cache still
            sums = weighted.new_zeros(num_tokens, permuted.shape[1])
            return sums.index_add_(0, sorted_indices, weighted).to(permuted.dtype)
    y: torch.Tensor = _SumOfRows.apply(permuted.contiguous(), weight, sorted_indices, num_tokens)
    return y


def _not_routed(call: Call) -> str | None:
    if call.logits.dtype == torch.float64:
        return "puts a float32 score and its column into one integer"
    return _elsewhere(call)


@kernel("topk_router", "torch.topk of integers", refuses=_not_routed, compilable=True)
def topk_router(
    logits: torch.Tensor,
    expert_bias: torch.Tensor | None = None,
    topk: int = 2,
    score_function: Literal["softmax", "softmax_of_chosen", "sigmoid"] = "softmax",
    renormalize: bool = False,
    scaling_factor: float = 1.0,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scores_per_group: int | None = None,
    rounding: Literal["once", "scores"] = "once",
    probs_dtype: torch.dtype | None = None,
    form: Literal["map", "indices"] = "map",
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.topk in the place of a stable sort."""
    check_router(logits, expert_bias, topk, score_function, renormalize, scaling_factor, rounding)
    check_groups(logits.shape[1], topk, num_groups, group_topk, scores_per_group)
    scores = scores_of(logits, score_function, rounding)
    choice = scores.detach()
    is_positive = score_function != "softmax_of_chosen" and expert_bias is None
    if expert_bias is not None:
        choice = choice + expert_bias.detach().to(choice.dtype)
    if num_groups is not None and group_topk is not None:
        experts = _within_groups(choice, topk, num_groups, group_topk, scores_per_group, is_positive)
    else:
        experts = _largest(choice, topk, is_positive)
    probs = chosen_probs(scores.gather(1, experts), score_function, renormalize, scaling_factor)
    probs = probs.to(probs_dtype or logits.dtype)
    if form == "indices":
        return probs, experts
    dense = torch.zeros_like(logits, dtype=probs.dtype, requires_grad=False).scatter_(1, experts, probs)
    return dense, torch.zeros_like(logits, dtype=torch.bool).scatter_(1, experts, True)


def _within_groups(
    choice: torch.Tensor, topk: int, num_groups: int, group_topk: int, scores_per_group: int | None, is_positive: bool
) -> torch.Tensor:
    """The K largest [T, K] of the groups that are chosen; only these are looked at."""
    members = choice.unflatten(1, (num_groups, -1))
    size = members.shape[2]
    strength = members.topk(scores_per_group or topk // group_topk, dim=-1).values.sum(-1)
    groups = _largest(strength, group_topk, is_positive).sort(dim=1).values  # equals stay in the order of columns
    open_scores = members.gather(1, groups.unsqueeze(-1).expand(-1, -1, size)).flatten(1)
    place = _largest(open_scores, topk, is_positive)
    found: torch.Tensor = groups.gather(1, place // size) * size + place % size
    return found


def _largest(scores: torch.Tensor, count: int, is_positive: bool) -> torch.Tensor:
    """Columns of the largest scores, the largest first; of equals the lower column. nan counts as the largest.

    The bits of a float32 grow as it does. torch.max gives the first of equals, torch.topk any of them: it is asked for
    many, of keys of the bits above the column, of which no two are equal.
    """
    if is_positive:
        bits = scores.view(torch.int32) & 0x7FFFFFFF  # nan may have a sign
    else:
        infinity = float("inf")
        given = scores.nan_to_num(infinity, infinity, -infinity).add_(0.0).view(torch.int32)  # -0.0 becomes 0.0
        bits = (given >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(given)  # a negative one grows the other way
    if count > _FEW:
        columns = torch.arange(0, -scores.shape[1], -1, device=scores.device)
        keys = torch.add(columns, bits, alpha=2**32).topk(count, dim=1).values
        return keys.neg_().bitwise_and_(0xFFFFFFFF)
    found = []
    for _ in range(count):
        found.append(bits.max(dim=1, keepdim=True).indices)
        bits.scatter_(1, found[-1], -(2**31))
    return torch.cat(found, dim=1)
