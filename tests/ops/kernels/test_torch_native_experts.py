"""Kernels of torch for mixtures of experts, beside the references that they must equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapt.ops.dispatch.choice import refusal
from llm_adapt.ops.dispatch.dispatcher import dispatchers
from llm_adapt.ops.dispatch.registry import all_ops
from llm_adapt.ops.kernels.torch_native import experts

TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2.0**-7, "atol": 2.0**-7},
}
ON_THE_CPU = (
    "dropout_add",
    "fused_linear_cross_entropy",
    "moe_permute",
    "moe_unpermute",
    "quantize_int8",
    "topk_router",
)
dtypes = st.sampled_from(list(TOLERANCE))


def reference(name: str) -> Callable[..., Any]:
    """The specification of an op."""
    return all_ops()[name].reference


def draw(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers that are the same at each run."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of the inputs for one fixed gradient of the output."""
    return torch.autograd.grad(output, inputs, draw(*output.shape, dtype=output.dtype, seed=9), retain_graph=True)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 13), st.integers(1, 9), st.integers(1, 6)),
    extra=st.integers(-3, 3),
    kind=st.sampled_from([torch.bool, torch.int32]),
    dtype=dtypes,
    seed=st.integers(0, 99),
)
def test_rows_by_expert(
    shape: tuple[int, int, int], extra: int, kind: torch.dtype, dtype: torch.dtype, seed: int
) -> None:
    """Rows, probs, indices and gradients are the reference's, with rows that are cut, missing and beyond the pairs."""
    tokens, hidden, number = shape
    x, probs = draw(tokens, hidden, dtype=dtype).requires_grad_(), draw(tokens, number, seed=1).requires_grad_()
    routing_map = (draw(tokens, number, seed=seed) > 0.3).to(kind)
    count = max(0, int(routing_map.sum()) + extra)
    found = experts.moe_permute(x, routing_map, count, probs)
    expected = reference("moe_permute")(x, routing_map, count, probs)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(gradients(found[0], x), gradients(expected[0], x), **TOLERANCE[dtype])
    assert torch.equal(gradients(found[1], probs)[0], gradients(expected[1], probs)[0])
    assert experts.moe_permute(x, routing_map, count)[1] is None


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 13), st.integers(1, 9), st.integers(1, 6)),
    extra=st.integers(0, 3),
    weighted=st.booleans(),
    block=st.sampled_from([1, 20, 2**18]),
    dtype=dtypes,
    seed=st.integers(0, 99),
)
def test_rows_by_token(
    shape: tuple[int, int, int], extra: int, weighted: bool, block: int, dtype: torch.dtype, seed: int
) -> None:
    """Sums and gradients are the reference's for blocks of any size; what stands in rows of no token is not read."""
    tokens, hidden, number = shape
    routing_map = draw(tokens, number, seed=seed) > 0.3
    routing_map[0, 0] = True
    rows = torch.cat([routing_map.t().nonzero()[:, 1], torch.full((extra,), -1)])
    permuted = draw(len(rows), hidden, dtype=dtype)
    permuted[len(rows) - extra :] = float("nan")
    permuted.requires_grad_()
    probs = draw(tokens, number, seed=1).requires_grad_()
    weights = {"probs": probs, "routing_map": routing_map} if weighted else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "_BLOCK", block)
        found = experts.moe_unpermute(permuted, rows, tokens, **weights)
        inputs = (permuted, probs) if weighted else (permuted,)
        of_found = gradients(found, *inputs)
    expected = reference("moe_unpermute")(permuted, rows, tokens, **weights)
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
    torch.testing.assert_close(of_found, gradients(expected, *inputs), **TOLERANCE[dtype])


SCORES = [-2.0, -0.0, 0.0, -0.0, 0.0, 1.5, 1e-40, -1e-40]


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(0, 5),
    topk=st.sampled_from([1, 2, 4, 11]),
    score=st.sampled_from(["softmax", "softmax_of_chosen", "sigmoid"]),
    groups=st.booleans(),
    bias=st.booleans(),
    form=st.sampled_from(["map", "indices"]),
    seed=st.integers(0, 999),
)
def test_of_equal_scores_the_lower_expert_is_chosen(
    tokens: int, topk: int, score: str, groups: bool, bias: bool, form: str, seed: int
) -> None:
    """The choice is the reference's where most scores are equal, of either sign, for few experts and for many."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.tensor(SCORES)[torch.randint(len(SCORES), (tokens, 32), generator=generator)].requires_grad_()
    options: dict[str, Any] = {"topk": topk, "score_function": score, "form": form}
    if bias:
        options["expert_bias"] = torch.tensor([-0.5, 0.0, 0.25, -0.5]).repeat(8)
    if groups:
        options |= {"num_groups": 4, "group_topk": 2, "scores_per_group": 2}
    found, expected = experts.topk_router(logits, **options), reference("topk_router")(logits, **options)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])
    if tokens:
        torch.testing.assert_close(gradients(found[0], logits), gradients(expected[0], logits))


@pytest.mark.parametrize("topk", [3, 10])
@pytest.mark.parametrize("score", ["softmax_of_chosen", "sigmoid"])
def test_nan_and_infinity_are_chosen_as_in_a_sort(score: str, topk: int) -> None:
    """nan of either sign counts as the largest, then infinity; -inf comes last, also where it must be chosen."""
    logits = torch.zeros(4, 12)
    logits[0, 5], logits[1, 7] = float("nan"), -torch.tensor(float("nan"))
    logits[2, 9], logits[2, 2] = float("inf"), float("-inf")
    logits[3, 1:] = float("-inf")
    found = experts.topk_router(logits, topk=topk, score_function=score, form="indices")[1]
    expected = reference("topk_router")(logits, topk=topk, score_function=score, form="indices")[1]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", sorted(set(ON_THE_CPU) - {"dropout_add", "fused_linear_cross_entropy"}))
def test_what_reads_on_the_host_serves_the_cpu_alone(name: str) -> None:
    """Kernels that wait for a number, or were measured on the CPU only, refuse the tensors of another device."""
    op = all_ops()[name]
    kernel = op.kernels["torch_native"]
    reasons = []
    for sample in op.inputs(torch.Generator().manual_seed(0), torch.float32):
        call = dispatchers[name].describe(op.bind(**sample))
        there = {key: tensor._replace(device="cuda") for key, tensor in call.tensors.items()}
        reasons.append((refusal(op, kernel, call), refusal(op, kernel, replace(call, tensors=there))))
    assert all(elsewhere for _, elsewhere in reasons)
    assert any(not here for here, _ in reasons)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_rows_of_an_expert_may_come_in_any_order(with_gradients: bool) -> None:
    """A row's weight is that of its token and its expert, in whatever order an expert has its tokens."""
    routing_map = torch.ones(4, 2, dtype=torch.bool)
    order = torch.tensor([2, 0, 3, 1, 1, 3, 0, 2])
    permuted, probs = torch.randn(8, 5), torch.rand(4, 2)
    given = {"num_tokens": 4, "probs": probs, "routing_map": routing_map}
    with torch.set_grad_enabled(with_gradients):
        found = experts.moe_unpermute(permuted, order, **given)  # type: ignore[arg-type]
        with torch.device("meta"):  # a default of the script, which is not ours
            again = experts.moe_unpermute(permuted, order, **given)  # type: ignore[arg-type]
    assert torch.equal(again, found)
    expected = torch.zeros(4, 5)
    for row, token in enumerate(order.tolist()):
        expected[token] += probs[token, row // 4] * permuted[row]
    torch.testing.assert_close(found, expected)
