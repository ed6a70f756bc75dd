"""attn_implementation="sdpa" under the operator computes what transformers' own function computes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="run: pip install transformers==5.24.0")

from attention_models import build, distance, one_thread, padding, served, step, tokens  # noqa: F401 - a fixture

from llm_adapt.frameworks.transformers.attention import sdpa
from llm_adapt.ops.dispatch.in_force import start_over
from llm_adapt.ops.dispatch.policy import Policy
from llm_adapt.ops.dispatch.receipt import receipt
from llm_adapt.report import Report

FLOAT32 = 2e-5
B, S, D = 2, 7, 8


def original() -> Callable[..., Any]:
    """transformers' own function."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found: Callable[..., Any] = sdpa_attention_forward
    return found


@pytest.fixture
def ours() -> Any:
    """The function that takes its place, and the report of what it leaves to the original."""
    start_over(Policy(order=("torch_native", "chunked")))
    report = Report()
    yield SimpleNamespace(function=sdpa(report)(original()), report=report)
    start_over(Policy())


def module(groups: int = 1, is_causal: bool = True) -> Any:
    """What the function reads of a model's attention module."""
    found = torch.nn.Module()
    found.num_key_value_groups, found.is_causal = groups, is_causal  # type: ignore[assignment]
    return found


def qkv(rows: int = S, columns: int = S, heads: int = 4, groups: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """Query, key and value as [B, H, S, D], laid out as models do: heads behind tokens."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((rows, heads, D), (columns, groups, D), (columns, groups, D))
    drawn = [torch.randn(B, *size, generator=generator).transpose(1, 2) for size in sizes]
    return [x.requires_grad_() for x in drawn]


def masks(kind: str, rows: int, columns: int) -> torch.Tensor | None:
    """A mask of a kind; of boolean ones each row sees something."""
    generator = torch.Generator().manual_seed(5)
    seen = torch.rand(B, 1, rows, columns, generator=generator) > 0.4
    seen[..., 0] = True
    if kind == "bool":
        return seen
    if kind == "hard":
        return torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    if kind == "soft":
        return torch.randn(B, 1, rows, columns, generator=generator)
    return torch.randn(1, 4, rows, columns, generator=generator) if kind == "by head" else None


def both(function: Callable[..., Any], who: Any, *inputs: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    """Output, and gradients of query, key, value, and of mask and bias where they ask for one."""
    leaves = [*inputs, *(value for value in options.values() if isinstance(value, torch.Tensor))]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    out, weights = function(who, *inputs, **options)
    assert weights is None
    assert out.is_contiguous()
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(9)))
    return {"out": out.detach()} | {str(index): leaf.grad for index, leaf in enumerate(leaves) if leaf.grad is not None}


@settings(max_examples=30)
@example(rows=S, columns=S, groups=2, kind="none", is_causal=None, module_is_causal=True, scale=None, bias=False)
@example(rows=3, columns=9, groups=2, kind="none", is_causal=True, module_is_causal=True, scale=None, bias=False)
@example(rows=3, columns=9, groups=1, kind="none", is_causal=True, module_is_causal=True, scale=0.3, bias=True)
@example(rows=S, columns=S, groups=2, kind="none", is_causal=None, module_is_causal=False, scale=None, bias=False)
@example(rows=9, columns=4, groups=4, kind="none", is_causal=True, module_is_causal=False, scale=None, bias=False)
@example(rows=1, columns=9, groups=2, kind="bool", is_causal=None, module_is_causal=True, scale=None, bias=False)
@given(
    rows=st.sampled_from([1, 2, S]),
    columns=st.sampled_from([2, S, 11]),
    groups=st.sampled_from([1, 2, 4]),
    kind=st.sampled_from(["none", "bool", "hard", "soft", "by head"]),
    is_causal=st.sampled_from([None, True, False]),
    module_is_causal=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    bias=st.booleans(),
)
def test_it_is_the_original_function(
    rows: int,
    columns: int,
    groups: int,
    kind: str,
    is_causal: bool | None,
    module_is_causal: bool,
    scale: float | None,
    bias: bool,
) -> None:
    """Outputs and gradients are the original's for every mask, bias, diagonal, scale and number of key heads."""
    start_over(Policy(order=("torch_native", "chunked")))
    try:
        who, mask = module(4 // groups, module_is_causal), masks(kind, rows, columns)
        options: dict[str, Any] = {"attention_mask": mask, "is_causal": is_causal, "scaling": scale}
        if bias:
            generator = torch.Generator().manual_seed(6)
            options["position_bias"] = torch.randn(1, 4, rows, columns, generator=generator).requires_grad_()
        inputs = qkv(rows, columns, 4, groups)
        expected = both(original(), who, *inputs, **options)
        report = Report()
        found = both(sdpa(report)(original()), who, *inputs, **options)
        assert report.lines == []
        assert distance(found, expected) < FLOAT32
    finally:
        start_over(Policy())


def test_soft_masks_have_their_gradient(ours: Any) -> None:
    """A mask that is learned receives the gradient that the original gives it."""
    options = {"attention_mask": torch.randn(B, 1, S, S).requires_grad_(), "is_causal": False}
    expected = both(original(), module(2), *qkv(), **options)
    assert distance(both(ours.function, module(2), *qkv(), **options), expected) < FLOAT32


def test_autocast_casts_as_the_original_does(ours: Any) -> None:
    """Inside autocast float32 tensors and masks are computed in bfloat16, as the original has them."""
    inputs, options = qkv(), {"attention_mask": masks("soft", S, S), "is_causal": False}
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected, _ = original()(module(2), *inputs, **options)
        found, _ = ours.function(module(2), *inputs, **options)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert distance({"out": found}, {"out": expected}) < 2e-2
    # A mask wider than the query would be left to slower kernels.
    assert [row["library"] for row in receipt() if row["op"] == "attention"] == ["torch_native"]


def naive(
    inputs: list[torch.Tensor], window: int | None = None, cap: float = 0.0, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Causal attention in float64, with what the original leaves out."""
    query, key, value = (x.double() for x in inputs)
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * D**-0.5
    scores = cap * torch.tanh(scores / cap) if cap else scores
    distance_ = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])[None] + key.shape[2] - query.shape[2]
    hidden = distance_ < 0 if window is None else (distance_ < 0) | (distance_ >= window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        beside = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        return (torch.cat([scores, beside], -1).softmax(-1)[..., :-1] @ value).transpose(1, 2)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"sliding_window": 3}, {"window": 3}),
        ({"sliding_window": S}, {}),
        ({"softcap": 0.7}, {"cap": 0.7}),
        ({"s_aux": torch.tensor([2.0, -1.0, 0.5, 3.0])}, {"sinks": torch.tensor([2.0, -1.0, 0.5, 3.0])}),
    ],
)
def test_what_the_original_leaves_out_is_computed(ours: Any, options: Any, values: Any) -> None:
    """Windows without a mask, softcaps and sinks are honoured; the original ignores them, or raises."""
    inputs = qkv()
    found, _ = ours.function(module(2), *inputs, attention_mask=None, **options)
    assert distance({"out": found}, {"out": naive(inputs, **values)}) < FLOAT32


def test_a_window_counts_back_from_the_last_key(ours: Any) -> None:
    """One query behind a cache longer than the window sees the last keys only."""
    inputs = qkv(rows=1, columns=9)
    found, _ = ours.function(module(2), *inputs, attention_mask=None, sliding_window=4)
    assert distance({"out": found}, {"out": naive(inputs, window=4)}) < FLOAT32


def test_a_mask_has_the_window_in_it(ours: Any) -> None:
    """Where a mask is given it alone decides: in a static cache places say nothing of distance."""
    inputs, mask = qkv(), masks("bool", S, S)
    expected, _ = original()(module(2), *inputs, attention_mask=mask)
    found, _ = ours.function(module(2), *inputs, attention_mask=mask, sliding_window=2)
    assert distance({"out": found}, {"out": expected}) < FLOAT32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output_attentions": True}, "no weights"),
        ({"dropout": 0.5}, "dropout of their own"),
        ({"query": "one batch"}, "of one batch"),
    ],
)
def test_what_is_left_to_the_original_is_reported(ours: Any, change: dict[str, Any], reason: str) -> None:
    """The original computes it, with every argument it was given, and one line of the report says so."""
    inputs = qkv()
    if change.pop("query", None):
        inputs[0] = inputs[0][:1]
    results = []
    for function in (original(), ours.function):
        torch.manual_seed(4)
        results.append(function(module(2), *inputs, attention_mask=None, position_bias=None, **change)[0])
    assert torch.equal(*results)
    assert [line.choice for line in ours.report.lines] == ["left to transformers"]
    assert reason in ours.report.lines[0].reason


def test_dropout_with_what_the_original_lacks_keeps_the_mean(ours: Any) -> None:
    """With sinks the operator drops by a seed of torch's generator: the mean stays, the same seed drops the same."""
    inputs = [x.detach() for x in qkv()]
    options = {"attention_mask": None, "s_aux": torch.zeros(4)}
    exact, _ = ours.function(module(2), *inputs, **options)
    torch.manual_seed(0)
    dropped = torch.stack([ours.function(module(2), *inputs, dropout=0.3, **options)[0] for _ in range(200)])
    torch.manual_seed(0)
    assert torch.equal(dropped[0], ours.function(module(2), *inputs, dropout=0.3, **options)[0])
    assert not torch.equal(dropped[0], dropped[1])
    assert float((dropped.mean(0) - exact).abs().max()) < 6 * float(dropped.std(0).max()) / 200**0.5


def test_fake_tensors_and_traces_go_through(ours: Any) -> None:
    """Tensors without values have the right shape, and torch.jit.trace records the original."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x.detach()) for x in qkv()]
        assert ours.function(module(2), *fake, attention_mask=None)[0].shape == (B, S, 4, D)
    assert [line.reason for line in ours.report.lines] == ["the tensors are of type FakeTensor"]

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = ours.function(module(2), query, key, value, attention_mask=None)[0]
        return found

    inputs = [x.detach() for x in qkv()]
    assert torch.allclose(torch.jit.trace(call, tuple(inputs))(*inputs), call(*inputs), atol=1e-6)


class Attention(torch.nn.Module):
    """A module around a function of transformers, for torch.export."""

    num_key_value_groups, is_causal = 2, True

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None) -> torch.Tensor:
        """The output."""
        found: torch.Tensor = self.function(self, query, key, value, attention_mask=mask)[0]
        return found


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["none", "bool"])
def test_it_can_be_exported(ours: Any, strict: bool, kind: str) -> None:
    """torch.export takes it, with a length that is free, and the program computes the same for another length."""
    length = torch.export.Dim("length", min=2, max=64)
    attention = Attention(ours.function)
    inputs = [x.detach() for x in qkv()]
    mask = masks(kind, S, S)
    shapes = [{2: length}, {2: length}, {2: length}, {2: length, 3: length} if kind == "bool" else None]
    program = torch.export.export(attention, (*inputs, mask), dynamic_shapes=shapes, strict=strict).module()
    other, mask = [x.detach() for x in qkv(11, 11)], masks(kind, 11, 11)
    assert torch.allclose(program(*other, mask), attention(*other, mask), atol=1e-6)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "DeepseekV3"])
def test_models_compute_what_they_did(name: str, side: str) -> None:
    """Logits, gradients and greedy tokens of models with "sdpa" are those without the operator."""
    ids = tokens()
    mask = padding(side, ids)
    results = []
    for is_served in (False, True):
        with served() if is_served else torch.enable_grad():
            model = build(name, "sdpa")
            greedy = model.generate(ids[:1], max_new_tokens=6, do_sample=False).tolist()
            results.append((step(model, ids, mask), greedy))
    (expected, expected_tokens), (found, found_tokens) = results
    assert distance(found, expected) < FLOAT32
    assert found_tokens == expected_tokens


@pytest.mark.parametrize("name", ["Bart", "T5"])
def test_encoder_decoders_compute_what_they_did(name: str) -> None:
    """Cross attention, attention without a diagonal and T5's position bias, padded, forward, backward and generate.

    T5 does not scale its scores, and loses half of the digits of a float32: what it did is 2e-4 from float64.
    """
    ids, targets = tokens(2, 11), tokens(2, 6)
    mask = padding("right", ids)
    exact = step(build(name, "sdpa").eval().double(), ids, mask, decoder_input_ids=targets)
    results = []
    for is_served in (False, True):
        with served() if is_served else torch.enable_grad():
            model = build(name, "sdpa").eval()
            assert model.config._attn_implementation == "sdpa"
            found = step(model, ids, mask, decoder_input_ids=targets)
            options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
            results.append((found, model.generate(ids, decoder_start_token_id=1, **options).tolist()))
    plain, ours = (distance(found, exact) for found, _ in results)
    assert ours < max(FLOAT32, 1.2 * plain)
    assert results[1][1] == results[0][1]


def test_bfloat16_models_are_as_near_as_before() -> None:
    """In bfloat16 logits and gradients are as near to float32 as without the operator."""
    ids = tokens()
    mask = padding("left", ids)
    exact = step(build("Mistral", "sdpa"), ids, mask)
    theirs = distance(step(build("Mistral", "sdpa", torch.bfloat16), ids, mask), exact)
    with served():
        ours = distance(step(build("Mistral", "sdpa", torch.bfloat16), ids, mask), exact)
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("attn", ["sdpa", "flash_attention_2"])
def test_a_model_compiles_in_one_graph(attn: str) -> None:
    """torch.compile(fullgraph=True) of a model computes, forward and backward, what it computes without."""
    ids = tokens()
    mask = padding("none", ids)
    with served():
        # Not in float32 with flash-attention: transformers then warns in the middle of the graph.
        dtype = torch.float32 if attn == "sdpa" else torch.bfloat16
        model = build("Llama", attn, dtype)
        expected = step(model, ids, mask, use_cache=False)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled.zero_grad(set_to_none=True)
        logits = compiled(input_ids=ids, use_cache=False).logits
        logits.float().square().mean().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        torch._dynamo.reset()
    assert distance({"logits": logits.detach(), **found}, expected) < (FLOAT32 if dtype == torch.float32 else 6e-2)


def test_compiled_code_with_dropout_is_the_original(ours: Any) -> None:
    """Compiled code cannot draw a seed: dropout is left to the original there, in one graph, and reported."""
    torch._dynamo.reset()
    inputs = [x.detach() for x in qkv()]

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = ours.function(module(2), *tensors, attention_mask=None, dropout=0.5)[0]
        return found

    out = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    torch._dynamo.reset()
    assert out.shape == (B, S, 4, D)
    assert [line.reason for line in ours.report.lines] == ["its kernels have a dropout of their own"]


def test_eager_still_returns_the_weights() -> None:
    """The name eager is not touched: it is not in the registry, and returns attention weights."""
    with served():
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        assert "eager" not in ALL_ATTENTION_FUNCTIONS
        model = build("Llama", "eager").eval()
        weights = model(tokens(), output_attentions=True).attentions
        assert [tuple(layer.shape) for layer in weights] == [(2, 4, 20, 20)] * 2
        assert torch.allclose(weights[0].sum(-1), torch.ones(()))
