"""The two functions with flash-attn's signatures against float64, argument by argument."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_models import one_thread  # noqa: F401 - a fixture
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_adapt.frameworks.transformers.flash import flash_attn_func, flash_attn_varlen_func
from llm_adapt.ops.dispatch.in_force import start_over
from llm_adapt.ops.dispatch.policy import Policy

D = 8
SINKS = torch.tensor([2.0, -1.0, 0.5, 3.0])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """The kernels of the CPU serve."""
    start_over(Policy(order=("torch_native", "chunked")))
    yield
    start_over(Policy())


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [Sq, H, D] and log-sum-exp [H, Sq] of one sequence in float64, from the text of flash-attn's README."""
    options = {"softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0} | given
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    scale, cap = options["softmax_scale"] or D**-0.5, options["softcap"]
    scores = q @ k.transpose(-1, -2) * scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    before = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])[None]
    if (slopes := given.get("alibi_slopes")) is not None:
        scores = scores - slopes.double()[:, None, None] * before.abs()
    left, right = options["window_size"]
    right = 0 if options["causal"] else right
    hidden = (before > left) & (left >= 0) | (-before > right) & (right >= 0)
    scores = scores.masked_fill(hidden, -torch.inf)
    if (sinks := given.get("s_aux")) is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, q.shape[1], 1)], -1)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])[..., : k.shape[1]]
    return (weights @ v).transpose(0, 1), lse


def drawn(rows: int, columns: int, groups: int, seed: int) -> list[torch.Tensor]:
    """Query [rows, 4, D], key and value [columns, groups, D]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (rows, 4), (columns, groups), (columns, groups)
    return [torch.randn(*size, D, generator=generator) for size in sizes]


OPTIONS = {
    "softmax_scale": st.sampled_from([None, 0.3]),
    "causal": st.booleans(),
    "window_size": st.sampled_from([(-1, -1), (3, -1), (-1, 2), (3, 3), (1, 0)]),
    "softcap": st.sampled_from([0.0, 0.7]),
    "alibi_slopes": st.sampled_from([None, SLOPES]),
    "s_aux": st.sampled_from([None, SINKS]),
}
LENGTHS = st.sampled_from([2, 5, 11])


def gradients(out: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of the leaves for a drawn gradient of the output."""
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return list(torch.autograd.grad(out, leaves, upstream))


@settings(max_examples=30)
@given(rows=LENGTHS, columns=LENGTHS, groups=st.sampled_from([1, 2, 4]), options=st.fixed_dictionaries(OPTIONS))
@example(rows=11, columns=5, groups=2, options={"causal": True})  # the first queries see no key
@example(rows=5, columns=11, groups=2, options={"causal": True, "window_size": (3, 3)})
def test_every_argument_is_honoured(rows: int, columns: int, groups: int, options: dict[str, Any]) -> None:
    """Outputs, log-sum-exp and gradients equal the formula for each combination of arguments."""
    leaves = [x.requires_grad_() for x in drawn(rows, columns, groups, 0)]
    expected, expected_lse = naive(*leaves, **options)
    batched = [x[None] for x in leaves]
    out, lse, probs = flash_attn_func(*batched, return_attn_probs=True, **options)  # type: ignore[misc]
    assert probs is None
    assert torch.allclose(out[0].double(), expected, atol=2e-5)
    assert torch.allclose(lse[0].double(), expected_lse, atol=2e-5)
    alone = flash_attn_func(*batched, **options)
    assert isinstance(alone, torch.Tensor)
    assert torch.allclose(alone[0].double(), expected, atol=2e-5)
    for found, wanted in zip(gradients(alone[0], leaves), gradients(expected, leaves), strict=True):
        assert torch.allclose(found.double(), wanted.double(), atol=1e-4)


