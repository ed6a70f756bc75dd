"""router_aux_loss and router_z_loss: against Megatron-Core and transformers, and their guards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.moe import moe_utils
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from llm_adapt.ops.router_aux_loss import router_aux_loss
from llm_adapt.ops.router_z_loss import router_z_loss
from llm_adapt.ops.topk_router import topk_router


def draw(*sizes: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers that are the same at each run."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def same_with_gradient(found: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> None:
    """Both losses and their gradients agree."""
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, theirs)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 40), experts=st.integers(2, 9), topk=st.integers(1, 2), padded=st.booleans())
def test_the_aux_loss_is_megatron_cores(tokens: int, experts: int, topk: int, padded: bool) -> None:
    """Loss and gradient are those of switch_load_balancing_loss_func; there, True marks what is not padding."""
    logits = draw(tokens, experts).requires_grad_()
    probs, routing_map = logits.softmax(-1), topk_router(logits, topk=topk)[1]
    padding = (draw(tokens, seed=1) > 0.5) & (torch.arange(tokens) > 0) if padded else None
    count = tokens if padding is None else int((~padding).sum())
    loads = (routing_map if padding is None else routing_map & ~padding[:, None]).sum(0)
    expected = moe_utils.switch_load_balancing_loss_func(
        probs, loads, count, topk, experts, 0.02, padding_mask=None if padding is None else ~padding
    )
    same_with_gradient(router_aux_loss(probs, loads, padding, topk=topk, coeff=0.02), expected, logits)


def test_counts_of_a_global_batch_and_of_sequences_side_by_side() -> None:
    """num_tokens, as a number or a tensor, and num_experts are Megatron-Core's total_num_tokens and num_experts."""
    probs = draw(6, 8).softmax(-1).requires_grad_()
    loads = torch.arange(8)
    expected = moe_utils.switch_load_balancing_loss_func(probs, loads, 28, 2, 4, 0.5)
    found = router_aux_loss(probs, loads, coeff=0.5, num_tokens=28, num_experts=4)
    same_with_gradient(found, expected, probs)
    found = router_aux_loss(probs, loads, num_tokens_tensor=torch.tensor(28), coeff=0.5, num_experts=4)
    same_with_gradient(found, expected, probs)


@pytest.mark.parametrize("padded", [False, True])
def test_the_aux_loss_is_that_of_transformers(padded: bool) -> None:
    """With topk=1 in the divisor it is load_balancing_loss_func, which does not divide by the experts per token."""
    logits = draw(30, 8).requires_grad_()
    padding = torch.arange(30) % 7 == 3 if padded else None
    expected = load_balancing_loss_func((logits,), 8, 2, None if padding is None else (~padding).view(5, 6))
    routing_map = topk_router(logits)[1]
    loads = (routing_map if padding is None else routing_map & ~padding[:, None]).sum(0)
    same_with_gradient(router_aux_loss(logits.softmax(-1), loads, padding, topk=1), expected, logits)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 40), experts=st.integers(1, 9), padded=st.booleans())
def test_the_z_loss_is_megatron_cores(tokens: int, experts: int, padded: bool) -> None:
    """Loss and gradient are those of z_loss_func, with and without padding."""
    logits = draw(tokens, experts).requires_grad_()
    padding = draw(tokens, seed=1) > 0.5 if padded else None
    expected = moe_utils.z_loss_func(logits, 1e-3, padding)
    same_with_gradient(router_z_loss(logits, padding, 1e-3), expected, logits)


def test_no_token_costs_nothing() -> None:
    """Both losses are 0, and not nan, where there is no token or only padding."""
    nothing = torch.ones(3, dtype=torch.bool)
    assert router_z_loss(torch.zeros(0, 4)) == 0
    assert router_z_loss(torch.zeros(3, 4), nothing) == 0
    assert router_aux_loss(torch.zeros(0, 4), torch.zeros(4)) == 0
    assert router_aux_loss(torch.ones(3, 4), torch.zeros(4), nothing) == 0


def test_every_option_of_the_losses_changes_them() -> None:
    """No option is without effect."""
    probs, loads, padding = draw(6, 8).softmax(-1), torch.arange(8), torch.arange(6) < 2
    base = router_aux_loss(probs, loads)
    changes: list[dict[str, Any]] = [
        {"topk": 1},
        {"coeff": 2.0},
        {"num_tokens": 7},
        {"num_experts": 4},
        {"padding_mask": padding},
        {"num_tokens_tensor": torch.tensor(9)},
    ]
    assert [change for change in changes if router_aux_loss(probs, loads, **change) == base] == []
    assert router_z_loss(probs, coeff=2.0) != router_z_loss(probs) != router_z_loss(probs, padding)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probs": torch.zeros(8)}, "probs"),
        ({"tokens_per_expert": torch.zeros(4)}, "tokens_per_expert"),
        ({"padding_mask": torch.zeros(3)}, "padding_mask must be bool"),
        ({"padding_mask": torch.zeros(4, dtype=torch.bool)}, "padding_mask"),
        ({"num_tokens": 3, "num_tokens_tensor": torch.tensor(3)}, "both given"),
    ],
    ids=str,
)
def test_the_aux_loss_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    """A wrong shape, dtype or a count given twice is an error that names it."""
    with pytest.raises(ValueError, match=message):
        router_aux_loss(**({"probs": torch.zeros(3, 8), "tokens_per_expert": torch.zeros(8)} | change))


@pytest.mark.parametrize(
    ("logits", "padding", "message"),
    [
        (torch.zeros(3), None, "logits"),
        (torch.zeros(3, 0), None, "logits"),
        (torch.zeros(3, 4), torch.zeros(3), "must be bool"),
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.bool), "padding_mask"),
    ],
)
def test_the_z_loss_refuses_what_does_not_fit(logits: torch.Tensor, padding: Any, message: str) -> None:
    """A wrong shape or dtype is an error that names it."""
    with pytest.raises(ValueError, match=message):
        router_z_loss(logits, padding)
