"""Attention by all its scores, which serves short float32 sequences with gradients on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapt.ops.attention_parts.scores import attention_by_scores, is_for_scores


def draw(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random numbers with heads as a view of [B, S, H, D], as frameworks have them."""
    drawn = torch.randn(sizes[0], sizes[2], sizes[1], sizes[3], generator=torch.Generator().manual_seed(seed))
    return drawn.to(dtype).transpose(1, 2).requires_grad_()


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    each=st.integers(1, 3),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    sizes=st.sampled_from([(4, 4), (6, 3)]),
    masked=st.sampled_from(["none", "causal", "boolean", "added", "added, one for all"]),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 99),
)
def test_results_and_gradients_are_those_of_float64(
    batch: int, groups: int, each: int, rows: int, columns: int, sizes: tuple[int, int], masked: str,
    scale: float | None, seed: int,
) -> None:  # fmt: skip
    """Against torch's function in float64, with grouped heads, another size of values, and every kind of mask."""
    heads = groups * each
    parts = [draw(batch, heads, rows, sizes[0], seed=seed), draw(batch, groups, columns, sizes[0], seed=seed + 1)]
    parts.append(draw(batch, groups, columns, sizes[1], seed=seed + 2))
    mask: torch.Tensor | None = None
    if masked == "boolean":
        mask = torch.rand(batch, 1, rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.6
        mask[..., 0] = True
    elif masked.startswith("added"):
        first = 1 if masked == "added, one for all" else batch
        mask = draw(first, heads if first == batch else 1, rows, columns, seed=seed + 3).detach()
    is_causal = masked == "causal"
    found = attention_by_scores(*parts, mask, is_causal, scale)
    wide = [part.detach().double().requires_grad_() for part in parts]
    mask64 = mask.double() if mask is not None and mask.is_floating_point() else mask
    expected = torch.nn.functional.scaled_dot_product_attention(
        *wide, attn_mask=mask64, is_causal=is_causal, scale=scale, enable_gqa=True
    )
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed + 4))
    ours = torch.autograd.grad(found, parts, upstream)
    theirs = torch.autograd.grad(expected, wide, upstream.double())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_a_mask_gets_its_gradient() -> None:
    """A bias that is trained is added where autograd sees it."""
    q, k, v = (draw(1, 2, 5, 4, seed=seed) for seed in range(3))
    mask = torch.zeros(1, 2, 5, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention_by_scores(q, k, v, mask, False, None).sum(), mask)
    wide = mask.detach().double().requires_grad_()
    out = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=wide)
    (expected,) = torch.autograd.grad(out.sum(), wide)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "serves"),
    [
        ({}, True),
        ({"length": 513}, False),
        ({"dtype": torch.bfloat16}, False),
        ({"dtype": torch.float64}, False),
        ({"length": 0}, False),
        ({"grad": False}, False),
    ],
    ids=str,
)
def test_which_calls_it_serves(change: dict[str, Any], serves: bool) -> None:
    """float32 with gradients, up to 512 of 512; 16 bits would round scores, and without gradients nothing is gained."""
    given_ = {"length": 512, "dtype": torch.float32, "grad": True} | change
    q = draw(1, 1, given_["length"], 4, dtype=given_["dtype"])
    with torch.set_grad_enabled(given_["grad"]):
        assert is_for_scores(q, q, q) is serves


def test_values_of_another_size_are_served_without_gradients_too() -> None:
    """torch's fused kernel takes one head size, so it would compute all scores itself, and more slowly."""
    q, v = draw(1, 1, 8, 6), draw(1, 1, 8, 4)
    with torch.no_grad():
        assert is_for_scores(q, q, v)
        assert not is_for_scores(v, v, v)


def test_the_defaults_of_a_script_change_nothing() -> None:
    """torch's default dtype and device are those of tensors that a script makes, not of ours."""
    q, k, v = (draw(1, 2, 6, 4, seed=seed) for seed in range(3))
    expected = attention_by_scores(q, k, v, None, True, None)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = attention_by_scores(q, k, v, None, True, None)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