@settings(max_examples=20)
@given(
    lengths=st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=3),
    groups=st.sampled_from([1, 2, 4]),
    options=st.fixed_dictionaries(OPTIONS),
    longest=st.sampled_from(["int", "tensor"]),
)
def test_packed_sequences_are_each_their_own(
    lengths: list[tuple[int, int]], groups: int, options: dict[str, Any], longest: str
) -> None:
    """Each packed sequence has the output, log-sum-exp and gradients of its own dense call, in any lengths."""
    parts = [drawn(rows, columns, groups, seed) for seed, (rows, columns) in enumerate(lengths)]
    leaves = [torch.cat(tensors).requires_grad_() for tensors in zip(*parts, strict=True)]
    ends = [torch.tensor([0, *itertools.accumulate(side)], dtype=torch.int32) for side in zip(*lengths, strict=True)]
    most: list[Any] = [max(side) for side in zip(*lengths, strict=True)]
    if longest == "tensor":  # as transformers passes them, made from position_ids
        most = [torch.tensor(value) for value in most]
    queries = leaves[0].split([rows for rows, _ in lengths])
    keys, values = (x.split([columns for _, columns in lengths]) for x in leaves[1:])
    each = [naive(q, k, v, **options) for q, k, v in zip(queries, keys, values, strict=True)]
    expected = torch.cat([out for out, _ in each])
    found, lse, _ = flash_attn_varlen_func(*leaves, *ends, *most, return_attn_probs=True, **options)  # type: ignore[misc]
    assert torch.allclose(found.double(), expected, atol=2e-5)
    assert torch.allclose(lse.double(), torch.cat([part for _, part in each], 1), atol=2e-5)
    alone = flash_attn_varlen_func(*leaves, *ends, *most, **options)
    assert isinstance(alone, torch.Tensor)
    for one, other in zip(gradients(alone, leaves), gradients(expected, leaves), strict=True):
        assert torch.allclose(one.double(), other.double(), atol=1e-4)


def test_sinks_have_a_gradient() -> None:
    """The gradient of s_aux is that of the formula."""
    sinks = SINKS.clone().requires_grad_()
    leaves = drawn(11, 11, 2, 0)
    out = flash_attn_func(*(x[None] for x in leaves), causal=True, s_aux=sinks)
    assert isinstance(out, torch.Tensor)
    (expected,) = gradients(naive(*leaves, causal=True, s_aux=sinks)[0], [sinks])
    (found,) = gradients(out[0], [sinks])
    assert torch.allclose(found, expected.float(), atol=1e-5)


def test_dropout_keeps_the_mean_and_follows_the_seed() -> None:
    """torch.manual_seed decides what is dropped, and the mean over many draws is the output without."""
    q, k, v = (x[None] for x in drawn(11, 11, 2, 0))
    torch.manual_seed(0)
    draws = torch.stack([flash_attn_func(q, k, v, 0.3, causal=True) for _ in range(200)])  # type: ignore[misc]
    torch.manual_seed(0)
    assert torch.equal(draws[0], flash_attn_func(q, k, v, 0.3, causal=True))  # type: ignore[arg-type]
    assert not torch.equal(draws[0], draws[1])
    exact = flash_attn_func(q, k, v, causal=True)
    assert float((draws.mean(0) - exact).abs().max()) < 6 * float(draws.std(0).max()) / 200**0.5  # type: ignore[operator]
    state = torch.get_rng_state()
    flash_attn_func(q, k, v, causal=True)
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn where nothing is dropped


def test_a_block_table_is_refused() -> None:
    """Keys in pages are not taken, and the error names what takes them."""
    q, k, v = drawn(4, 4, 2, 0)
    ends = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="decode_attention"):
        flash_attn_varlen_func(q, k, v, ends, ends, 4, 4, block_table=torch.zeros(1, 1, dtype=torch.int32))


def test_unlimited_windows_may_be_none() -> None:
    """window_size=(None, None), as flash-attn 4 writes it, is no window."""
    q, k, v = (x[None] for x in drawn(5, 5, 2, 0))
    found = flash_attn_func(q, k, v, causal=True, window_size=(None, None))
    assert torch.equal(found, flash_attn_func(q, k, v, causal=True))  # type: ignore[arg-type]


def test_the_signatures_are_those_of_flash_attn_2() -> None:
    """Names and order of flash-attn 2.8, which callers use by position; s_aux comes last."""
    dense = ["q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes"]
    last = ["deterministic", "return_attn_probs"]
    ends = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    assert [*inspect.signature(flash_attn_func).parameters] == [*dense, *last, "s_aux"]
    packed = [*dense[:3], *ends, *dense[3:], *last, "block_table", "s_aux"]
    assert [*inspect.signature(flash_attn_varlen_func).parameters] == packed
