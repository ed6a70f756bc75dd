"""Packed sequences over the simulated NPU: layout TND, its statistics and modes, query_rope, the merge of a ring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.simulators.npu_attention_checks import attend, causal_mask, npu, numbers, packed, seen
from tests.simulators.npu_checks import FLOATS, agrees, close, refuses, said_on

pytestmark = pytest.mark.simulator("npu")

N, G, D = 4, 2, 16
SCALE = 0.3
ENDS_Q, ENDS_K = [3, 7, 9], [5, 9, 14]


def _qkv(queries: int = 9, keys: int = 14, size: int = D) -> list[torch.Tensor]:
    return [numbers(queries, N, size), numbers(keys, G, size, seed=1), numbers(keys, G, size, seed=2)]


def _call(version: str = "", ends_q: Any = None, ends_k: Any = None, **options: Any) -> Callable[..., torch.Tensor]:
    ends = ends_q or ENDS_Q, ends_k or ENDS_K
    if version == "_v3":
        ends = tuple(torch.tensor(end) for end in ends)  # on the host

    def operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        there = {name: x.npu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        function = getattr(npu(), f"npu_fusion_attention{version}")
        there = {"actual_seq_qlen": ends[0], "actual_seq_kvlen": ends[1], "scale": SCALE} | there
        out: torch.Tensor = function(q, k, v, N, "TND", **there)[0]
        return out

    return operator


def _causal(mode: int) -> Callable[[int, int, int], torch.Tensor]:
    return lambda index, rows, keys: seen(rows, keys, lambda i, j: j <= i + (keys - rows if mode == 3 else 0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("version", ["", "_v2", "_v3"])
def test_packed_sequences(version: str, dtype: torch.dtype) -> None:
    """Sequences do not see each other; lengths are ends without a leading zero, tensors of the host in v3."""
    agrees(_call(version), packed(ENDS_Q, ENDS_K, scale=SCALE), _qkv(), dtype)


@pytest.mark.parametrize("softmax_layout", ["", "TND"])
@pytest.mark.parametrize("mode", [2, 3])
def test_causal(mode: int, softmax_layout: str) -> None:
    """Modes 2 and 3 of each sequence, with statistics in both layouts, which the gradients read."""
    operator = _call(atten_mask=causal_mask(), sparse_mode=mode, softmax_layout=softmax_layout)
    agrees(operator, packed(ENDS_Q, ENDS_K, scale=SCALE, keep=_causal(mode)), _qkv(), torch.float32)


def test_one_mask_for_all_sequences() -> None:
    """Modes 0 and 1 take [longest S, longest K], of which each sequence uses the upper left part."""
    hide = numbers(4, 5) > 0.5
    hide[:, 0] = False
    formula = packed(ENDS_Q, ENDS_K, scale=SCALE, keep=lambda index, rows, keys: ~hide[:rows, :keys])
    for mode in (0, 1):
        agrees(_call(atten_mask=hide, sparse_mode=mode), formula, _qkv(), torch.float32)


def test_band_and_prefix() -> None:
    """Mode 4 counts from the bottom right of each sequence; mode 6 has a prefix of each."""
    band = lambda index, rows, keys: seen(rows, keys, lambda i, j: -3 <= j - i - (keys - rows) <= 1)  # noqa: E731
    operator = _call(atten_mask=causal_mask(), sparse_mode=4, pre_tockens=3, next_tockens=1)
    agrees(operator, packed(ENDS_Q, ENDS_K, scale=SCALE, keep=band), _qkv(), torch.float32)
    prefix = [4, 1, 5]
    keep = lambda index, rows, keys: seen(rows, keys, lambda i, j: j <= i + keys - rows or j < prefix[index])  # noqa: E731
    small = torch.zeros(1024, 2048, dtype=torch.bool)
    small[:, 1024:] = True
    operator = _call(atten_mask=torch.cat([causal_mask(), small]), sparse_mode=6, prefix=prefix)
    agrees(operator, packed(ENDS_Q, ENDS_K, scale=SCALE, keep=keep), _qkv(), torch.float32)


def test_queries_cut_off_at_the_end() -> None:
    """Mode 7: the first part of the last sequence's queries, of a causal call at the bottom right."""
    ends_q, ends_k = [3, 5], [3, 9]  # of 4 queries and 6 keys the first two queries
    keep = lambda index, rows, keys: seen(rows, keys, lambda i, j: j <= i + (2 if index else 0))  # noqa: E731
    operator = _call("", ends_q, ends_k, atten_mask=causal_mask(), sparse_mode=7, pre_tockens=6, next_tockens=-2)
    agrees(operator, packed(ends_q, ends_k, scale=SCALE, keep=keep), _qkv(5, 9), torch.float32)


def test_queries_cut_off_at_the_beginning() -> None:
    """Mode 8: the last part of the first sequence's queries, of a causal call at the top left."""
    ends_q, ends_k = [3, 8], [4, 9]  # of 5 queries and 4 keys the last three queries
    keep = lambda index, rows, keys: seen(rows, keys, lambda i, j: j <= i + (0 if index else 2))  # noqa: E731
    operator = _call("", ends_q, ends_k, atten_mask=causal_mask(), sparse_mode=8, pre_tockens=4, next_tockens=1)
    agrees(operator, packed(ends_q, ends_k, scale=SCALE, keep=keep), _qkv(8, 9), torch.float32)


