"""attention: the reference against a loop written from its docstring, its layouts, its properties and its guards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_adapt.ops.attention import attention
from llm_adapt.ops.attention_parts.dropout import kept
from llm_adapt.ops.attention_parts.narrowing import narrowed
from llm_adapt.ops.dispatch.proof import run_op
from llm_adapt.ops.dispatch.registry import find_op
from tests.ops.attention_loop import attention_loop, drawn, gradients

OP = find_op("attention")
REFERENCE = OP.reference
TURNS = {"sbhd": (1, 0, 2, 3), "bhsd": (0, 2, 1, 3)}  # from bshd; each is its own inverse


@st.composite
def options(draw: Any) -> dict[str, Any]:
    """Options that decide which key is seen and what is added."""
    return {
        "causal": draw(st.sampled_from(["none", "top_left", "bottom_right"])),
        "window_left": draw(st.integers(-1, 4)),
        "window_right": draw(st.integers(-1, 3)),
        "scale": draw(st.sampled_from([None, 0.3, 1.0])),
        "softcap": draw(st.sampled_from([0.0, 2.0])),
    }


@st.composite
def biases(draw: Any, rows: int, columns: int, heads: int) -> dict[str, torch.Tensor]:
    """Masks, slopes and sinks of one sequence."""
    found = {}
    kind = draw(st.sampled_from(["none", "bool", "added"]))
    seed = draw(st.integers(0, 99))
    if kind != "none":
        mask = drawn(seed, heads, rows, columns)
        found["mask"] = mask > -0.5 if kind == "bool" else mask.masked_fill(mask < -1, -math.inf)
    if draw(st.booleans()):
        found["alibi_slopes"] = 0.5 ** torch.arange(1, heads + 1).double()
    if draw(st.booleans()):
        found["sinks"] = drawn(seed + 1, heads)
    return found


@given(st.data(), options(), st.integers(0, 7), st.integers(0, 7), st.sampled_from([(1, 1), (4, 2), (3, 1)]))
def test_it_computes_what_its_docstring_says(
    data: Any, chosen: dict[str, Any], rows: int, columns: int, heads: tuple[int, int]
) -> None:
    """Every option together, odd, empty and unequal lengths, grouped heads: output and log-sum-exp are the loop's."""
    extra = data.draw(biases(rows, columns, heads[0]))
    q, k, v = drawn(1, rows, heads[0], 5), drawn(2, columns, heads[1], 5), drawn(3, columns, heads[1], 3)
    expected = attention_loop(q, k, v, **chosen, **extra)
    out, lse = attention(q[None], k[None], v[None], return_lse=True, **chosen, **extra)
    torch.testing.assert_close(out[0], expected[0])
    torch.testing.assert_close(lse[0], expected[1])


@given(st.data(), options(), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4))
def test_packed_sequences_are_as_if_alone(data: Any, chosen: dict[str, Any], sizes: list[tuple[int, int]]) -> None:
    """Layout "thd": each sequence, also an empty one, has the result that it has alone; behind the last stands 0."""
    padding = data.draw(st.integers(0, 2))
    slopes = drawn(4, len(sizes), 4).abs() if data.draw(st.booleans()) else None
    rows, columns = (sum(size[axis] for size in sizes) + padding for axis in (0, 1))
    q, k, v = drawn(1, rows, 4, 5), drawn(2, columns, 2, 5), drawn(3, columns, 2, 3)
    ends_q, ends_k = (torch.tensor([0, *(size[axis] for size in sizes)]).cumsum(0).to(torch.int32) for axis in (0, 1))
    out, lse = attention(q, k, v, ends_q, ends_k, alibi_slopes=slopes, layout="thd", return_lse=True, **chosen)
    assert lse.shape == (4, rows)
    for n in range(len(sizes)):
        a, b = slice(ends_q[n], ends_q[n + 1]), slice(ends_k[n], ends_k[n + 1])
        own = {} if slopes is None else {"alibi_slopes": slopes[n]}
        expected = attention_loop(q[a], k[b], v[b], **chosen, **own)
        torch.testing.assert_close(out[a], expected[0])
        torch.testing.assert_close(lse[:, a], expected[1])
    assert not out[ends_q[-1] :].any()


