"""What torch_npu documents of npu_fusion_attention, in float64, one sequence at a time.

Letters: N = query heads, M = key heads, S = queries, K = keys, D = head size, V = head size of values, T = all rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from tests.contracts.recording import demand

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
COMPRESSED = 2048  # modes 2, 3, 4: one fixed mask whatever the lengths are
NOT_DOCUMENTED = 12345.0  # what a row without keys holds: anything


class _Sequence(NamedTuple):
    """One sequence: float64 tensors [N, S, D], its row range in the packed tensors, its place in the batch."""

    batch: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def _bnsd(x: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    if layout in ("BSH", "SBH"):
        demand(x.ndim == 3 and x.shape[-1] % heads == 0, f"layout {layout} takes three axes, H divisible by heads")
        x = x.unflatten(-1, (heads, -1))
        layout = "BSND" if layout == "BSH" else "SBND"
    demand(x.ndim == 4, f"layout {layout} takes four axes")
    return x.permute({"BSND": (0, 2, 1, 3), "BNSD": (0, 1, 2, 3), "SBND": (1, 2, 0, 3)}[layout])


def _from_bnsd(x: torch.Tensor, layout: str) -> torch.Tensor:
    order = {"BSND": (0, 2, 1, 3), "BSH": (0, 2, 1, 3), "BNSD": (0, 1, 2, 3), "SBH": (2, 0, 1, 3)}[layout]
    x = x.permute(order)
    return x.flatten(-2) if layout in ("BSH", "SBH") else x


def _ranges(ends: Any, total: int, name: str) -> list[tuple[int, int]]:
    demand(isinstance(ends, (list, tuple)) and len(ends) > 0, f"{name} must be a list of cumulative ends on the host")
    demand(list(ends) == sorted(ends) and ends[-1] == total, f"{name}={list(ends)} does not rise to {total}")
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _heads_of_key(key: torch.Tensor, query: torch.Tensor, head_num: int, layout: str) -> int:
    if layout in ("BSH", "SBH"):
        return key.shape[-1] // (query.shape[-1] // head_num)
    return key.shape[{"BSND": 2, "BNSD": 1, "TND": 1}[layout]]


def _sequences(query: Any, key: Any, value: Any, a: dict[str, Any]) -> Iterator[_Sequence]:
    """The sequences of a call, checked."""
    layout, heads = a["input_layout"], a["head_num"]
    demand(layout in ("BSH", "SBH", "BSND", "BNSD", "TND"), f"input_layout={layout!r}")
    demand(query.dtype == key.dtype == value.dtype and query.dtype in FLOATS, "q, k, v have one dtype of 16 or 32 bits")
    wide = [t.double() for t in (query, key, value)]
    if layout == "TND":
        queries = _ranges(a["actual_seq_qlen"], query.shape[0], "actual_seq_qlen")
        keys = _ranges(a["actual_seq_kvlen"], key.shape[0], "actual_seq_kvlen")
        leading = queries[0][1] == 0 and keys[0][1] == 0
        demand(not leading, "both lists start with 0: the cumulative lists have no leading zero")
        demand(len(queries) == len(keys), "actual_seq_qlen and actual_seq_kvlen have different lengths")
        demand(a["pse"] is None or all(e > s for s, e in queries + keys), "with pse no sequence may be empty")
        for (s, e), (ks, ke) in zip(queries, keys, strict=True):
            demand(e == s or ke > ks, "a sequence with queries and no keys is not supported")
            yield _Sequence(
                0, *(t[i:j].transpose(0, 1) for t, i, j in zip(wide, (s, ks, ks), (e, ke, ke), strict=True))
            )
        return
    key_heads = _heads_of_key(key, query, heads, layout)
    q, k, v = (_bnsd(t, layout, n) for t, n in zip(wide, (heads, key_heads, key_heads), strict=True))
    a["batch"] = q.shape[0]
    for batch in range(q.shape[0]):
        yield _Sequence(batch, q[batch], k[batch], v[batch])


def _check(one: _Sequence, heads: int) -> None:
    n, _, d = one.q.shape
    demand(n == heads and n <= 256, f"head_num={heads} and the query has {n} heads, at most 256")
    demand(n % one.k.shape[0] == 0 and one.k.shape[0] == one.v.shape[0], "query heads must divide by key heads")
    demand(one.k.shape[-1] == d and one.v.shape[-1] <= d <= 768, "head sizes: q = k >= v, at most 768")
    demand(d % 16 == 0 and one.v.shape[-1] % 16 == 0, f"head size {d} is no multiple of 16, where ports lost precision")


def _keep(one: _Sequence, a: dict[str, Any], pre: int, after: int) -> torch.Tensor:
    """[N or 1, S, K], True = attended."""
    size, keys = one.q.shape[1], one.k.shape[1]
    row, column = torch.arange(size)[:, None], torch.arange(keys)[None]
    mode, mask = a["sparse_mode"], a["atten_mask"]
    demand(mode in (0, 1, 2, 3, 4), f"sparse_mode={mode} is not faked")
    if mask is None:  # the mode and the tokens are ignored then: full attention
        return torch.ones(1, size, keys, dtype=torch.bool)
    demand(mask.dtype in (torch.bool, torch.uint8), "atten_mask is bool or uint8")
    if mode in (2, 3, 4):
        fixed = torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu(1)
        demand(
            torch.equal(mask.bool(), fixed), f"sparse_mode {mode} takes the compressed mask triu(ones(2048, 2048), 1)"
        )
        offset = 0 if mode == 2 else keys - size
        if mode == 4:
            return ((column >= row + offset - pre) & (column <= row + offset + after))[None]
        return (column <= row + offset)[None]
    demand(a["input_layout"] != "TND" or mask.ndim == 2, "TND takes a mask of two axes")
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    demand(
        mask.ndim in (2, 4) and shape[2:] == (size, keys), f"atten_mask {list(mask.shape)} is not [.., {size}, {keys}]"
    )
    if mask.ndim == 4:
        fits = shape[:2] in ((a["batch"], a["head_num"]), (a["batch"], 1), (1, 1))
        demand(fits, f"atten_mask {list(shape)} is none of BNSS, B1SS, 11SS, SS")
    kept = ~mask.bool().reshape(shape)[one.batch if shape[0] > 1 else 0]
    if mode == 0:
        band = ((column >= row - pre) & (column <= row + after))[None]
        demand(bool((kept <= band).all()), "sparse_mode 0: the mask must agree with pre_tockens and next_tockens")
    return kept


def _bias(one: _Sequence, pse: torch.Tensor | None, kind: int, dtype: torch.dtype) -> torch.Tensor | float:
    demand(kind in (0, 1, 2), "pse_type 3 is not faked")
    if pse is None:
        return 0.0
    n, size, keys = one.q.shape[0], one.q.shape[1], one.k.shape[1]
    if kind == 2:  # ALiBi made by the kernel
        demand(pse.dtype == torch.float32 and pse.shape[-1] == n and pse.ndim <= 2, "slopes are float32 [N] or [B, N]")
        demand(size == keys, "pse_type 2 takes equal lengths")
        slopes = (pse if pse.ndim == 1 else pse[one.batch]).double()[:, None, None]
        return -slopes * (torch.arange(size)[:, None] - torch.arange(keys)).abs()
    demand(pse.dtype == dtype and pse.ndim == 4, "pse has four axes and the dtype of q")
    demand(
        pse.shape[1] == n and pse.shape[2] in (1, size) and pse.shape[3] == keys, f"pse {list(pse.shape)}: BNSS, BN1S"
    )
    return pse.double()[one.batch if pse.shape[0] > 1 else 0]


def _scores(one: _Sequence, a: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked scores [N, S, K] and whether a row has a key [N, S, 1]."""
    demand(a["keep_prob"] == 1.0 and a["prefix"] is None and a["padding_mask"] is None, "only keep_prob=1 is faked")
    demand(a.get("query_rope") is None and a.get("dropout_mask") is None, "query_rope and dropout_mask are not faked")
    _check(one, a["head_num"])
    k = one.k.repeat_interleave(one.q.shape[0] // one.k.shape[0], 0)
    kind, scale = a.get("pse_type", 1), a["scale"]
    product, bias = one.q @ k.transpose(-1, -2), _bias(one, a["pse"], kind, dtype)
    scores = scale * (product + bias) if kind == 1 else scale * product + bias
    pre, after = (a.get(f"{name}_tockens", a.get(f"{name}_tokens")) for name in ("pre", "next"))
    keep = _keep(one, a, pre, after).expand_as(scores)
    return scores.masked_fill(~keep, -math.inf), keep.any(-1, keepdim=True)


def _attend(one: _Sequence, a: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores, has_key = _scores(one, a, dtype)
    demand(a["input_layout"] != "TND" or bool(has_key.all()), "TND: a row is masked as a whole")
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:2], 1), -1e38)
    top = torch.where(has_key, top, torch.finfo(torch.float32).min)
    if a["sink"] is not None:
        demand(a["sink"].dtype == torch.float32 and a["sink"].shape == (a["head_num"],), "sink is float32 [head_num]")
        sink = a["sink"].double()[:, None, None]
        top = torch.maximum(top, sink.detach())
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True) + ((sink - top).exp() if a["sink"] is not None else 0.0)
    v = one.v.repeat_interleave(one.q.shape[0] // one.v.shape[0], 0)
    out = weights / torch.where(total > 0, total, 1.0) @ v
    empty = 0.0 if a["inner_precise"] == 2 else NOT_DOCUMENTED
    return torch.where(has_key, out, empty), top, total


def _forward(query: Any, key: Any, value: Any, a: dict[str, Any]) -> Any:
    outs, tops, totals = [], [], []
    for one in _sequences(query, key, value, a):
        out, top, total = _attend(one, a, query.dtype)
        outs.append(out), tops.append(top), totals.append(total)
    packed = a["input_layout"] == "TND"
    out = torch.cat([o.transpose(0, 1) for o in outs]) if packed else _from_bnsd(torch.stack(outs), a["input_layout"])
    stats = []
    for parts in (tops, totals):
        if packed:  # by default one sequence after the other as [N, S], though the shape says [T, N]
            by_row = a["softmax_layout"] == "TND"
            flat = torch.cat([(p.transpose(0, 1) if by_row else p).reshape(-1) for p in parts])
            found = flat.reshape(-1, a["head_num"], 1)
        else:
            found = torch.stack(parts)
        stats.append(found.detach().float().expand(*found.shape[:-1], 8).contiguous())
    return out.to(query.dtype), *stats, query.new_empty(0), 0, 0, 0


def npu_fusion_attention(query: Any, key: Any, value: Any, **a: Any) -> Any:
    """softmax(mask(scale (q k^T + pse))) v; also the softmax maximum and sum, from which no gradient flows."""
    return _forward(query, key, value, a)


def npu_fusion_attention_v2(query: Any, key: Any, value: Any, **a: Any) -> Any:
    """The same with pse_type: 1 = before the scale, 0 = after it; mode 3 wants S <= K."""
    for one in _sequences(query, key, value, a):
        demand(a["sparse_mode"] != 3 or one.q.shape[1] <= one.k.shape[1], "v2: sparse_mode 3 takes S <= K")
    return _forward(query, key, value, a)


FUNCTIONS = {name: function for name, function in list(globals().items()) if name.startswith("npu_")}
