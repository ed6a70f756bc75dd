"""Grouped matrix product and permutation of torch_npu. M = rows by expert, E = experts, K and N = columns.

npu_grouped_matmul has no derivative, so it stands in a Function of ours: dx is its product with the transposed
weights, dw its product grouped along the rows (group_type 2). Rows beyond the last expert and the gradient of an
expert without rows are not written by it, and are set to 0. Counts stay on the device (group_list_type 1).

npu_moe_token_permute_with_routing_map and its reverse take tokens with the same number of experts each, so they serve
calls with topk alone. Their rows stand as those of the ops do. Their sorted_indices are another thing: the row of the
i-th (token, expert) pair counted by token, int32, where the ops say the token of a row; each is made from the other on
the device. The reverse multiplies by probs, taken from the map in the order of the pairs, and its document does not
say in which precision it sums: the proof on the device decides. Its gradient of probs has the dtype of the rows, and
CANN's operator knows one dtype alone; so rows and probs of two dtypes are both widened. drop_and_pad is left out: the
document orders the tokens of an expert by an argsort that is neither said to be descending nor stable.
npu_moe_token_permute serves nothing here: it asks for the experts of each token, which would have to be found from the
map.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_npu

from llm_adapt.ops.autograd import Function
from llm_adapt.ops.dispatch import Call
from llm_adapt.ops.grouped_gemm import row_experts
from llm_adapt.ops.kernels.torch_npu.library import npu_kernel

__all__ = ["grouped_gemm", "moe_permute", "moe_unpermute"]

_ROWS, _INNER = 0, 2  # group_type: which axis is grouped
_ENDS, _COUNTS = 0, 1  # group_list_type


def _refuses(call: Call) -> str | None:
    if call.x.dtype != call.weight.dtype:
        return "takes x and weight of one dtype"
    if max(*call.weight.shape[1:]) >= 65536:
        return "takes fewer than 65536 columns"
    return None


def _product(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, group_type: int) -> torch.Tensor:
    # Counts may not be of length 1, says the document; the only count is also the only end.
    kind = _ENDS if counts.shape[0] == 1 else _COUNTS
    found: torch.Tensor = torch_npu.npu_grouped_matmul(
        [x],
        [weight],
        group_list=counts,
        split_item=2 if group_type == _ROWS else 3,
        group_type=group_type,
        group_list_type=kind,
    )[0]
    return found


def _without_rest(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Zeros in the rows of no expert; nothing is read on the host."""
    index = torch.arange(rows.shape[0], device=rows.device)
    return rows.masked_fill((index >= counts.sum())[:, None], 0.0)


class _GroupedGEMM(Function):
    """y = x @ weight[e].

    Rows of x and dy must be contiguous: torch_npu takes no transposed x where rows are grouped, and for the gradient
    of the weight x as a transposed view of contiguous memory and dy not transposed.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight, counts)
        return _without_rest(_product(x, weight, counts, _ROWS), counts)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, counts = ctx.saved_tensors
        dx = dw = None
        dy = dy.contiguous()
        if ctx.needs_input_grad[0]:
            dx = _without_rest(_product(dy, weight.transpose(1, 2), counts, _ROWS), counts)
        if ctx.needs_input_grad[1]:
            dw = _product(x.t(), dy, counts, _INNER).masked_fill((counts == 0)[:, None, None], 0.0)
        return dx, dw, None


@npu_kernel("grouped_gemm", "npu_grouped_matmul", refuses=_refuses)
def grouped_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """npu_grouped_matmul in a Function; the bias is added to its result."""
    counts = tokens_per_expert.to(torch.int64)
    y: torch.Tensor = _GroupedGEMM.apply(x, weight.transpose(1, 2) if transposed else weight, counts)  # type: ignore[no-untyped-call]
    if bias is None:
        return y
    expert = row_experts(tokens_per_expert, x.shape[0]).clamp(max=weight.shape[0] - 1)
    return _without_rest((y + bias[expert]).to(x.dtype), counts)


_EXACT = 16777215  # indices pass through float32


_MIXED = (torch.bfloat16, torch.float32)  # the dtypes of tokens and probs that may differ
_SAME_TOPK = "takes only tokens with the same number of experts each: give topk where that is so"


def _permute_refuses(call: Call) -> str | None:
    tokens, experts = call.tokens.shape[0], call.routing_map.shape[1]
    reason = None if call.topk is not None else _SAME_TOPK
    probs = call.tensors.get("probs")
    if reason is None and probs and probs.dtype != call.tokens.dtype and (call.tokens.dtype, probs.dtype) != _MIXED:
        reason = f"takes probs of the dtype of the tokens, or float32 with bfloat16 tokens; found {probs.dtype}"
    if reason is None and not 0 < call.topk < 512:
        return "takes a topk of 1 to 511"
    if reason is None and max(call.topk * tokens, experts) >= _EXACT:
        return f"takes fewer than {_EXACT} rows and experts"
    return reason


def _unpermute_refuses(call: Call) -> str | None:
    reason = None if call.topk is not None else _SAME_TOPK
    if reason is None and not 0 < call.topk <= 512:
        return "takes a topk of 1 to 512"
    if reason is None and ("probs" in call.tensors) != ("routing_map" in call.tensors):
        return "takes probs and routing_map together"
    return reason


def _demand_rows(op: str, rows: int, tokens: int, topk: int) -> None:
    """The number of rows is torch_npu's own quotient: one that does not fit would be rounded in silence."""
    if rows != topk * tokens:
        raise ValueError(
            f"{op}: topk={topk} of {tokens} tokens does not go with {rows} rows; leave it out where tokens are dropped."
        )