@given(options(), st.sampled_from(["bshd", "thd"]))
def test_padding_inside_sequences_is_not_seen(chosen: dict[str, Any], layout: str) -> None:
    """seqused_q and seqused_k: the used tokens have the result that they have alone, the others 0 and no gradient."""
    q, k, v = (drawn(n, 2, 6, 2, 4).requires_grad_() for n in (1, 2, 3))
    used_q, used_k = torch.tensor([6, 3], dtype=torch.int32), torch.tensor([4, 5], dtype=torch.int32)
    ends = torch.tensor([0, 6, 12], dtype=torch.int32) if layout == "thd" else None
    shaped = [x.flatten(0, 1) if layout == "thd" else x for x in (q, k, v)]
    out = attention(*shaped, ends, ends, used_q, used_k, layout=layout, **chosen).view(2, 6, 2, 4)
    for n in range(2):
        expected, _ = attention_loop(q[n, : used_q[n]], k[n, : used_k[n]], v[n, : used_k[n]], **chosen)
        torch.testing.assert_close(out[n, : used_q[n]], expected)
        assert not out[n, used_q[n] :].any()
    for x, used in zip(gradients(out, q, k, v), (used_q, used_k, used_k), strict=True):
        assert not any(x[n, used[n] :].any() for n in range(2))


