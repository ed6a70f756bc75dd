"""Megatron's mixture of experts by the operators: the choice of experts, its losses, and both permutations.

T tokens, E experts, K experts a token, H hidden size, R rows after permutation: (token, expert) pairs by expert.

With TransformerEngine, fused=True is its own. Without it Megatron raises there; here the operators compute what is
asked. What an operator does not compute (a replayed choice, scores of another form, a choice made in 16 bits) goes to
Megatron's own function, with a line in the report.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron import permutation
from llm_adapt.frameworks.megatron.seams import seam
from llm_adapt.patching import Row
from llm_adapt.patching.fingerprint import fingerprint_object
from llm_adapt.report import Report

__all__ = ["load_balancing_loss", "rows", "topk_routing", "unfused", "z_loss"]

Function = Callable[..., Any]

_ROUNDED_ONCE = {"0.18": "4dd3b75e15a7", "0.19": "5d01621676e3"}  # topk_routing that rounds at its end alone
_BODIES: dict[str, Mapping[str, str]] = {
    "topk_routing_with_score_function": {
        "0.14": "5e29bac8a276",
        "0.15": "2df241878ee2",
        "0.16": "aebf7017b2ae",
        "0.17": "15e87b4fb828",
        **_ROUNDED_ONCE,
    },
    "switch_load_balancing_loss_func": {"0.14": "17b73cf2e68a", "0.15": "f47db70f33d8", "0.16 to 0.19": "76f05f58a90f"},
    "z_loss_func": {"0.12 to 0.15": "46f6ca2d993e", "0.16 to 0.19": "d65654266384"},
    "permute": {
        "0.12": "b1b88992b466",
        "0.13 to 0.15": "dd60b2ba891c",
        "0.16": "7d41f210aa18",
        "0.17": "9d71d539e76b",
        "0.18 and 0.19": "4cfb11cdec3a",
    },
    "unpermute": {
        "0.12 to 0.14": "fb5e6eb96e05",
        "0.15": "588dbb7b8f3c",
        "0.16": "df27ca7caf51",
        "0.17 to 0.19": "5215d72b049d",
    },
    "sort_chunks_by_idxs": {"0.12 to 0.15": "622f9bb52d8c", "0.16 to 0.19": "dfd9f2ce521d"},
    "compute_routing_scores_for_aux_loss": {
        "0.14 and 0.15": "87b401a1a3de",
        "0.16": "142c9873ae3e",
        "0.17": "5ba780d2a308",
        "0.18 and 0.19": "d98317c868b8",
    },
    "MoEAlltoAllTokenDispatcher.preprocess": {"0.13 to 0.15": "c91ccdf0f11e", "0.16 to 0.19": "a45fef32f296"},
}


def rows(context: Context) -> list[Row]:
    """Rows of moe_utils and of the dispatcher that counts its rows; none with ops="off"."""
    if not context.serves_operators:
        return []
    has_te = importlib.util.find_spec("transformer_engine") is not None
    table: list[tuple[str, str, Function, str]] = [
        ("topk_routing_with_score_function", "topk_router", topk_routing(context.report, has_te), "the choice"),
        ("switch_load_balancing_loss_func", "router_aux_loss", load_balancing_loss(has_te), "its balancing loss"),
        ("z_loss_func", "router_z_loss", z_loss, "its z-loss"),
        ("permute", "moe_permute", permutation.permute(has_te), "rows by expert"),
        ("unpermute", "moe_unpermute", permutation.unpermute(has_te), "rows by token"),
    ]
    found: list[Row] = [_row(name, new, f"operator {op}: {what}") for name, op, new, what in table]
    if not has_te:
        why = "no operator; without TransformerEngine fused=True is Megatron's own unfused form"
        name = "compute_routing_scores_for_aux_loss"
        found.append(_row(name, unfused(context.report, name, why), why))
        reason = "fused=True without TransformerEngine: one gather, with no wait for the sizes"
        found.append(_row("sort_chunks_by_idxs", permutation.sort_chunks, reason))
        found += _names_of_fused_forms()
    counts = "MoEAlltoAllTokenDispatcher.preprocess"
    reason = "says where every token has K rows, which kernels of moe_permute must know"
    found.append(_row(counts, permutation.dropless_rows, reason, module="token_dispatcher"))
    return found


def _row(name: str, new: Any, reason: str, module: str = "moe_utils") -> Row:
    return seam(f"megatron.core.transformer.moe.{module}:{name}", new, reason, bodies=_BODIES[name])


def _names_of_fused_forms() -> list[Row]:
    """The names that TransformerConfig looks for where it is asked for moe_permute_fusion."""
    functions = [
        permutation.fused_permute,
        permutation.fused_permute_with_probs,
        permutation.fused_sort_chunks_by_index,
        permutation.fused_sort_chunks_by_index_with_probs,
        permutation.fused_unpermute,
    ]
    reason = "moe_permute_fusion asks for it; never bound without TransformerEngine"
    target = "megatron.core.transformer.moe.moe_utils"
    return [seam(f"{target}:{function.__name__}", function, reason, "add") for function in functions]


def unfused(report: Report, name: str, why: str) -> Callable[[Function], Function]:
    """Megatron's own function, which also computes what fused=True asks of a TransformerEngine that is not there."""

    def wrap(original: Function) -> Function:
        report.once(f"megatron {name}", "Megatron's own", why)
        place = list(inspect.signature(original).parameters).index("fused")

        @functools.wraps(original)
        def own(*args: Any, **kwargs: Any) -> Any:
            if len(args) > place:
                args = (*args[:place], False, *args[place + 1 :])
            return original(*args, **(kwargs | {"fused": False} if "fused" in kwargs else kwargs))

        return own

    return wrap


