"""Top-k router. T = tokens, E = experts, K = experts per token, G = groups of E / G neighbouring experts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch

from llm_adapt.ops.dispatch import fused_op

__all__ = ["topk_router"]

_EPSILON = 1e-20  # Megatron-Core and DeepSeek-V3 add it to the sum that scores are divided by


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    bias = torch.randn(16, generator=generator) / 4
    yield {"logits": draw(24, 8)}
    yield {"logits": draw(24, 8), "score_function": "softmax_of_chosen", "form": "indices", "scaling_factor": 2.5}
    yield {"logits": draw(33, 16), "topk": 4, "renormalize": True, "probs_dtype": torch.float32}
    grouped = {"topk": 4, "num_groups": 4, "group_topk": 2}
    sigmoid = {"score_function": "sigmoid", "expert_bias": bias, "renormalize": True}
    yield {"logits": draw(33, 16), **sigmoid, **grouped, "scaling_factor": 2.5, "rounding": "scores"}
    yield {"logits": draw(7, 16), **grouped, "scores_per_group": 1, "form": "indices"}
    yield {"logits": draw(32, 8), "capacity_factor": 0.75}
    yield {"logits": draw(32, 8), "capacity_factor": 1.5, "drop_policy": "position", "pad_to_capacity": True}
    yield {"logits": draw(5, 6), "score_function": "sigmoid", "topk": 1}
    yield {"logits": draw(0, 8)}


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    logits = torch.randn(shape, generator=generator).to(dtype)
    return {"logits": logits, "topk": min(8, shape[-1]), "score_function": "sigmoid", "renormalize": True}


# oracle=None: a choice is a step function of the logits, so a kernel is compared with the choice in the same dtype.
@fused_op(
    inputs=_inputs,
    differentiable=("logits",),
    oracle=None,
    example=_example,
    sizes={"Mixtral": (4096, 8), "DeepSeek-V3": (4096, 256)},
)
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
    capacity_factor: float | None = None,
    drop_policy: Literal["probs", "position"] = "probs",
    pad_to_capacity: bool = False,
    rounding: Literal["once", "scores"] = "once",
    probs_dtype: torch.dtype | None = None,
    form: Literal["map", "indices"] = "map",
) -> tuple[torch.Tensor, torch.Tensor]:
    """probs = scaling_factor * score(logits) of the K experts with the largest score + expert_bias, else 0.

    Of equal scores the lower expert is chosen. expert_bias takes part in the choice only, and gets no gradient.

    score_function: "softmax" over all experts, before the choice (use_pre_softmax in Megatron-Core);
        "softmax_of_chosen": the logits choose, then softmax over the K chosen; "sigmoid".
    renormalize: the chosen scores are divided by their sum + 1e-20, before they are scaled.
    num_groups, group_topk: choose group_topk of num_groups groups first, by the sum of each group's scores_per_group
        largest scores (None: K // group_topk as Megatron-Core; DeepSeek-V3: 2, DeepSeek-V2: 1); then K experts of
        these groups.
    capacity_factor: an expert takes ceil(T * K / E * capacity_factor) tokens at most: those with the largest
        probability or, by drop_policy="position", the first ones; of equals the first. The others are dropped.
    pad_to_capacity: an expert that is not full is given the first tokens that did not choose it, with probability 0.
    rounding: "once": in the end. "scores": before the choice as well, to the dtype of logits, as Megatron-Core does.
    form: "map": two tensors over all experts. "indices": of the chosen ones alone, the largest first.

    Shapes: logits [T, E], expert_bias [E] -> form "map": probs [T, E], map [T, E] bool;
        form "indices": probs [T, K], experts [T, K] int64.
    Dtypes: scores in float32 (float64 for float64 logits); probs in probs_dtype, by default that of logits.
    Raises: ValueError for options that do not fit the shapes or one another.
    Source: Megatron-Core 0.16 core/transformer/moe/moe_utils.py; DeepSeek-V3 2024, section 2.1.2; transformers 5
        models mixtral, qwen3_moe, gpt_oss, deepseek_v2 and deepseek_v3.
    """
    check_router(logits, expert_bias, topk, score_function, renormalize, scaling_factor, rounding)
    _check_form(capacity_factor, drop_policy, pad_to_capacity, form)
    check_groups(logits.shape[1], topk, num_groups, group_topk, scores_per_group)
    scores = scores_of(logits, score_function, rounding)
    choice = scores.detach()
    if expert_bias is not None:
        choice = choice + expert_bias.detach().to(choice.dtype)
    if num_groups is not None and group_topk is not None:
        choice = _within_groups(choice, num_groups, group_topk, scores_per_group or topk // group_topk)
    experts = _largest(choice, topk)
    probs = chosen_probs(scores.gather(1, experts), score_function, renormalize, scaling_factor)
    probs = probs.to(probs_dtype or logits.dtype)
    if form == "indices":
        return probs, experts
    return _mapped(probs, experts, logits.shape[1], capacity_factor, drop_policy, pad_to_capacity)


def scores_of(logits: torch.Tensor, score_function: str, rounding: str) -> torch.Tensor:
    """Scores [T, E] of the experts, in float32 or float64; the logits where these choose. For kernels as well."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if score_function == "softmax_of_chosen":
        return wide
    scores = wide.softmax(-1) if score_function == "softmax" else wide.sigmoid()
    return scores.to(logits.dtype).to(wide.dtype) if rounding == "scores" else scores


def chosen_probs(scores: torch.Tensor, score_function: str, renormalize: bool, scaling_factor: float) -> torch.Tensor:
    """The probabilities [T, K] of the chosen experts from their scores; for kernels as well."""
    probs = scores.softmax(-1) if score_function == "softmax_of_chosen" else scores
    if renormalize:
        probs = probs / (probs.sum(-1, keepdim=True) + _EPSILON)
    return probs if scaling_factor == 1.0 else probs * scaling_factor


def _mapped(
    probs: torch.Tensor,
    experts: torch.Tensor,
    num_experts: int,
    capacity_factor: float | None,
    drop_policy: str,
    pad_to_capacity: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and map [T, E] of the chosen experts, as far as these have room."""
    tokens, topk = experts.shape
    empty = probs.new_zeros(tokens, num_experts)
    routing_map = torch.zeros_like(empty, dtype=torch.bool).scatter(1, experts, True)
    dense = empty.scatter(1, experts, probs)
    if capacity_factor is None:
        return dense, routing_map
    capacity = min(math.ceil(tokens * topk / num_experts * capacity_factor), tokens)
    kept = _kept(dense.detach(), routing_map, capacity, drop_policy)
    kept = kept if pad_to_capacity else kept & routing_map
    return torch.where(kept, dense, 0), kept


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Columns of the largest scores of each row, the largest first; of equals the lower column, unlike torch.topk."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _within_groups(choice: torch.Tensor, num_groups: int, group_topk: int, scores_per_group: int) -> torch.Tensor:
    """The scores with -inf for the experts of groups that are not chosen."""
    tokens, experts = choice.shape
    members = choice.view(tokens, num_groups, experts // num_groups)
    strength = members.sort(dim=-1, descending=True).values[..., :scores_per_group].sum(-1)
    chosen = torch.zeros_like(strength, dtype=torch.bool).scatter(1, _largest(strength, group_topk), True)
    return members.masked_fill(~chosen.unsqueeze(-1), float("-inf")).view(tokens, experts)


def _kept(probs: torch.Tensor, routing_map: torch.Tensor, capacity: int, drop_policy: str) -> torch.Tensor:
    """The map of the tokens that each expert takes: `capacity` in each column, first those that chose it."""
    # Probabilities are not negative: -1 puts a token that did not choose the expert behind all that did.
    rank = torch.where(routing_map, probs if drop_policy == "probs" else torch.zeros_like(probs), -1)
    tokens = _largest(rank.t(), capacity).t()
    return torch.zeros_like(routing_map).scatter(0, tokens, True)


def check_router(
    logits: torch.Tensor,
    expert_bias: torch.Tensor | None,
    topk: int,
    score_function: str,
    renormalize: bool,
    scaling_factor: float,
    rounding: str,
) -> None:
    """Refuse shapes and scores that have no meaning; for kernels as well."""
    if logits.ndim != 2:
        raise ValueError(f"topk_router: logits [T, E] were expected; found {tuple(logits.shape)}. Flatten the tokens.")
    experts = logits.shape[1]
    if not 1 <= topk <= experts:
        raise ValueError(f"topk_router: topk={topk} of {experts} experts was asked; give 1 to {experts}.")
    if expert_bias is not None and expert_bias.shape != (experts,):
        raise ValueError(f"topk_router: expert_bias must have shape ({experts},); found {tuple(expert_bias.shape)}.")
    if score_function not in ("softmax", "softmax_of_chosen", "sigmoid"):
        raise ValueError(
            f"topk_router: score_function={score_function!r} is unknown; give 'softmax', 'softmax_of_chosen' or "
            "'sigmoid'."
        )
    if renormalize and score_function == "softmax_of_chosen":
        raise ValueError("topk_router: a softmax of the chosen sums to 1 already; leave renormalize=False.")
    if rounding == "scores" and score_function == "softmax_of_chosen":
        raise ValueError("topk_router: a softmax of the chosen comes after the choice; leave rounding='once'.")
    if rounding not in ("once", "scores"):
        raise ValueError(f"topk_router: rounding={rounding!r} is unknown; give 'once' or 'scores'.")
    if not scaling_factor > 0:
        raise ValueError(f"topk_router: scaling_factor={scaling_factor} was asked; it must be positive.")


def _check_form(capacity_factor: float | None, drop_policy: str, pad_to_capacity: bool, form: str) -> None:
    """Refuse capacities that have no meaning, and unknown forms."""
    if form not in ("map", "indices"):
        raise ValueError(f"topk_router: form={form!r} is unknown; give 'map' or 'indices'.")
    if capacity_factor is not None and (capacity_factor <= 0 or form == "indices"):
        raise ValueError(
            f"topk_router: capacity_factor={capacity_factor} with form={form!r} was asked; it must be positive, and "
            "which tokens are dropped can be told in form='map' only."
        )
    if drop_policy not in ("probs", "position"):
        raise ValueError(f"topk_router: drop_policy={drop_policy!r} is unknown; give 'probs' or 'position'.")
    if capacity_factor is None and (pad_to_capacity or drop_policy != "probs"):
        raise ValueError(
            f"topk_router: pad_to_capacity={pad_to_capacity} and drop_policy={drop_policy!r} were asked without a "
            "capacity_factor; give one."
        )


def check_groups(
    experts: int, topk: int, num_groups: int | None, group_topk: int | None, scores_per_group: int | None
) -> None:
    """Refuse groups that cannot hold the choice; for kernels as well."""
    if num_groups is None and group_topk is None and scores_per_group is None:
        return
    found = f"num_groups={num_groups}, group_topk={group_topk}, scores_per_group={scores_per_group}"
    if num_groups is None or group_topk is None:
        raise ValueError(f"topk_router: {found} was asked; give num_groups and group_topk together.")
    if num_groups < 1 or experts % num_groups or not 1 <= group_topk <= num_groups:
        raise ValueError(
            f"topk_router: {found} was asked for {experts} experts; groups must be of one size, and group_topk of them."
        )
    size = experts // num_groups
    if topk > group_topk * size:
        raise ValueError(f"topk_router: {found} leaves {group_topk * size} experts, fewer than topk={topk}.")
    per_group = topk // group_topk if scores_per_group is None else scores_per_group
    if not 1 <= per_group <= size:
        raise ValueError(f"topk_router: {found} sums {per_group} scores of groups of {size}; give scores_per_group.")
