"""topk_router: against Megatron-Core and the routers of transformers, its choice, its guards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.moe import moe_utils
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from llm_adapt.ops.topk_router import topk_router

GROUPS = {"num_groups": 4, "group_topk": 2}


def distinct(tokens: int, experts: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits that differ within every row, also in 16 bits."""
    generator = torch.Generator().manual_seed(seed)
    if dtype != torch.bfloat16:
        return torch.randn(tokens, experts, generator=generator, dtype=dtype)
    steps = torch.stack([torch.randperm(experts, generator=generator) for _ in range(tokens)])
    return (steps.double() / 4 - 1).to(dtype)


def gradient(output: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The gradient of the logits for one fixed gradient of the output."""
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return torch.autograd.grad(output, logits, upstream, retain_graph=True)[0]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 17),
    topk=st.sampled_from([2, 4]),
    score=st.sampled_from(["softmax", "softmax_of_chosen", "sigmoid"]),
    groups=st.booleans(),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_it_routes_as_megatron_core(
    tokens: int, topk: int, score: str, groups: bool, bias: bool, scale: float, dtype: torch.dtype, seed: int
) -> None:
    """Probabilities, map and gradients are those of topk_routing_with_score_function, in every form of it."""
    logits = distinct(tokens, 16, seed, dtype).requires_grad_()
    is_sigmoid = score == "sigmoid"
    expert_bias = torch.arange(16) * 1e-3 if bias and is_sigmoid else None
    probs, routing_map = topk_router(
        logits,
        expert_bias,
        topk,
        score,
        renormalize=is_sigmoid,
        scaling_factor=scale,
        rounding="once" if score == "softmax_of_chosen" else "scores",
        **(GROUPS if groups else {}),
    )
    expected, expected_map = moe_utils.topk_routing_with_score_function(
        logits,
        topk,
        use_pre_softmax=score == "softmax",
        scaling_factor=scale,
        score_function="sigmoid" if is_sigmoid else "softmax",
        expert_bias=expert_bias,
        **(GROUPS if groups else {}),
    )
    tolerance = {"rtol": 2.0**-6, "atol": 2.0**-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    if dtype == torch.bfloat16:
        # Scores of 16 bits, and sums of them, may be equal; torch.topk promises no order then.
        alike = (routing_map == expected_map).all(1)
    else:
        assert torch.equal(routing_map, expected_map)
        alike = torch.ones(tokens, dtype=torch.bool)
    rows = torch.where(alike[:, None], 1, 0).to(dtype)
    probs, expected = probs * rows, expected * rows
    torch.testing.assert_close(probs, expected, **tolerance)
    torch.testing.assert_close(gradient(probs, logits), gradient(expected, logits), **tolerance)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("factor", [0.3, 0.5, 1.0, 4.0])
def test_capacity_is_megatron_cores(factor: float, policy: str, pad: bool) -> None:
    """Each expert keeps as many tokens as in apply_router_token_dropping, and by "probs" the very same ones."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 8, generator=generator, requires_grad=True)
    probs, kept = topk_router(
        logits, topk=2, capacity_factor=factor, drop_policy=policy, pad_to_capacity=pad, scaling_factor=2.0
    )
    full, routing_map = topk_router(logits, topk=2, scaling_factor=2.0)
    expected, expected_map = moe_utils.apply_router_token_dropping(full, routing_map, 2, factor, policy, pad)
    assert torch.equal(kept.sum(0), expected_map.sum(0))
    assert torch.equal(probs, torch.where(kept, full, 0))
    if policy == "probs":
        # Which tokens pad is left open by torch.topk; here they are the first.
        assert torch.equal(kept & routing_map, expected_map & routing_map)
        torch.testing.assert_close(probs, expected)
        torch.testing.assert_close(gradient(probs, logits), gradient(expected, logits))


def test_by_position_the_first_tokens_are_kept_and_the_first_others_pad() -> None:
    """drop_policy="position" keeps the lowest token numbers; pad_to_capacity adds the lowest of the others."""
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    options = {"topk": 1, "capacity_factor": 1.0, "drop_policy": "position"}
    _, kept = topk_router(logits, **options)
    assert kept.t().tolist() == [[False, True, True, False], [True, False, False, False]]
    probs, padded = topk_router(logits, **options, pad_to_capacity=True)
    assert padded.t().tolist() == [[False, True, True, False], [True, True, False, False]]
    assert probs[1, 1] == 0


def _module(kind: type, config: Any, seed: int = 0) -> torch.nn.Module:
    module = kind(config)
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    return module


ROUTERS = {
    "mixtral": (MixtralTopKRouter, MixtralConfig(hidden_size=12, num_local_experts=8), {"renormalize": True}),
    "qwen3_moe": (
        Qwen3MoeTopKRouter,
        Qwen3MoeConfig(hidden_size=12, num_experts=16, num_experts_per_tok=4, norm_topk_prob=False),
        {"topk": 4},
    ),
    "qwen3_moe normalised": (
        Qwen3MoeTopKRouter,
        Qwen3MoeConfig(hidden_size=12, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True),
        {"topk": 4, "renormalize": True},
    ),
    "gpt_oss": (
        GptOssTopKRouter,
        GptOssConfig(hidden_size=12, num_local_experts=8, num_experts_per_tok=4),
        {"topk": 4, "score_function": "softmax_of_chosen"},
    ),
    "deepseek_v2": (
        DeepseekV2TopkRouter,
        DeepseekV2Config(
            hidden_size=12,
            num_attention_heads=4,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            topk_method="group_limited_greedy",
            routed_scaling_factor=3.0,
        ),
        {"topk": 4, "num_groups": 4, "group_topk": 2, "scores_per_group": 1, "scaling_factor": 3.0},
    ),
    "deepseek_v3": (
        DeepseekV3TopkRouter,
        DeepseekV3Config(
            hidden_size=12,
            num_attention_heads=4,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=3,
            routed_scaling_factor=2.5,
        ),
        {
            "topk": 4,
            "score_function": "sigmoid",
            "renormalize": True,
            "num_groups": 4,
            "group_topk": 3,
            "scores_per_group": 2,
            "scaling_factor": 2.5,
        },
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_it_routes_as_the_models_of_transformers(name: str) -> None:
    """Experts, weights and gradients are those of the model's own router, given the logits that it computes."""
    kind, config, options = ROUTERS[name]
    router = _module(kind, config)
    hidden = torch.randn(37, 12, generator=torch.Generator().manual_seed(5))
    logits, weights, experts = router(hidden)
    bias = getattr(router, "e_score_correction_bias", None)
    found, chosen = topk_router(logits, bias, form="indices", **options)
    order, expected_order = chosen.argsort(1), experts.argsort(1)
    assert torch.equal(chosen.gather(1, order), experts.gather(1, expected_order))
    found, expected = found.gather(1, order), weights.gather(1, expected_order)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, logits), gradient(expected, logits))


def test_equal_scores_choose_the_lower_expert() -> None:
    """Of equal scores the lower expert wins, within groups and without."""
    logits = torch.tensor([[1.0, 3, 3, 2, 3, 3]])
    assert topk_router(logits, form="indices")[1].tolist() == [[1, 2]]
    assert topk_router(logits, form="indices", topk=3)[1].tolist() == [[1, 2, 4]]
    grouped = topk_router(torch.zeros(1, 6), form="indices", num_groups=3, group_topk=1, scores_per_group=1)
    assert grouped[1].tolist() == [[0, 1]]


def test_the_bias_takes_part_in_the_choice_alone() -> None:
    """A bias moves the choice; the probabilities of what is chosen are without it, and it gets no gradient."""
    logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 5.0], requires_grad=True)
    probs, experts = topk_router(logits, bias, topk=1, form="indices")
    assert experts.item() == 2
    assert probs.item() == pytest.approx(logits.softmax(-1)[0, 2].item())
    assert torch.autograd.grad(probs.sum(), bias, allow_unused=True) == (None,)