def topk_routing(report: Report, has_te: bool) -> Callable[[Function], Function]:
    """`topk_routing_with_score_function`: the scores [T, E] of the K chosen experts, else 0, and their map."""

    def wrap(original: Function) -> Function:
        from llm_adapt.ops.topk_router import topk_router

        is_rounded_once = fingerprint_object(original) in _ROUNDED_ONCE.values()

        @functools.wraps(original)
        def topk_routing_with_score_function(
            logits: torch.Tensor,
            topk: int,
            use_pre_softmax: bool = False,
            num_groups: int | None = None,
            group_topk: int | None = None,
            scaling_factor: float | None = None,
            score_function: str = "softmax",
            expert_bias: torch.Tensor | None = None,
            fused: bool = False,
            router_replay: Any = None,
            dense_output: bool = False,
            precomputed_indices: torch.Tensor | None = None,
        ) -> Any:
            given = (logits, topk, use_pre_softmax, num_groups, group_topk, scaling_factor, score_function, expert_bias)
            newer = {"router_replay": router_replay, "precomputed_indices": precomputed_indices}
            newer = {name: value for name, value in newer.items() if value is not None}
            lacks = "a choice that is given" if newer else _router_lacks(*given)
            if dense_output:
                newer["dense_output"] = True
            if fused and has_te:
                return original(*given, True, **newer)
            if lacks:
                if not torch.compiler.is_compiling():
                    report.once("megatron topk_routing_with_score_function", "Megatron's own", f"topk_router: {lacks}")
                return original(*given, False, **newer)
            is_softmax = score_function == "softmax"
            after = is_softmax and not use_pre_softmax
            return topk_router(
                logits,
                None if is_softmax else expert_bias,
                topk=topk,
                score_function="softmax_of_chosen" if after else "softmax" if is_softmax else "sigmoid",
                renormalize=not is_softmax and topk > 1,
                scaling_factor=scaling_factor or 1.0,
                num_groups=num_groups if group_topk else None,
                group_topk=group_topk or None,
                rounding="once" if after or is_rounded_once else "scores",
                form="indices" if dense_output else "map",
            )

        return topk_routing_with_score_function

    return wrap


def _router_lacks(
    logits: torch.Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    score_function: str,
    expert_bias: torch.Tensor | None,
) -> str:
    """What the operator does not compute as Megatron does; "" when it does."""
    if score_function not in ("softmax", "sigmoid"):
        return f"no score function {score_function!r}"
    if scaling_factor is not None and scaling_factor < 0:
        return "no negative scaling_factor"
    if logits.dtype == torch.float64:
        return "scores of float64 logits in float64, where Megatron's are in float32"
    is_narrow = logits.dtype != torch.float32
    if group_topk and (is_narrow or topk < group_topk or num_groups is None):
        return "groups are added up in float32, of one score at least"
    if is_narrow and score_function == "sigmoid" and expert_bias is not None and expert_bias.dtype != torch.float32:
        return "expert_bias is added in float32"
    return ""


def load_balancing_loss(has_te: bool) -> Callable[[Function], Function]:
    """`switch_load_balancing_loss_func`; its padding_mask is True for the tokens that count, unlike the operator's."""

    def wrap(original: Function) -> Function:
        from llm_adapt.ops.router_aux_loss import router_aux_loss

        @functools.wraps(original)
        def switch_load_balancing_loss_func(
            probs: torch.Tensor,
            tokens_per_expert: torch.Tensor,
            total_num_tokens: int | torch.Tensor,
            topk: int,
            num_experts: int,
            moe_aux_loss_coeff: float,
            fused: bool = False,
            padding_mask: torch.Tensor | None = None,
        ) -> Any:
            if fused and has_te:
                newer = {} if padding_mask is None else {"padding_mask": padding_mask}
                given = (probs, tokens_per_expert, total_num_tokens, topk, num_experts, moe_aux_loss_coeff)
                return original(*given, True, **newer)
            counted = isinstance(total_num_tokens, torch.Tensor)
            return router_aux_loss(
                probs,
                tokens_per_expert,
                None if padding_mask is None else ~padding_mask,
                num_tokens_tensor=total_num_tokens if counted else None,  # type: ignore[arg-type]
                topk=topk,
                coeff=moe_aux_loss_coeff,
                num_tokens=None if counted else total_num_tokens,  # type: ignore[arg-type]
                num_experts=num_experts,
            )

        return switch_load_balancing_loss_func

    return wrap


def z_loss(original: Function) -> Function:
    """`z_loss_func`; its padding_mask is True for padding."""
    from llm_adapt.ops.router_z_loss import router_z_loss

    @functools.wraps(original)
    def z_loss_func(
        logits: torch.Tensor, z_loss_coeff: float, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return router_z_loss(logits, padding_mask, coeff=z_loss_coeff)

    return z_loss_func
