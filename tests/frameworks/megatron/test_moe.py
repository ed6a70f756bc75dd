"""Megatron's mixture of experts by the operators: a model with and without them, each function beside the original."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.moe import moe_utils

from llm_adapt.adapters.cpu import ADAPTER
from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron import moe, permutation
from llm_adapt.patching import Patch
from llm_adapt.report import Report
from llm_adapt.settings import Settings
from tests.frameworks.megatron import moe_checks, seam_table
from tests.parallel.on_ranks import CHECKS, outcomes

NAMES = [name for name, function in CHECKS.items() if function.__module__ == moe_checks.__name__]
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2.0**-6, "atol": 2.0**-6}}
NARROW = torch.zeros(2, 8, dtype=torch.bfloat16)
dtypes = st.sampled_from(list(TOLERANCE))
permute = permutation.permute(False)(moe_utils.permute)
unpermute = permutation.unpermute(False)(moe_utils.unpermute)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Outcome of every check of a model."""
    return outcomes(Path(moe_checks.__file__), 1, tmp_path_factory.mktemp("moe"), ["--ops", "off"])


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_and_without_the_operators(found: dict[str, str], name: str) -> None:
    """Each check of moe_checks.py holds; its docstring says what it is."""
    assert found[name] == "", found[name]


def draw(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers that are the same at each run."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of the inputs for one fixed gradient of the output."""
    upstream = draw(*output.shape, dtype=output.dtype, seed=9)
    return torch.autograd.grad(output, inputs, upstream, retain_graph=True)


def context(ops: str | None = None, adapter: Any = ADAPTER) -> Context:
    """What rows are planned by."""
    return Context(adapter, Settings(ops=ops), Report())


def named(rows: list[Any]) -> dict[str, Patch]:
    """The rows by the last name of their target."""
    return {row.target.rpartition(":")[2]: row for row in rows}


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 13), st.integers(1, 9), st.integers(1, 6)),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    kind=st.sampled_from([torch.bool, torch.int32]),
    told=st.sampled_from(["not", "number", "tensor"]),
    dtype=dtypes,
    seed=st.integers(0, 99),
)
def test_rows_by_expert_and_back(
    shape: tuple[int, int, int], density: float, kind: torch.dtype, told: str, dtype: torch.dtype, seed: int
) -> None:
    """Both ways give Megatron's rows, probs, indices, sums and gradients, also of experts and tokens without a row."""
    tokens, hidden, experts = shape
    x, probs = draw(tokens, hidden, dtype=dtype).requires_grad_(), draw(tokens, experts, seed=1).requires_grad_()
    routing_map = (torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < density).to(kind)
    count = {"not": None, "number": int(routing_map.bool().sum()), "tensor": routing_map.bool().sum()}[told]
    found = permute(x, routing_map, probs, num_out_tokens=count, fused=True)
    expected = moe_utils.permute(x, routing_map, probs, num_out_tokens=count)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(gradients(found[0], x), gradients(expected[0], x), **TOLERANCE[dtype])
    y = draw(*expected[0].shape, dtype=dtype, seed=2).requires_grad_()
    for weights in ({}, {"probs": probs, "routing_map": routing_map.bool()}):
        back = unpermute(y, found[2], x.shape, fused=True, **weights)
        wanted = moe_utils.unpermute(y, expected[2], x.shape, **weights)
        assert back.dtype == dtype
        torch.testing.assert_close(back, wanted, **TOLERANCE[dtype])
        inputs = (y, probs) if weights else (y,)
        torch.testing.assert_close(gradients(back, *inputs), gradients(wanted, *inputs), **TOLERANCE[dtype])


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 11), experts=st.integers(1, 5), capacity=st.integers(1, 6), rest=st.integers(0, 4))
def test_experts_that_are_padded(tokens: int, experts: int, capacity: int, rest: int) -> None:
    """drop_and_pad gives every expert Megatron's rows, also where the number of rows is not a multiple of them."""
    rows = min(capacity, tokens) * experts + rest % experts
    x, probs, routing_map = draw(tokens, 4), draw(tokens, experts, seed=1), draw(tokens, experts, seed=2) > 0.3
    found = permute(x, routing_map, probs, rows, drop_and_pad=True)
    expected = moe_utils.permute(x, routing_map, probs, rows, drop_and_pad=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    back = unpermute(found[0], found[2], x.shape, probs, routing_map, drop_and_pad=True)
    wanted = moe_utils.unpermute(found[0], found[2], x.shape, probs, routing_map, drop_and_pad=True)
    torch.testing.assert_close(back, wanted)


def test_later_versions_get_their_further_results() -> None:
    """From 0.17 on permute also returns None and the counts that it was given; pad_offsets change nothing unfused."""

    def later(
        tokens: Any, routing_map: Any, probs: Any = None, num_out_tokens: Any = None, fused: bool = False,
        drop_and_pad: bool = False, tokens_per_expert: Any = None, align_size: int = 0,
    ) -> Any:  # fmt: skip
        raise AssertionError("the original was called")

    x, routing_map, counts = draw(3, 4), torch.ones(3, 2, dtype=torch.bool), torch.tensor([3, 3])
    ours = permutation.permute(False)(later)
    expected = moe_utils.permute(x, routing_map)
    for found in (
        ours(x, routing_map, num_out_tokens=6, fused=True, tokens_per_expert=counts, align_size=16),
        ours(x, routing_map, None, 6, True, False, counts, 16),
    ):
        assert torch.equal(found[0], expected[0])
        assert found[3] is None
        assert found[4] is counts
    assert ours(x, routing_map, num_out_tokens=6)[3:] == (None, None)
    back = unpermute(expected[0], expected[2], x.shape, fused=True, pad_offsets=counts)
    torch.testing.assert_close(back, 2 * x)


def test_a_wrong_word_about_the_rows_of_a_token_is_refused() -> None:
    """RowsOfTopk reaches the operator as topk on both ways, where a number that does not fit is an error."""
    routing_map = torch.tensor([[True, True, False], [False, True, True]])
    x, rows = draw(2, 4), permutation.RowsOfTopk(2, 2)
    permuted, _, indices = permute(x, routing_map, num_out_tokens=rows)
    torch.testing.assert_close(unpermute(permuted, indices, x.shape), 2 * x)
    assert (int(rows), rows.topk) == (4, 2)
    with pytest.raises(ValueError, match="topk=2"):
        permute(torch.cat([x, x]), torch.cat([routing_map, routing_map]), num_out_tokens=rows)
    with pytest.raises(ValueError, match="topk=2"):
        unpermute(permuted, indices, (3, 4))


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=7), seed=st.integers(0, 99), with_probs=st.booleans())
def test_chunks_in_another_order(sizes: list[int], seed: int, with_probs: bool) -> None:
    """The gather puts the chunks, also empty ones, where Megatron's split and join does, with gradients."""
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))
    x, probs = draw(sum(sizes), 3).requires_grad_(), draw(sum(sizes), seed=1)
    split = torch.tensor(sizes)
    expected = moe_utils.sort_chunks_by_idxs(x, split, order, probs if with_probs else None)
    if with_probs:
        found = permutation.fused_sort_chunks_by_index_with_probs(x, probs, split, order)
        assert torch.equal(found[1], expected[1])
    else:
        found = (permutation.fused_sort_chunks_by_index(x, split, order),)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(gradients(found[0], x)[0], gradients(expected[0], x)[0])
    wrapped = permutation.sort_chunks(moe_utils.sort_chunks_by_idxs)
    assert torch.equal(wrapped(x, split, order, fused=True)[0], expected[0])


