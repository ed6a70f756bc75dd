"""moe_permute and moe_unpermute: against Megatron-Core, as inverses of one another, and their guards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.moe import moe_utils

from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy
from llm_adapt.ops.moe_permute import moe_permute
from llm_adapt.ops.moe_unpermute import moe_unpermute

TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2.0**-6, "atol": 2.0**-6},
}
shapes = st.tuples(st.integers(1, 13), st.integers(1, 9), st.integers(1, 6))
dtypes = st.sampled_from(list(TOLERANCE))


def draw(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers that are the same at each run."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def routes(tokens: int, experts: int, seed: int = 0, kind: torch.dtype = torch.bool) -> torch.Tensor:
    """A map where tokens have any number of experts, also none."""
    return (draw(tokens, experts, seed=seed) > 0.3).to(kind)


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of the inputs for one fixed gradient of the output."""
    upstream = draw(*output.shape, dtype=output.dtype, seed=9)
    return torch.autograd.grad(output, inputs, upstream, retain_graph=True)


@settings(max_examples=40, deadline=None)
@given(
    shape=shapes, dtype=dtypes, kind=st.sampled_from([torch.bool, torch.int32, torch.float32]), seed=st.integers(0, 9)
)
def test_it_permutes_as_megatron_core(
    shape: tuple[int, int, int], dtype: torch.dtype, kind: torch.dtype, seed: int
) -> None:
    """Tokens, probabilities, indices and gradients are those of permute, also for maps of uneven rows."""
    tokens, hidden, experts = shape
    x, probs = draw(tokens, hidden, dtype=dtype).requires_grad_(), draw(tokens, experts, seed=1).requires_grad_()
    routing_map = routes(tokens, experts, seed, kind)
    found = moe_permute(x, routing_map, int(routing_map.sum()), probs)
    expected = moe_utils.permute(x, routing_map, probs)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(gradients(found[0], x), gradients(expected[0], x), **TOLERANCE[dtype])
    assert torch.equal(gradients(found[1], probs)[0], gradients(expected[1], probs)[0])
    without = moe_permute(x, routing_map, int(routing_map.sum()))
    assert without[1] is None
    assert torch.equal(without[0], expected[0])