def test_empty_sequences() -> None:
    """A repeated end is a sequence without tokens; keys that no query has get no gradient."""
    agrees(_call("", [3, 3, 9], [5, 9, 14]), packed([3, 3, 9], [5, 9, 14], scale=SCALE), _qkv(), torch.float32)


def test_zeros_at_the_end_leave_sequences_out() -> None:
    """[3, 7, 0] computes the first two sequences only."""
    q, k, v = (x.npu() for x in _qkv())
    found = _call("", [3, 7, 0], [5, 9, 0])(q, k, v)
    assert torch.equal(found[:7], _call()(q, k, v)[:7])


@pytest.mark.parametrize("version", ["", "_v2", "_v3"])
def test_statistics_stand_by_sequence(version: str) -> None:
    """Their shape says [T, N, 8], and by default they stand as [N, S, 8] of each sequence."""
    q, k, v = _qkv()
    ends = [torch.tensor(end) if version == "_v3" else end for end in (ENDS_Q, ENDS_K)]
    options = {"scale": SCALE, "actual_seq_qlen": ends[0], "actual_seq_kvlen": ends[1]}
    function = getattr(npu(), f"npu_fusion_attention{version}")
    there = [x.npu() for x in (q, k, v)]
    call = lambda layout: function(*there, N, "TND", softmax_layout=layout, **options)[1:3]  # noqa: E731
    by_sequence: list[list[torch.Tensor]] = [[], []]
    for first, end, first_key, end_key in zip([0, *ENDS_Q], ENDS_Q, [0, *ENDS_K], ENDS_K, strict=False):
        one = (
            x[i:j].transpose(0, 1).double()
            for x, i, j in ((q, first, end), (k, first_key, end_key), (v, first_key, end_key))
        )
        for found, statistic in zip(by_sequence, attend(*one, SCALE)[1:], strict=True):
            found.append(statistic.expand(-1, -1, 8))
    for found, expected in zip(call(""), by_sequence, strict=True):
        assert found.shape == (9, N, 8)
        close(found.view(-1, 8), torch.cat([x.reshape(-1, 8) for x in expected]))
    if version == "_v2":  # torch_npu drops the layout there unless there is a sink
        assert torch.equal(call("TND")[0], call("")[0])
        return
    for found, expected in zip(call("TND"), by_sequence, strict=True):
        close(found, torch.cat([x.transpose(0, 1) for x in expected]))


def _rope_formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, qr: torch.Tensor, kr: torch.Tensor
) -> torch.Tensor:
    return packed(ENDS_Q, ENDS_K, scale=SCALE, keep=_causal(3))(torch.cat([q, qr], -1), torch.cat([k, kr], -1), v)


def test_rope_parts() -> None:
    """query_rope and key_rope add their product to the scores, and have gradients."""
    mask = causal_mask()

    def operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, qr: torch.Tensor, kr: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = npu().npu_fusion_attention_v2(
            q, k, v, N, "TND", query_rope=qr, key_rope=kr, atten_mask=mask.npu(), sparse_mode=3, scale=SCALE,
            actual_seq_qlen=ENDS_Q, actual_seq_kvlen=ENDS_K,
        )[0]  # fmt: skip
        return out

    tensors = [*_qkv(), numbers(9, N, 8, seed=3), numbers(14, G, 8, seed=4)]
    agrees(operator, _rope_formula, tensors, torch.bfloat16)


ROPE_REFUSED: dict[str, tuple[dict[str, Any], int, torch.dtype, str]] = {
    "no mask": ({}, 8, torch.bfloat16, "layout TND and a mask"),
    "float16": ({"atten_mask": causal_mask(), "sparse_mode": 3}, 8, torch.float16, "takes bfloat16"),
    "head size": ({"atten_mask": causal_mask(), "sparse_mode": 3}, 4, torch.bfloat16, "a multiple of 8"),
    "dropout": ({"atten_mask": causal_mask(), "sparse_mode": 3, "keep_prob": 0.5}, 8, torch.bfloat16, "no dropout"),
}