@pytest.mark.parametrize("layout", TURNS)
@given(options(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans())
def test_layouts_are_views_of_each_other(
    layout: str, chosen: dict[str, Any], dtype: torch.dtype, is_strided: bool
) -> None:
    """A layout gives the turned result and the same log-sum-exp, from contiguous tensors and from views alike."""
    given_ = [drawn(n, 2, 5 + (n > 1), 4 // (1 + (n > 1)), 8, dtype=dtype) for n in (1, 2, 3)]
    turned = [x.permute(TURNS[layout]) for x in given_]
    turned = turned if is_strided else [x.contiguous() for x in turned]
    out, lse = attention(*given_, return_lse=True, **chosen)
    found, found_lse = attention(*turned, layout=layout, return_lse=True, **chosen)
    assert found.is_contiguous()
    assert (found.dtype, found_lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(found.permute(TURNS[layout]), out)
    torch.testing.assert_close(found_lse, lse)


def test_a_query_without_keys_gives_zero_and_no_gradient() -> None:
    """Fully masked rows: output 0, log-sum-exp -inf, all gradients finite, those of such a query 0."""
    q, k, v = (drawn(n, 1, 4, 2, 4).requires_grad_() for n in (1, 2, 3))
    for mask in (torch.zeros(4, 4, dtype=torch.bool), torch.full((4, 4), -math.inf)):
        mask[2:] = True if mask.dtype == torch.bool else 0.0
        out, lse = attention(q, k, v, mask=mask, return_lse=True)
        assert not out[:, :2].any()
        assert torch.isneginf(lse[..., :2]).all()
        found = torch.autograd.grad(out.sum() + lse[..., 2:].sum(), (q, k, v), retain_graph=True)
        assert all(torch.isfinite(x).all() for x in found)
        assert not found[0][:, :2].any()
        (through_lse,) = torch.autograd.grad(lse.sum(), q)
        assert not through_lse[:, :2].any()
    with_sink = attention(q, k, v, mask=torch.zeros(4, 4, dtype=torch.bool), sinks=drawn(9, 2), return_lse=True)
    assert not with_sink[0].any()
    torch.testing.assert_close(with_sink[1], drawn(9, 2)[None, :, None].expand(1, 2, 4))


def test_parts_of_the_keys_can_be_merged_by_their_log_sum_exp() -> None:
    """Two halves of the keys, weighted by their log-sum-exp, are the whole, in gradients too (ring attention)."""
    q, k, v = (drawn(n, 1, 6, 2, 4).requires_grad_() for n in (1, 2, 3))
    whole = attention(q, k, v)
    (out1, lse1), (out2, lse2) = (
        attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(2), slice(2, 6))
    )
    share = torch.sigmoid(lse1 - lse2).transpose(1, 2)[..., None]
    merged = share * out1 + (1 - share) * out2
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(gradients(merged, q, k, v), gradients(whole, q, k, v))


FLIPS: list[dict[str, Any]] = [
    {"causal": "top_left"},
    {"causal": "bottom_right"},
    {"window_left": 1},
    {"window_right": 1},
    {"scale": 0.7},
    {"softcap": 1.0},
    {"dropout_p": 0.4, "seed": 0},
    {"dropout_p": 0.4, "seed": 1},
    {"alibi_slopes": torch.tensor([0.5, 0.3])},
    {"sinks": torch.tensor([0.5, 0.3])},
    {"mask": torch.eye(5, 7, dtype=torch.bool)},
    {"seqused_k": torch.tensor([5], dtype=torch.int32)},
    {"seqused_q": torch.tensor([3], dtype=torch.int32)},
]


def test_no_flag_is_dropped() -> None:
    """Each option changes the result, and no two of them give the same one."""
    q, k, v = drawn(1, 1, 5, 2, 4), drawn(2, 1, 7, 2, 4), drawn(3, 1, 7, 2, 4)
    results = [attention(q, k, v), *(attention(q, k, v, **flip) for flip in FLIPS)]
    for index, one in enumerate(results):
        for other in results[:index]:
            assert not torch.allclose(one, other)


def test_dropout_is_a_function_of_the_seed() -> None:
    """The same seed gives the same bits and leaves the random state alone; each weight is kept on its own."""
    q, k, v = (drawn(n, 1, 16, 2, 4) for n in (1, 2, 3))
    state = torch.random.get_rng_state()
    first, second = (attention(q, k, v, dropout_p=0.3, seed=-5) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.random.get_rng_state())
    keep = kept(3, 0.3, 2, 4, slice(0, 256), slice(0, 256), torch.device("cpu")).double()
    # 524288 draws: the share has a standard deviation of 0.0006, each row of 256 one of 0.029.
    assert abs(keep.mean() - 0.7) < 0.003
    assert (keep.mean(-1) - 0.7).abs().max() < 0.16
    assert (keep.mean(-2) - 0.7).abs().max() < 0.16
    flat = keep.flatten() - keep.mean()
    for step in (1, 2, 256, 257, 65536):  # neighbours in a row, a column, a head: no correlation
        assert abs((flat[:-step] * flat[step:]).mean() / flat.square().mean()) < 0.01
    part = kept(3, 0.3, 2, 4, slice(10, 20), slice(7, 9), torch.device("cpu"))
    assert torch.equal(part, keep[:, :, 10:20, 7:9].bool())


def test_dropout_scales_what_it_keeps() -> None:
    """Each weight is 0, or 1 / (1 - p) times what it is without dropout; seeds differ in all of their 64 bits."""
    q, k, v = drawn(1, 1, 5, 2, 4), drawn(2, 1, 8, 2, 4), torch.eye(8).double().view(1, 8, 1, 8).expand(1, 8, 2, 8)
    weights = attention(q, k, v)
    results = []
    for seed in (0, 1, 2**32, -1):
        keep = kept(seed, 0.3, 1, 2, slice(0, 5), slice(0, 8), torch.device("cpu")).transpose(1, 2)
        results.append(attention(q, k, v, dropout_p=0.3, seed=seed))
        torch.testing.assert_close(results[-1], weights * keep / 0.7)
    assert not any(torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_dropout_survives_recompute() -> None:
    """Under activation checkpointing the gradients are those without it."""
    q, k, v = (drawn(n, 1, 6, 2, 4).requires_grad_() for n in (1, 2, 3))

    def layer(*x: torch.Tensor) -> torch.Tensor:
        return attention(*x, dropout_p=0.3, seed=11)

    expected = gradients(layer(q, k, v), q, k, v)
    found = gradients(torch.utils.checkpoint.checkpoint(layer, q, k, v, use_reentrant=False), q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast_casts_query_key_and_value_alone() -> None:
    """Inside autocast q, k and v may differ in dtype, as after RoPE in float32; slopes and masks keep theirs."""
    q, k, v = (
        drawn(n, 1, 300, 3, 8, dtype=dtype)
        for n, dtype in ((1, torch.float32), (2, torch.bfloat16), (3, torch.float32))
    )
    slopes = 2.0 ** -torch.arange(0.3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(q, k, v, alibi_slopes=slopes)
    expected = attention(q.bfloat16(), k, v.bfloat16(), alibi_slopes=slopes)
    assert torch.equal(found, expected)
    assert not torch.equal(found, attention(q.bfloat16(), k, v.bfloat16(), alibi_slopes=slopes.bfloat16().float()))


ENDS = torch.tensor([0, 5], dtype=torch.int32)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"layout": "bsd"}, ValueError, "layout='bsd'"),
    ({"causal": "upper"}, ValueError, "causal='upper'"),
    ({"window_left": -2}, ValueError, "window"),
    ({"softcap": -1.0}, ValueError, "softcap"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p=1.0"),
    ({"seed": 2**63}, ValueError, "64 bits"),
    ({"dropout_p": 0.1}, ValueError, "without a seed; pass one that differs in each layer and step"),
    ({"q": drawn(1, 5, 2, 4)}, ValueError, "4 axes"),
    ({"q": drawn(1, 1, 5, 2, 4, dtype=torch.float32)}, TypeError, "one floating-point dtype"),
    ({"q": drawn(1, 1, 5, 3, 4)}, ValueError, "multiple of the second"),
    ({"q": drawn(1, 1, 5, 2, 6)}, ValueError, "one head size"),
    ({"q": drawn(1, 2, 5, 2, 4)}, ValueError, "one batch"),
    ({"v": drawn(1, 1, 4, 2, 4)}, ValueError, "one length"),
    ({"cu_seqlens_q": ENDS}, ValueError, "the other layouts take neither"),
    ({"layout": "thd", "cu_seqlens_q": ENDS}, ValueError, "3 axes|takes cu_seqlens"),
    ({"seqused_k": torch.tensor([1.0])}, TypeError, "give int32"),
    ({"seqused_k": torch.tensor([1, 2])}, ValueError, "one length for each of 1"),
    ({"mask": torch.ones(5, 5, dtype=torch.int64)}, TypeError, "True = keep"),
    ({"mask": torch.ones(5, 6, dtype=torch.bool)}, ValueError, "does not broadcast"),
    ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, "does not broadcast"),
    ({"sinks": torch.zeros(3)}, ValueError, "each of 2 heads"),
    ({"alibi_slopes": torch.zeros(2, 2)}, ValueError, r"give \[2\] or \[1, 2\]"),
    ({"alibi_slopes": torch.zeros(2, requires_grad=True)}, ValueError, "slopes are constants"),
]


@pytest.mark.parametrize(("wrong", "kind", "words"), BAD, ids=lambda x: str(x)[:40])
def test_what_does_not_fit_is_refused(wrong: dict[str, Any], kind: type[Exception], words: str) -> None:
    """Shapes, dtypes and options that do not fit raise an error that says what was found."""
    right = {name: drawn(1, 1, 5, 2, 4) for name in "qkv"}
    with pytest.raises(kind, match=words):
        attention(**(right | wrong))


PACKED = {name: drawn(1, 5, 2, 4) for name in "qkv"} | {"layout": "thd"}


@pytest.mark.parametrize(
    ("ends", "kind", "words"),
    [
        ({}, ValueError, "no cu_seqlens"),
        ({"cu_seqlens_q": ENDS, "cu_seqlens_k": torch.tensor([0, 2, 5])}, ValueError, "same N sequences"),
        ({"cu_seqlens_q": ENDS[:1], "cu_seqlens_k": ENDS[:1]}, ValueError, "at least one"),
        ({"cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS.float()}, TypeError, "give int32"),
    ],
)
def test_cumulative_lengths_that_do_not_fit_are_refused(ends: Any, kind: type[Exception], words: str) -> None:
    """Layout "thd" takes two cumulative lengths, of integers, for the same sequences."""
    with pytest.raises(kind, match=words):
        attention(**PACKED, **ends)


@pytest.mark.parametrize("layout", ["bshd", "sbhd", "bhsd", "thd"])
@pytest.mark.parametrize("lengths", [(5000, 5000), (700, 6000), (6000, 700), (1, 40000)])
def test_a_large_call_is_narrowed_to_one_of_its_kind(layout: str, lengths: tuple[int, int]) -> None:
    """A narrowed call is bounded, keeps whole groups, the rest of lengths modulo 128, and runs."""
    rows, columns = lengths
    q, k = torch.zeros(4, rows, 6, 2), torch.zeros(4, columns, 3, 2)
    extra: dict[str, Any] = {"mask": torch.ones(1, 1, 1, columns, dtype=torch.bool), "sinks": torch.zeros(6)}
    if layout == "thd":
        q, k = q[0], k[0]
        ends = [torch.tensor([0, n // 3, n], dtype=torch.int32) for n in lengths]
        extra |= {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1], "seqused_k": ends[1].diff()}
        extra |= {"alibi_slopes": torch.zeros(2, 6)}
    else:
        q, k = (x.permute(TURNS.get(layout, (0, 1, 2, 3))).contiguous() for x in (q, k))
        extra |= {"alibi_slopes": torch.zeros(4, 6), "seqused_k": torch.full((4,), columns, dtype=torch.int32)}
    call = OP.bind(q, k, k, layout=layout, **extra, max_seqlen_q=rows)
    small = narrowed(call)
    token, head = {"bshd": (1, 2), "sbhd": (0, 2), "bhsd": (2, 1), "thd": (0, 1)}[layout]
    n_q, n_k = small["q"].shape[token], small["k"].shape[token]
    assert small["q"].shape[head] == 2 * small["k"].shape[head]
    assert n_q * n_k * small["q"].shape[head] <= 2**23
    assert ((rows - n_q) % 128, (columns - n_k) % 128) == (0, 0)
    assert (n_q == n_k) == (rows == columns)
    assert n_q * n_k > 2**21 or (n_q, n_k) == lengths, "no smaller than it must be"
    small = small | {
        name: value.narrow(token, 0, min(64, value.shape[token])) for name, value in small.items() if name == "q"
    }
    run_op(OP, REFERENCE, small | {"seqused_q": None})


@pytest.mark.parametrize("number", [2, 60])
def test_a_narrowed_packed_call_still_has_several_sequences(number: int) -> None:
    """A few long sequences become shorter ones; of many short ones the first are taken as they are."""
    tokens = 20 * 1001
    ends = torch.linspace(0, tokens, number + 1).int()
    zeros = torch.zeros(tokens, 1, 2)
    used = {"seqused_q": ends.diff() - 3, "seqused_k": ends.diff() - 3}
    longest = {"max_seqlen_q": int(ends.diff().max()), "max_seqlen_k": int(ends.diff().max())}
    small = narrowed(OP.bind(zeros, zeros, zeros, ends, ends, **used, **longest, layout="thd"))
    lengths = small["cu_seqlens_q"].diff()
    assert small["q"].shape[0] < tokens
    assert int(small["cu_seqlens_q"][-1]) <= small["q"].shape[0]
    assert torch.equal(small["cu_seqlens_q"], small["cu_seqlens_k"])
    assert (lengths > 100).sum() >= 2
    assert (small["seqused_q"] <= lengths).all()
    assert lengths.max() <= small["max_seqlen_q"] <= lengths.max() + 1
    assert torch.equal(lengths[0], ends.diff()[0]) == (number == 60)