@settings(max_examples=30, deadline=None)
@given(shape=shapes, capacity=st.integers(1, 5), dtype=dtypes, seed=st.integers(0, 9))
def test_it_drops_and_pads_as_megatron_core(
    shape: tuple[int, int, int], capacity: int, dtype: torch.dtype, seed: int
) -> None:
    """With drop_and_pad both ways are Megatron-Core's, with gradients."""
    tokens, hidden, experts = shape
    rows = min(capacity, tokens) * experts
    x, probs = draw(tokens, hidden, dtype=dtype).requires_grad_(), draw(tokens, experts, seed=1).requires_grad_()
    routing_map = routes(tokens, experts, seed)
    found = moe_permute(x, routing_map, rows, probs, drop_and_pad=True)
    expected = moe_utils.permute(x, routing_map, probs, rows, drop_and_pad=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(gradients(found[0], x), gradients(expected[0], x), **TOLERANCE[dtype])
    y = draw(rows, hidden, dtype=dtype, seed=2).requires_grad_()
    back = moe_unpermute(y, found[2], tokens, probs, routing_map, drop_and_pad=True)
    wanted = moe_utils.unpermute(y, found[2], x.shape, probs, routing_map, drop_and_pad=True)
    torch.testing.assert_close(back, wanted, **TOLERANCE[dtype])
    torch.testing.assert_close(gradients(back, y, probs), gradients(wanted, y, probs), **TOLERANCE[dtype])


@settings(max_examples=40, deadline=None)
@given(shape=shapes, dtype=dtypes, weighted=st.booleans(), seed=st.integers(0, 9))
def test_it_restores_as_megatron_core(
    shape: tuple[int, int, int], dtype: torch.dtype, weighted: bool, seed: int
) -> None:
    """Sums and gradients are those of unpermute, with probabilities and without."""
    tokens, hidden, experts = shape
    routing_map = routes(tokens, experts, seed)
    rows = routing_map.t().nonzero()[:, 1]
    y = draw(len(rows), hidden, dtype=dtype).requires_grad_()
    probs = draw(tokens, experts, seed=1).requires_grad_()
    given = (probs, routing_map) if weighted else (None, None)
    found = moe_unpermute(y, rows, tokens, *given)
    expected = moe_utils.unpermute(y, rows, torch.Size([tokens, hidden]), *given)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
    inputs = (y, probs) if weighted else (y,)
    torch.testing.assert_close(gradients(found, *inputs), gradients(expected, *inputs), **TOLERANCE[dtype])


@settings(max_examples=30, deadline=None)
@given(shape=shapes, extra=st.integers(0, 4), seed=st.integers(0, 9))
def test_one_undoes_the_other(shape: tuple[int, int, int], extra: int, seed: int) -> None:
    """Unpermuting with weights that sum to 1 gives the tokens back; tokens without an expert are 0."""
    tokens, hidden, experts = shape
    x, routing_map = draw(tokens, hidden), routes(tokens, experts, seed)
    permuted, _, indices = moe_permute(x, routing_map, int(routing_map.sum()) + extra)
    weights = routing_map / routing_map.sum(1, keepdim=True).clamp(min=1)
    back = moe_unpermute(permuted, indices, tokens, weights, routing_map)
    torch.testing.assert_close(back, torch.where(routing_map.any(1, keepdim=True), x, 0))


def test_more_rows_than_pairs_are_empty_and_fewer_cut_the_last() -> None:
    """Rows beyond the pairs are zero with index -1; a smaller number cuts the list at its end."""
    x, routing_map = draw(4, 3), torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])
    probs = draw(4, 2, seed=1)
    permuted, weights, indices = moe_permute(x, routing_map, 6, probs)
    assert indices.tolist() == [0, 2, 1, 2, -1, -1]
    assert weights.tolist() == [*probs[[0, 2], 0].tolist(), *probs[[1, 2], 1].tolist(), 0, 0]
    assert torch.equal(permuted[4:], torch.zeros(2, 3))
    fewer = moe_permute(x, routing_map, 3, probs)
    assert fewer[2].tolist() == [0, 2, 1]
    assert torch.equal(fewer[0], permuted[:3])
    assert torch.equal(fewer[1], weights[:3])


def test_rows_without_a_token_may_hold_anything() -> None:
    """nan in rows of index -1 reaches neither the result nor a gradient."""
    y = torch.full((3, 2), float("nan"))
    y[:2] = 1
    y, probs = y.requires_grad_(), torch.ones(2, 1, requires_grad=True)
    routing_map, rows = torch.ones(2, 1, dtype=torch.bool), torch.tensor([0, 1, -1])
    found = moe_unpermute(y, rows, 2, probs, routing_map)
    assert torch.equal(found, torch.ones(2, 2))
    dy, dprobs = torch.autograd.grad(found.sum(), (y, probs))
    assert dy.tolist() == [[1, 1], [1, 1], [0, 0]]
    assert dprobs.tolist() == [[2], [2]]


@pytest.mark.parametrize("library", ["reference", "torch_native"])
def test_no_tokens_stay_in_the_graph(library: str) -> None:
    """Of no tokens the gradients of tokens, rows and probs are empty, not missing, also with rows of padding."""
    x, probs = torch.empty(0, 4, requires_grad=True), torch.empty(0, 3, requires_grad=True)
    routing_map = torch.zeros(0, 3, dtype=torch.bool)
    with using(Policy(choose={"moe_permute": library})):
        for count in (0, 2):
            permuted, permuted_probs, rows = moe_permute(x, routing_map, count, probs)
            assert (permuted.shape, permuted_probs.shape, rows.tolist()) == ((count, 4), (count,), [-1] * count)
            assert [grad.shape for grad in gradients(permuted, x)] == [(0, 4)]
            assert [grad.shape for grad in gradients(permuted_probs, probs)] == [(0, 3)]
    y = moe_unpermute(torch.ones(2, 4, requires_grad=True), torch.tensor([-1, -1]), 0, probs, routing_map)
    assert y.shape == (0, 4)
    assert gradients(y, probs)[0].shape == (0, 3)