@pytest.mark.parametrize("name", ROPE_REFUSED)
def test_limits_of_rope_parts(name: str) -> None:
    """They take packed bfloat16 with a mask, head sizes in steps of 8, and no dropout."""
    options, size, dtype, text = ROPE_REFUSED[name]
    parts = {"query_rope": numbers(9, N, size).to(dtype), "key_rope": numbers(14, G, size).to(dtype)}
    with refuses(text):
        _call("_v2", **options, **parts)(*(x.to(dtype).npu() for x in _qkv()))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ends that fall": ({"ends_q": [5, 3, 9]}, "cumulative ends"),
    "ends that stop early": ({"ends_q": [3, 7, 8]}, "end at 8, and there are 9 tokens"),
    "queries without keys": ({"ends_k": [5, 5, 14]}, "4 queries and no keys"),
    "a mask of four axes": ({"atten_mask": torch.zeros(1, 1, 4, 5, dtype=torch.bool)}, "packed sequences take .S, K."),
    "mode 5": ({"sparse_mode": 5}, "sparse_mode"),
    "pse of mode 7": (
        {"sparse_mode": 7, "atten_mask": causal_mask(), "pse": torch.zeros(1, N, 1024, 1024)},
        "sparse_mode 7 takes no pse",
    ),
    "pse of an empty sequence": (
        {"ends_q": [3, 3, 9], "pse": torch.zeros(1, N, 1024, 1024)},
        "no sequence may be empty",
    ),
    "an ordinary pse": ({"pse": torch.zeros(1, N, 4, 5)}, "compressed only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_limits(name: str) -> None:
    """What the documents refuse of packed sequences."""
    options, text = REFUSED[name]
    with refuses(text):
        _call(**options)(*(x.npu() for x in _qkv()))


def test_many_sequences() -> None:
    """Up to 2K of them are taken."""
    q, k, v = (torch.zeros(2049, N, 8).npu() for _ in range(3))
    ends = list(range(1, 2050))
    with refuses("up to 2K sequences"):
        npu().npu_fusion_attention(q, k, v, N, "TND", actual_seq_qlen=ends, actual_seq_kvlen=ends)


def test_no_row_without_keys() -> None:
    """A packed query that sees no key is an error of the kernel."""
    code = """
q, k = torch.zeros(3, 4, 8).npu(), torch.zeros(2, 4, 8).npu()
mask = torch.ones(2048, 2048).triu(1).bool().npu()
outcome(lambda: torch_npu.npu_fusion_attention(q, k, k, 4, "TND", atten_mask=mask, sparse_mode=3,
                                               actual_seq_qlen=[3], actual_seq_kvlen=[2]))
"""
    assert "packed sequences take no query that sees no key" in said_on("Ascend910B3", code)


def _halves(layout: str, softmax_layout: str, size: int, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Attention of the same queries to two parts of the keys, and to all."""
    rows = 6
    shape = lambda n, s: (s, n, size) if layout == "TND" else (s, 1, n * size)  # noqa: E731
    q, k, v = (numbers(*shape(n, s), seed=i).to(dtype).npu() for i, (n, s) in enumerate(((N, rows), (N, 8), (N, 8))))
    results = []
    for part in (slice(0, 5), slice(5, 8), slice(0, 8)):
        keys = part.stop - part.start
        ends = {"actual_seq_qlen": [rows], "actual_seq_kvlen": [keys]} if layout == "TND" else {}
        options = {"scale": SCALE, "softmax_layout": softmax_layout} | ends
        keys_of_part, values_of_part = k[part].contiguous(), v[part].contiguous()
        results.append(list(npu().npu_fusion_attention(q, keys_of_part, values_of_part, N, layout, **options)[:3]))
    return results


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("layout", "softmax_layout"), [("SBH", ""), ("TND", ""), ("TND", "TND")])
def test_ring_update(layout: str, softmax_layout: str, dtype: torch.dtype) -> None:
    """Two parts merged are attention to all keys, with its statistics."""
    first, second, whole = _halves(layout, softmax_layout, 64, dtype)
    lengths = torch.tensor([0, 6]).npu() if layout == "TND" else None
    found = npu().npu_ring_attention_update(
        *first, *second, actual_seq_qlen=lengths, input_layout=layout, input_softmax_layout=softmax_layout
    )
    for one, expected in zip(found, whole, strict=True):
        assert one.dtype == expected.dtype
        close(one.to(dtype), expected.cpu().double())


def test_limits_of_ring_update() -> None:
    """Packed, it takes head sizes in steps of 64."""
    first, second, _ = _halves("TND", "", 48, torch.float32)
    with refuses("in steps of 64"):
        npu().npu_ring_attention_update(*first, *second, actual_seq_qlen=torch.tensor([0, 6]).npu(), input_layout="TND")


def test_gradient_takes_the_statistics_of_all_keys() -> None:
    """The gradients of two parts, with the output and statistics of the whole, make that of the whole."""
    q, k, v, dy = (numbers(1, N, s, D, seed=i) for i, s in enumerate((6, 8, 8, 6)))
    here = [x.double().requires_grad_() for x in (q, k, v)]
    attend(*(x[0] for x in here), SCALE)[0].backward(dy[0].double())
    out, top, total, *_ = npu().npu_fusion_attention(q.npu(), k.npu(), v.npu(), N, "BNSD", scale=SCALE)
    dq = torch.zeros_like(q)
    for part in (slice(0, 5), slice(5, 8)):
        found = npu().npu_fusion_attention_grad(
            q.npu(), k[:, :, part].npu(), v[:, :, part].npu(), dy.npu(), N, "BNSD", softmax_max=top, softmax_sum=total,
            attention_in=out, scale_value=SCALE,
        )  # fmt: skip
        dq += found[0].cpu()
        close(found[1], here[1].grad[:, :, part])
        close(found[2], here[2].grad[:, :, part])
    close(dq, here[0].grad)