def test_the_fused_names_are_what_the_functions_are() -> None:
    """What Megatron imports from TransformerEngine by name computes the same; what it cannot know it refuses."""
    routing_map, x, probs = draw(6, 3, seed=2) > 0, draw(6, 4), draw(6, 3, seed=1)
    rows, of_probs, indices = moe_utils.permute(x, routing_map, probs)
    found = permutation.fused_permute_with_probs(x, probs, routing_map, num_out_tokens=len(rows))
    assert all(map(torch.equal, found, (rows, of_probs, indices)))
    assert torch.equal(permutation.fused_permute(x, routing_map, num_out_tokens=len(rows))[0], rows)
    back = permutation.fused_unpermute(rows, indices, restore_shape=x.shape)
    torch.testing.assert_close(back, moe_utils.unpermute(rows, indices, x.shape))
    with pytest.raises(NotImplementedError, match="merging_probs"):
        permutation.fused_unpermute(rows, indices, merging_probs=probs, restore_shape=x.shape)


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(1, 9),
    topk=st.integers(1, 4),
    score=st.sampled_from(["softmax", "pre", "sigmoid"]),
    groups=st.sampled_from([None, (4, 2), (2, 1)]),
    factor=st.sampled_from([None, 0.0, 2.5]),
    with_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 99),
)
def test_the_choice_of_experts(
    tokens: int, topk: int, score: str, groups: Any, factor: Any, with_bias: bool, dtype: torch.dtype, seed: int
) -> None:
    """Probabilities, map and gradients are Megatron's for every score, group, factor and bias that it takes."""
    if groups and (topk < groups[1] or topk > 8 // groups[0] * groups[1]):
        topk = groups[1]
    # Logits of one row, and sums of them, are all different, also in bfloat16: of equals Megatron may choose any.
    values = torch.tensor([-1.9, -1.1, -0.55, -0.2, 0.05, 0.4, 0.95, 2.1])
    logits = values[torch.argsort(draw(tokens, 8, seed=seed), dim=1)].to(dtype).requires_grad_()
    options = {"use_pre_softmax": score == "pre", "scaling_factor": factor, "expert_bias": None}
    options |= {"score_function": "sigmoid" if score == "sigmoid" else "softmax"}
    options |= {"num_groups": groups[0], "group_topk": groups[1]} if groups else {}
    if with_bias:
        options["expert_bias"] = draw(8, seed=1) / 16
    ours = moe.topk_routing(Report(), False)(moe_utils.topk_routing_with_score_function)
    found = ours(logits, topk, fused=True, **options)
    expected = moe_utils.topk_routing_with_score_function(logits, topk, **options)
    assert found[0].dtype == expected[0].dtype
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=2.0**-6, atol=1e-6 if dtype != torch.bfloat16 else 2.0**-8)
    theirs = gradients(expected[0], logits)[0]
    error = (gradients(found[0], logits)[0] - theirs).abs().max()
    assert error <= max(float(theirs.abs().max()), 1.0) * (2.0**-5 if dtype == torch.bfloat16 else 1e-5)