def test_the_two_forms_say_the_same() -> None:
    """Scattering the indices of one form gives the map of the other."""
    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    probs, experts = topk_router(logits, topk=3, form="indices")
    dense, routing_map = topk_router(logits, topk=3)
    assert torch.equal(torch.zeros(9, 7).scatter(1, experts, probs), dense)
    assert torch.equal(torch.zeros(9, 7).scatter(1, experts, 1.0).bool(), routing_map)
    assert torch.equal(probs, probs.sort(1, descending=True).values)


@pytest.mark.parametrize(
    "change",
    [
        {"topk": 4},
        {"score_function": "sigmoid"},
        {"score_function": "softmax_of_chosen"},
        {"renormalize": True},
        {"scaling_factor": 2.0},
        {"num_groups": 4, "group_topk": 1, "scores_per_group": 2},
        {"num_groups": 4, "group_topk": 1, "scores_per_group": 1},
        {"capacity_factor": 0.5},
        {"capacity_factor": 0.5, "drop_policy": "position"},
        {"capacity_factor": 1.0, "pad_to_capacity": True},
        {"rounding": "scores"},
        {"probs_dtype": torch.float32},
        {"expert_bias": torch.arange(16.0)},
    ],
    ids=str,
)
def test_every_option_changes_the_result(change: dict[str, Any]) -> None:
    """No option is without effect."""
    logits = torch.randn(64, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    logits = logits + torch.linspace(0, 1, 16).bfloat16()
    before = {"capacity_factor": 1.0} if "pad_to_capacity" in change else {}
    before |= {"capacity_factor": 0.5} if "drop_policy" in change else {}
    # Scores that are rounded early differ from those rounded once only in what is computed from them.
    before |= {"renormalize": True, "score_function": "sigmoid"} if "rounding" in change else {}
    found, expected = topk_router(logits, **(before | change)), topk_router(logits, **before)
    assert any(a.dtype != b.dtype or not torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("score", ["softmax", "softmax_of_chosen", "sigmoid"])
def test_gradients_are_derivatives(score: str) -> None:
    """gradcheck in float64, away from the steps of the choice."""
    logits = distinct(5, 8, 0, torch.float64).requires_grad_()
    options = {"topk": 3, "score_function": score, "renormalize": score != "softmax_of_chosen"}
    assert torch.autograd.gradcheck(lambda x: topk_router(x, **options)[0], (logits,))


def test_rows_any_strides() -> None:
    """Logits that are not contiguous, or none at all, are routed."""
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).t()
    expected = topk_router(logits.contiguous(), num_groups=4, group_topk=2)
    for found, wanted in zip(topk_router(logits, num_groups=4, group_topk=2), expected, strict=True):
        assert torch.equal(found, wanted)
    probs, routing_map = topk_router(torch.zeros(0, 4), capacity_factor=1.0)
    assert probs.shape == routing_map.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 8)}, "logits"),
        ({"topk": 0}, "topk=0"),
        ({"topk": 9}, "topk=9"),
        ({"expert_bias": torch.zeros(7)}, "expert_bias"),
        ({"score_function": "tanh"}, "tanh"),
        ({"score_function": "softmax_of_chosen", "renormalize": True}, "sums to 1"),
        ({"score_function": "softmax_of_chosen", "rounding": "scores"}, "after the choice"),
        ({"rounding": "often"}, "often"),
        ({"form": "list"}, "list"),
        ({"scaling_factor": 0.0}, "positive"),
        ({"capacity_factor": 0.0}, "positive"),
        ({"capacity_factor": 1.0, "form": "indices"}, "form='map'"),
        ({"pad_to_capacity": True}, "without a capacity_factor"),
        ({"drop_policy": "position"}, "without a capacity_factor"),
        ({"capacity_factor": 1.0, "drop_policy": "last"}, "last"),
        ({"num_groups": 4}, "together"),
        ({"scores_per_group": 1}, "together"),
        ({"num_groups": 3, "group_topk": 1}, "one size"),
        ({"num_groups": 4, "group_topk": 5}, "one size"),
        ({"num_groups": 8, "group_topk": 1}, "fewer than topk"),
        ({"num_groups": 4, "group_topk": 4}, "scores_per_group"),
        ({"num_groups": 4, "group_topk": 2, "scores_per_group": 3}, "scores_per_group"),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(change: dict[str, Any], message: str) -> None:
    """Each argument that cannot be honoured is an error that names it."""
    with pytest.raises(ValueError, match=message):
        topk_router(**({"logits": torch.zeros(3, 8)} | change))
