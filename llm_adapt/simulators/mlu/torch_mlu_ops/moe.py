"""Routing of torch_mlu_ops. Legend: input [T, E], k experts for each token."""

from __future__ import annotations

import torch

from .arguments import check_tensors, refuse_given

__all__ = ["moe_softmax_topk"]


@torch.no_grad()
def moe_softmax_topk(
    input: torch.Tensor,
    topk: int,
    normalize: bool = False,
    num_expert_group: int = -1,
    topk_group: int = 0,
    mask: torch.Tensor | None = None,
    normed_by: str = "topk_logit",
    route_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the experts and its k largest: weights [T, k] in float32 (of sum 1 if normalize), experts int32."""
    refuse_given(
        "moe_softmax_topk",
        num_expert_group=(num_expert_group, -1),
        topk_group=(topk_group, 0),
        mask=(mask, None),
        normed_by=(normed_by, "topk_logit"),
        route_scale=(route_scale, 1.0),
    )
    check_tensors("moe_softmax_topk", 2, input)
    weights, experts = input.float().softmax(-1).topk(topk, -1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts.int()