def test_a_choice_as_indices() -> None:
    """dense_output, of Megatron-Core 0.17, gives the probabilities and numbers of the chosen experts."""
    ours = moe.topk_routing(Report(), False)(moe_utils.topk_routing_with_score_function)
    logits = draw(5, 8)
    probs, experts = ours(logits, 3, dense_output=True)
    dense, routing_map = moe_utils.topk_routing_with_score_function(logits, 3)
    assert torch.equal(torch.zeros(5, 8).scatter(1, experts, probs), dense)
    assert torch.equal(torch.zeros(5, 8, dtype=torch.bool).scatter(1, experts, True), routing_map)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"router_replay": True}, "a choice that is given"),
        ({"scaling_factor": -1.0}, "negative"),
        ({"logits": torch.zeros(2, 8, dtype=torch.float64)}, "float64"),
        ({"logits": NARROW, "num_groups": 4, "group_topk": 2}, "groups are added up"),
        ({"num_groups": 4, "group_topk": 4}, "groups are added up"),
        (
            {
                "logits": torch.zeros(2, 8).bfloat16(),
                "score_function": "sigmoid",
                "expert_bias": torch.zeros(8).bfloat16(),
            },
            "expert_bias",
        ),
        ({"score_function": "sqrtsoftplus"}, "no score function"),
    ],
)
def test_what_the_operator_does_not_choose_as_megatron_goes_to_megatron(options: dict[str, Any], why: str) -> None:
    """The original is called with every argument, unfused, and the report says why."""
    calls: list[Any] = []

    def topk_routing_with_score_function(*args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        return "Megatron's"

    report = Report()
    ours = moe.topk_routing(report, False)(topk_routing_with_score_function)
    given = {"logits": torch.zeros(2, 8), "topk": 2, "fused": True} | options
    assert ours(**given) == "Megatron's"
    ((args, kwargs),) = calls
    assert args[0] is given["logits"]
    assert args[8] is False
    passed = dict(zip(list(moe_utils.topk_routing_with_score_function.__annotations__), args, strict=False)) | kwargs
    assert {name: passed[name] for name in options} == options
    (line,) = report.lines
    assert why in line.reason


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 9),
    experts=st.integers(1, 6),
    columns=st.integers(1, 3),
    mask=st.booleans(),
    count=st.sampled_from(["number", "tensor"]),
    fractions=st.booleans(),
)
def test_the_balancing_loss(tokens: int, experts: int, columns: int, mask: bool, count: str, fractions: bool) -> None:
    """The loss and its gradient are Megatron's, of sequences side by side, with its mask of the tokens that count."""
    probs = torch.rand(tokens, experts * columns, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loads = torch.randint(0, 9, (experts * columns,), generator=torch.Generator().manual_seed(2))
    loads = loads / 3 if fractions else loads
    total = 2 * tokens if count == "number" else torch.tensor(2.0 * tokens)
    given = (probs, loads, total, 2, experts, 0.05)
    chosen = {"padding_mask": torch.arange(tokens) % 3 > 0} if mask else {}
    found = moe.load_balancing_loss(False)(moe_utils.switch_load_balancing_loss_func)(*given, fused=True, **chosen)
    expected = moe_utils.switch_load_balancing_loss_func(*given, **chosen)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, probs), gradients(expected, probs))