def test_tensors_of_any_strides() -> None:
    """Transposed tokens, maps and probabilities give what their copies give."""
    x, routing_map, probs = draw(3, 5).t(), routes(4, 5).t(), draw(4, 5, seed=1).t()
    count = int(routing_map.sum())
    found = moe_permute(x, routing_map, count, probs)
    expected = moe_permute(x.contiguous(), routing_map.contiguous(), count, probs.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(
        moe_unpermute(found[0], found[2], 5, probs, routing_map),
        moe_unpermute(found[0], found[2], 5, probs.contiguous(), routing_map.contiguous()),
    )


def test_the_word_for_even_tokens_changes_nothing() -> None:
    """topk, where it is true, gives the same rows and sums as without."""
    x, routing_map = draw(4, 3), torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]])
    found, expected = moe_permute(x, routing_map, 8, topk=2), moe_permute(x, routing_map, 8)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])
    assert torch.equal(moe_unpermute(*found[::2], 4, topk=2), moe_unpermute(*found[::2], 4))


def test_flags_change_the_result() -> None:
    """drop_and_pad and probs are never without effect."""
    x, routing_map, probs = draw(4, 3), routes(4, 2), draw(4, 2, seed=1)
    plain, padded = (moe_permute(x, routing_map, 6, probs, drop_and_pad=flag) for flag in (False, True))
    assert not torch.equal(plain[2], padded[2])
    y, rows = draw(6, 3), torch.tensor([0, 1, 2, 3, 0, 1])
    results = [
        moe_unpermute(y, rows, 4),
        moe_unpermute(y, rows, 4, probs, routing_map),
        moe_unpermute(y, rows, 4, probs, routing_map, drop_and_pad=True),
    ]
    assert not any(torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 3, 4)}, "Flatten"),
        ({"routing_map": torch.zeros(4, 2)}, "routing_map"),
        ({"probs": torch.zeros(3, 3)}, "probs"),
        ({"num_out_tokens": -1}, "num_out_tokens=-1"),
        ({"num_out_tokens": 5, "drop_and_pad": True}, "multiple"),
        ({"num_out_tokens": 8, "drop_and_pad": True}, "at most 3"),
        ({"topk": 1}, "topk=1"),
        ({"topk": 2, "drop_and_pad": True, "num_out_tokens": 6}, "topk=2"),
    ],
    ids=str,
)
def test_permute_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    """A wrong shape or number is an error that names it."""
    with pytest.raises(ValueError, match=message):
        moe_permute(**({"tokens": torch.zeros(3, 4), "routing_map": torch.zeros(3, 2), "num_out_tokens": 4} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"permuted": torch.zeros(5)}, "permuted"),
        ({"sorted_indices": torch.zeros(4).long()}, "sorted_indices"),
        ({"num_tokens": -1}, "num_tokens=-1"),
        ({"routing_map": None}, "give both or neither"),
        ({"probs": None}, "give both or neither"),
        ({"probs": None, "routing_map": None, "drop_and_pad": True}, "without probs"),
        ({"probs": torch.zeros(3, 3)}, "T=3"),
        ({"num_tokens": 4}, "T=4"),
        ({"drop_and_pad": True}, "same number"),
        ({"topk": 2}, "topk=2"),
    ],
    ids=str,
)
def test_unpermute_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    """A wrong shape, number or half a pair of arguments is an error that names it."""
    arguments = {
        "permuted": torch.zeros(5, 4),
        "sorted_indices": torch.zeros(5).long(),
        "num_tokens": 3,
        "probs": torch.zeros(3, 2),
        "routing_map": torch.ones(3, 2),
    }
    with pytest.raises(ValueError, match=message):
        moe_unpermute(**(arguments | change))
