"""decode_attention: a KV cache, contiguous or in pages, gives what attention gives on the keys that are in it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_adapt.ops.attention import attention
from llm_adapt.ops.attention_parts.narrowing import narrowed_cache
from llm_adapt.ops.decode_attention import decode_attention
from llm_adapt.ops.dispatch.registry import find_op, load_library
from tests.ops.attention_loop import attention_loop, drawn

OP = find_op("decode_attention")


def ints(*numbers: Any) -> torch.Tensor:
    """int32 numbers."""
    return torch.tensor(numbers, dtype=torch.int32)


def paged(
    caches: list[torch.Tensor], lengths: list[int], size: int, fill: float
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The same caches in pages, shuffled, with what is behind the lengths set to `fill`; and the table."""
    batch, tokens = caches[0].shape[:2]
    each = -(-tokens // size)
    order = torch.randperm(batch * each + 1, generator=torch.Generator().manual_seed(3))
    pools = []
    for cache in caches:
        pool = torch.full((batch * each + 1, size, *cache.shape[2:]), fill, dtype=cache.dtype)
        for b, length in enumerate(lengths):
            for t in range(length):
                pool[order[b * each + t // size], t % size] = cache[b, t]
        pools.append(pool)
    table = order[: batch * each].view(batch, each).to(torch.int32)
    for b, length in enumerate(lengths):
        table[b, -(-length // size) :] = -7
    return pools, table


@st.composite
def options(draw: Any) -> dict[str, Any]:
    """Options and per-head tensors of four heads."""
    found: dict[str, Any] = {
        "causal": draw(st.sampled_from(["none", "bottom_right"])),
        "window_left": draw(st.integers(-1, 4)),
        "window_right": draw(st.integers(-1, 2)),
        "scale": draw(st.sampled_from([None, 0.3])),
        "softcap": draw(st.sampled_from([0.0, 2.0])),
    }
    if draw(st.booleans()):
        found["alibi_slopes"] = 0.5 ** torch.arange(1, 5).double()
    if draw(st.booleans()):
        found["sinks"] = drawn(8, 4)
    return found


@given(options(), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 3), st.sampled_from([1, 2, 4]))
def test_a_cache_gives_what_its_keys_give(chosen: dict[str, Any], lengths: list[int], rows: int, groups: int) -> None:
    """Contiguous and paged, some new tokens or one: the loop's result on the first cache_seqlens keys of each entry.

    What is behind them is NaN here, and page numbers there are nonsense.
    """
    batch = len(lengths)
    q = drawn(1, batch, rows, 4, 5)
    k, v = drawn(2, batch, 9, groups, 5), drawn(3, batch, 9, groups, 3)
    (k_pages, v_pages), table = paged([k, v], lengths, 4, math.nan)
    for b, length in enumerate(lengths):
        k[b, length:], v[b, length:] = math.nan, math.nan
    found = decode_attention(q, k, v, ints(*lengths), return_lse=True, **chosen)
    in_pages = decode_attention(q, k_pages, v_pages, ints(*lengths), table, return_lse=True, **chosen)
    for b, length in enumerate(lengths):
        expected = attention_loop(q[b], k[b, :length], v[b, :length], **chosen)
        for out, lse in (found, in_pages):
            torch.testing.assert_close(out[b], expected[0])
            torch.testing.assert_close(lse[b], expected[1])


def test_decoding_step_by_step_is_attention_of_the_whole() -> None:
    """Feeding a sequence in pieces of 1, 3 and 4 tokens gives causal attention of the whole."""
    q, k, v = drawn(1, 2, 8, 4, 8), drawn(2, 2, 8, 2, 8), drawn(3, 2, 8, 2, 8)
    whole = attention(q, k, v, causal="bottom_right", window_left=5)
    at = 0
    for size in (1, 3, 4):
        piece = decode_attention(q[:, at : at + size], k, v, ints(at + size, at + size), window_left=5)
        torch.testing.assert_close(piece, whole[:, at : at + size])
        at += size


def test_entries_are_found_by_index_and_left_padding_is_not_seen() -> None:
    """cache_batch_idx names the entry of each batch entry; keys before cache_leftpad are as if they were not there."""
    q, k, v = drawn(1, 2, 2, 4, 8), drawn(2, 3, 9, 2, 8), drawn(3, 3, 9, 2, 8)
    k[2, :3], v[2, :3] = math.nan, math.nan
    slopes = drawn(4, 2, 4).abs()
    found = decode_attention(
        q, k, v, ints(7, 9), cache_batch_idx=ints(2, 0), cache_leftpad=ints(3, 0), alibi_slopes=slopes
    )
    torch.testing.assert_close(
        found[0], attention_loop(q[0], k[2, 3:7], v[2, 3:7], causal="bottom_right", alibi_slopes=slopes[0])[0]
    )
    torch.testing.assert_close(
        found[1], attention_loop(q[1], k[0], v[0], causal="bottom_right", alibi_slopes=slopes[1])[0]
    )


SCALES = {"head": (2,), "channel": (2, 8), "token": (3, 9, 1), "token_and_head": (3, 9, 2)}


@pytest.mark.parametrize("is_paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("kind", SCALES)
def test_a_quantised_cache_is_multiplied_by_its_scales(kind: str, dtype: torch.dtype, is_paged: bool) -> None:
    """int8 and float8 caches with scales by head, channel, token, or token and head: as the multiplied cache."""
    raw = [torch.randint(-100, 100, (3, 9, 2, 8), generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 2)]
    scales = [drawn(n, *SCALES[kind], dtype=torch.float32).abs() / 50 for n in (3, 4)]
    lengths = [9, 4, 1]
    q = drawn(5, 3, 1, 4, 8, dtype=torch.bfloat16)
    wide = [x.float() * (s[..., None] if s.ndim != 2 else s) for x, s in zip(raw, scales, strict=True)]
    expected = decode_attention(q.float(), *wide, ints(*lengths)).bfloat16()
    table = None
    if is_paged:
        raw, table = paged(raw, lengths, 4, 0)
        scales = paged(scales, lengths, 4, 0)[0] if scales[0].ndim == 3 else scales
    found = decode_attention(q, *raw, ints(*lengths), table, *scales)
    assert torch.equal(found, expected)


def test_no_flag_is_dropped() -> None:
    """Each option and each optional tensor changes the result, and no two give the same one."""
    q, k, v = drawn(1, 2, 2, 2, 4), drawn(2, 2, 7, 2, 4), drawn(3, 2, 7, 2, 4)
    flips: list[dict[str, Any]] = [
        {"causal": "none"}, {"window_left": 1}, {"window_right": 0, "causal": "none", "window_left": 3}, {"scale": 0.7},
        {"softcap": 0.5}, {"alibi_slopes": torch.tensor([0.5, 0.3])}, {"sinks": torch.tensor([0.5, 0.3])},
        {"k_scale": torch.tensor([2.0, 3.0])}, {"v_scale": torch.tensor([2.0, 3.0])}, {"cache_batch_idx": ints(1, 0)},
        {"cache_leftpad": ints(2, 1)}, {"cache_seqlens": ints(4, 5)},
    ]  # fmt: skip
    results = [decode_attention(q, k, v, **({"cache_seqlens": ints(6, 7)} | flip)) for flip in [{}, *flips]]
    for index, one in enumerate(results):
        for other in results[:index]:
            assert not torch.allclose(one, other)


RIGHT: dict[str, Any] = {
    "q": drawn(1, 2, 1, 4, 8),
    "k_cache": drawn(2, 2, 6, 2, 8),
    "v_cache": drawn(3, 2, 6, 2, 8),
    "cache_seqlens": ints(3, 6),
}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"causal": "top_left"}, ValueError, "stand at the end"),
    ({"window_right": -3}, ValueError, "window"),
    ({"q": drawn(1, 2, 1, 4, 7)}, ValueError, "do not fit"),
    ({"q": drawn(1, 2, 1, 3, 8)}, ValueError, "multiple of the second"),
    ({"q": torch.zeros(2, 1, 4, 8, dtype=torch.int8)}, TypeError, "floating-point"),
    ({"q": drawn(1, 3, 1, 4, 8), "cache_seqlens": ints(1, 2, 3)}, ValueError, "a batch of 3"),
    ({"cache_seqlens": ints(3)}, ValueError, "cache_seqlens is"),
    ({"cache_seqlens": torch.ones(2)}, TypeError, "give int32"),
    ({"block_table": ints(0, 1)}, ValueError, "block_table is"),
    ({"block_table": ints([0], [1]), "cache_batch_idx": ints(0, 1)}, ValueError, "the table says both"),
    ({"k_cache": torch.zeros(2, 6, 2, 8, dtype=torch.int8)}, ValueError, "k_scale was not given"),
    ({"v_cache": torch.zeros(2, 6, 2, 8)}, TypeError, "one dtype, or a scale"),
    ({"v_scale": torch.zeros(3)}, ValueError, "v_scale is"),
    ({"sinks": torch.zeros(2)}, ValueError, "each of 4 heads"),
    ({"alibi_slopes": torch.zeros(3, 4)}, ValueError, "alibi_slopes is"),
]


@pytest.mark.parametrize(("wrong", "kind", "words"), BAD, ids=lambda x: str(x)[:40])
def test_what_does_not_fit_is_refused(wrong: dict[str, Any], kind: type[Exception], words: str) -> None:
    """Shapes, dtypes and options that do not fit raise an error that says what was found."""
    decode_attention(**RIGHT)
    with pytest.raises(kind, match=words):
        decode_attention(**(RIGHT | wrong))


@pytest.mark.parametrize("number", range(11))
def test_a_narrowed_call_has_the_results_of_its_part(number: int) -> None:
    """Narrowing takes the first two batch entries and groups with their own keys, in pages that are shuffled anew."""
    arguments = OP.bind(**list(OP.inputs(torch.Generator().manual_seed(0), torch.float64))[number])
    small = narrowed_cache(arguments)
    assert {name for name in small if small[name] is None} == {name for name in arguments if arguments[name] is None}
    expected, found = (OP.reference(**x) for x in (arguments, small))
    expected, found = (x[0] if isinstance(x, tuple) else x for x in (expected, found))
    assert torch.equal(found, expected[:2])


def test_a_huge_cache_is_narrowed_to_a_small_one() -> None:
    """Of a pool of many pages only those of two batch entries, at most 2^23 elements, are taken."""
    pool = torch.empty(1, 16, 1, 64).expand(100_000, 16, 8, 64)
    table = torch.zeros(64, 8192, dtype=torch.int32)
    lengths = torch.full((64,), 8192 * 16, dtype=torch.int32)
    small = narrowed_cache(OP.bind(torch.zeros(64, 1, 32, 64), pool, pool, lengths, table))
    assert small["k_cache"].numel() <= 2**23
    assert small["q"].shape[2] == 4 * small["k_cache"].shape[2]
    assert int(small["cache_seqlens"][0]) == small["block_table"].shape[1] * 16


@given(options(), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 3), st.sampled_from([1, 2, 4]))
def test_torchs_kernel_gives_what_the_reference_gives(
    chosen: dict[str, Any], lengths: list[int], rows: int, groups: int
) -> None:
    """scaled_dot_product_attention on contiguous and paged caches with NaN behind the lengths, which may be 0."""
    assert load_library("torch_native") == ""
    function = OP.kernels["torch_native"].function
    chosen = {name: value for name, value in chosen.items() if name in OP.kernels["torch_native"].honours}
    batch = len(lengths)
    q, k, v = drawn(1, batch, rows, 4, 5), drawn(2, batch, 9, groups, 5), drawn(3, batch, 9, groups, 3)
    (k_pages, v_pages), table = paged([k, v], lengths, 4, math.nan)
    expected = decode_attention(q, k, v, ints(*lengths), **chosen)
    for b, length in enumerate(lengths):
        k[b, length:], v[b, length:] = math.nan, math.nan
    torch.testing.assert_close(function(q, k, v, ints(*lengths), **chosen), expected)
    torch.testing.assert_close(function(q, k_pages, v_pages, ints(*lengths), table, **chosen), expected)