@pytest.mark.parametrize(
    "mask", [None, torch.tensor([True, False, False, True, False]), torch.ones(5, dtype=torch.bool)]
)
def test_the_z_loss(mask: torch.Tensor | None) -> None:
    """The loss and its gradient are Megatron's, with its mask of the padding."""
    logits = draw(5, 6).requires_grad_()
    found = moe.z_loss(moe_utils.z_loss_func)(logits, 0.01, padding_mask=mask)
    expected = moe_utils.z_loss_func(logits, 0.01, mask)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, logits), gradients(expected, logits))


@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_every_function_reaches_its_operator_on_every_device(device: str) -> None:
    """No function that has an operator stays Megatron's."""
    rows = named(moe.rows(context(adapter=importlib.import_module(f"llm_adapt.adapters.{device}").ADAPTER)))
    served = {
        "topk_routing_with_score_function": "topk_router",
        "switch_load_balancing_loss_func": "router_aux_loss",
        "z_loss_func": "router_z_loss",
        "permute": "moe_permute",
        "unpermute": "moe_unpermute",
    }
    for name, op in served.items():
        assert rows[name].reason.startswith(f"operator {op}")


def test_what_has_no_operator_is_unfused_and_the_report_says_so() -> None:
    """fused=True, by name or by place, gives what Megatron's own unfused function does."""
    report = Report()
    own = moe.unfused(report, "permute", "no operator")(moe_utils.permute)
    (line,) = report.lines
    assert (line.subject, line.choice, line.reason) == ("megatron permute", "Megatron's own", "no operator")
    x, routing_map = draw(3, 4), torch.ones(3, 2, dtype=torch.bool)
    for call in ((x, routing_map, None, 6, True), (x, routing_map)):
        assert torch.equal(own(*call)[0], moe_utils.permute(x, routing_map)[0])
    assert torch.equal(own(x, routing_map, fused=True)[0], moe_utils.permute(x, routing_map)[0])


def test_nothing_is_planned_with_ops_off() -> None:
    """ops="off" leaves Megatron's functions, and its refusals, alone."""
    assert moe.rows(context("off")) == []


def test_transformer_engine_serves_its_fused_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TransformerEngine fused=True is the original's, no name is added, and unfused calls are ours."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = named(moe.rows(context("*=reference")))
    assert not {"fused_permute", "fused_unpermute", "sort_chunks_by_idxs"} & set(rows)
    calls: list[Any] = []

    def original(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))

    x, routing_map = draw(3, 4), torch.ones(3, 2, dtype=torch.bool)
    rows["permute"].new(original)(x, routing_map, None, 6, True)
    assert calls.pop() == ((x, routing_map, None, 6, True, False), {})
    rows["unpermute"].new(original)(x, None, (3, 4), fused=True)
    assert calls.pop()[0][5] is True
    rows["topk_routing_with_score_function"].new(original)(x, 2, fused=True)
    assert calls.pop()[0][8] is True
    rows["switch_load_balancing_loss_func"].new(original)(x, x, 3, 2, 4, 0.1, True)
    assert calls.pop()[0][6] is True
    assert rows["permute"].new(original)(x, routing_map, None, 6)[0].shape == (6, 4)
    assert calls == []


def test_every_body_of_the_installed_version_is_known() -> None:
    """A row that relies on a body names the one of the installed Megatron-Core."""
    _, sources = seam_table.installed()
    for row in moe.rows(context()):
        assert isinstance(row, Patch)
        if row.fingerprints:
            assert seam_table.cell(sources, row) in row.fingerprints.values(), row.target