class _BothReached(Function):
    """Two results of one operator as they are; in backward a gradient that is not there becomes zeros.

    torch_npu reads the shape of the tokens' gradient without asking whether there is one: a loss of the probs alone
    would end in an IndexError.
    """

    @staticmethod
    def forward(ctx: Any, permuted: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.mark_dirty(permuted, probs)  # nothing is written; returned so, they are no views
        return permuted, probs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return gradients


@npu_kernel(
    "moe_permute",
    "npu_moe_token_permute_with_routing_map",
    refuses=_permute_refuses,
    deterministic=False,  # the gradient is a sum whose order is not documented
)
def moe_permute(
    tokens: torch.Tensor,
    routing_map: torch.Tensor,
    num_out_tokens: int,
    probs: torch.Tensor | None = None,
    topk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """npu_moe_token_permute_with_routing_map; the token of each row is found from the row of each pair."""
    count = topk or 0
    _demand_rows("moe_permute", num_out_tokens, tokens.shape[0], count)
    permuted, permuted_probs, rows = torch_npu.npu_moe_token_permute_with_routing_map(
        tokens, routing_map.bool(), probs=probs, num_out_tokens=num_out_tokens
    )
    token = torch.arange(num_out_tokens, device=tokens.device) // count
    indices = torch.empty_like(token).scatter(0, rows.to(torch.int64), token)
    if probs is None:
        return permuted, None, indices
    permuted, permuted_probs = _BothReached.apply(permuted, permuted_probs)  # type: ignore[no-untyped-call]
    return permuted, permuted_probs, indices


@npu_kernel(
    "moe_unpermute",
    "npu_moe_token_unpermute_with_routing_map",
    refuses=_unpermute_refuses,
    deterministic=False,  # "by default", says the document
)
def moe_unpermute(
    permuted: torch.Tensor,
    sorted_indices: torch.Tensor,
    num_tokens: int,
    probs: torch.Tensor | None = None,
    routing_map: torch.Tensor | None = None,
    topk: int | None = None,
) -> torch.Tensor:
    """npu_moe_token_unpermute_with_routing_map; a stable sort of the tokens of the rows gives the row of each pair."""
    _demand_rows("moe_unpermute", permuted.shape[0], num_tokens, topk or 0)
    dtype = permuted.dtype
    if probs is not None and probs.dtype != dtype:
        wide = torch.promote_types(dtype, probs.dtype)
        permuted, probs = permuted.to(wide), probs.to(wide)
    y: torch.Tensor = torch_npu.npu_moe_token_unpermute_with_routing_map(
        permuted,
        sorted_indices.argsort(stable=True).to(torch.int32),
        [num_tokens, permuted.shape[1]],
        probs=probs,
        routing_map=None if routing_map is None else routing_map.bool(),
    )
    return y.to(dtype)
