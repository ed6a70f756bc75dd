"""Grouped matrix product of torch_npu. M = rows by expert, E = experts, K and N = columns before and after.

npu_grouped_matmul has no derivative, so it stands in a Function of ours: dx is its product with the transposed
weights, dw its product grouped along the rows (group_type 2). Rows beyond the last expert and the gradient of an
expert without rows are not written by it, and are set to 0. Counts stay on the device (group_list_type 1).

The permutation of torch_npu (npu_moe_token_permute and its kin) takes only tokens with the same number of experts
each, which a routing map does not say, so it serves no op here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_npu

from llm_adapt.ops.dispatch import Call
from llm_adapt.ops.grouped_gemm import row_experts
from llm_adapt.ops.kernels.torch_npu.library import npu_kernel

__all__ = ["grouped_gemm"]

_ROWS, _INNER = 0, 2  # group_type: which axis is grouped
_COUNTS = 1  # group_list_type: counts, not their cumulative sum


def _refuses(call: Call) -> str | None:
    if call.x.dtype != call.weight.dtype:
        return "takes x and weight of one dtype"
    if max(*call.weight.shape[1:]) >= 65536:
        return "takes fewer than 65536 columns"
    return None


def _product(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, group_type: int) -> torch.Tensor:
    found: torch.Tensor = torch_npu.npu_grouped_matmul(
        [x],
        [weight],
        group_list=counts,
        split_item=2 if group_type == _ROWS else 3,
        group_type=group_type,
        group_list_type=_COUNTS,
    )[0]
    return found


def _without_rest(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Zeros in the rows of no expert; nothing is read on the host."""
    index = torch.arange(rows.shape[0], device=rows.device)
    return rows.masked_fill((index >= counts.sum())[:, None], 0.0)


class _GroupedGEMM(torch.autograd.Function):
    """y = x @ weight[e]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, counts)
        return _without_rest(_product(x, weight, counts, _ROWS), counts)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, counts = ctx.saved_tensors
        dx = dw = None
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
