"""Calls beyond the ops' own inputs: sizes that vendors ask for, and attention in every form that a kernel serves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from llm_adapt.ops.dispatch.registry import find_op
from tests.ops.cases import Case

__all__ = ["more_cases"]


_generator = torch.Generator().manual_seed(0)


def _draw(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(sizes, generator=_generator).to(dtype)


def _softmax(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    hidden = _draw(2, 1, 32, 64) > 0.5
    hidden[1, 0, 3] = True  # a row that is masked whole
    yield {"x": _draw(2, 3, 32, 64, dtype=dtype), "mask": hidden, "scale": 0.5}
    yield {"x": _draw(2, 32, 64, dtype=dtype), "causal": True}
    yield {"x": _draw(2, 64, 32, dtype=dtype), "causal": True}
    yield {"x": _draw(1, 2, 64, 64, dtype=dtype), "window": (5, 0)}
    yield {"x": _draw(1, 2, 32, 32, dtype=dtype)}


_AXES = {"bshd": "bshd", "sbhd": "sbhd", "bhsd": "bhsd"}


def _dense(layout: str, rows: int, columns: int, size: int, value_size: int, dtype: torch.dtype) -> dict[str, Any]:
    counts = {"b": 2, "d": size}

    def one(length: int, heads: int, width: int) -> torch.Tensor:
        counts.update(s=length, h=heads, d=width)
        return _draw(*(counts[axis] for axis in layout), dtype=dtype)

    return {"q": one(rows, 4, size), "k": one(columns, 2, size), "v": one(columns, 2, value_size), "layout": layout}


def _attention(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    sights: list[dict[str, Any]] = [
        {},
        {"causal": "top_left"},
        {"causal": "bottom_right"},
        {"window_left": 3, "window_right": 1},
        {"causal": "bottom_right", "window_left": 2},
        {"window_left": 2},
    ]
    shapes = ((9, 9), (5, 11), (11, 5))
    for layout, (rows, columns), sight, lse in itertools.product(_AXES, shapes, sights, (False, True)):
        yield _dense(layout, rows, columns, 16, 16, dtype) | sight | {"return_lse": lse}
    yield _dense("bshd", 6, 6, 24, 20, dtype) | {"return_lse": True, "causal": "bottom_right"}
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    for layout in _AXES:
        same = _dense(layout, 9, 9, 20, 12, dtype)
        yield same | {"alibi_slopes": slopes, "causal": "bottom_right"}
        yield same | {"alibi_slopes": torch.stack([slopes, slopes / 2])}
        yield same | {"sinks": _draw(4), "causal": "bottom_right"}
        for sizes in ((9, 9), (1, 9), (1, 4, 9, 9), (2, 1, 1, 9), (2, 4, 9, 9)):
            keep = _draw(*sizes) > -0.3
            yield same | {"mask": keep}
            yield same | {"mask": keep, "causal": "bottom_right", "window_left": 4}
            added = _draw(*sizes, dtype=dtype)
            yield same | {"mask": added}
            yield same | {"mask": added.masked_fill(~keep, -torch.inf), "causal": "top_left", "sinks": _draw(4)}
    if dtype != torch.float32:  # large enough for the fused path of an MLU
        yield {"q": _draw(4, 512, 4, 64, dtype=dtype), "k": _draw(4, 256, 2, 64, dtype=dtype)} | {
            "v": _draw(4, 256, 2, 64, dtype=dtype)
        }
        q, k, v = (_draw(400, 2, 4, 64, dtype=dtype) for _ in range(3))
        yield {"q": q, "k": k, "v": v, "layout": "sbhd", "causal": "bottom_right"}
    yield from _packed(dtype)


def _packed(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Packed sequences: some empty, some with fewer keys than queries, with padding behind."""
    ends = {
        "plain": ([0, 4, 9], [0, 4, 9]),
        "shorter keys": ([0, 5, 5, 9], [0, 2, 4, 9]),
        "no keys": ([0, 3, 9], [0, 0, 7]),
        "nothing": ([0, 9], [0, 0]),
    }
    for (cu_q, cu_k), causal, left in itertools.product(ends.values(), ("none", "top_left", "bottom_right"), (-1, 1)):
        for lse in (False, True):
            yield {
                "q": _draw(9, 4, 16, dtype=dtype),
                "k": _draw(9, 2, 16, dtype=dtype),
                "v": _draw(9, 2, 16, dtype=dtype),
                "cu_seqlens_q": torch.tensor(cu_q, dtype=torch.int32),
                "cu_seqlens_k": torch.tensor(cu_k, dtype=torch.int32),
                "layout": "thd",
                "causal": causal,
                "window_left": left,
                "return_lse": lse,
            }
    yield {
        "q": _draw(12, 4, 16, dtype=dtype),
        "k": _draw(11, 4, 16, dtype=dtype),
        "v": _draw(11, 4, 16, dtype=dtype),
        "cu_seqlens_q": torch.tensor([0, 4, 9], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 4, 9], dtype=torch.int32),
        "layout": "thd",
    }


def _decode(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    lengths = torch.tensor([33, 7], dtype=torch.int32)
    pages = torch.tensor([[2, 0, 4], [3, -1, -1]], dtype=torch.int32)
    for lse in (False, True):
        cache = {"k_cache": _draw(5, 16, 2, 32, dtype=dtype), "v_cache": _draw(5, 16, 2, 32, dtype=dtype)}
        yield (
            {"q": _draw(2, 1, 4, 32, dtype=dtype), "cache_seqlens": lengths, "block_table": pages}
            | cache
            | {"return_lse": lse}
        )


def _rope(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for layout, pairs, batched, width in itertools.product(
        ("bshd", "sbhd", "bhsd"), ("half", "interleaved", "interleaved_to_half"), (False, True), (8, 12)
    ):
        sizes = {"b": 2, "s": 7, "h": 3, "d": 12}
        angle = _draw(*((2, 7, width // 2) if batched else (7, width // 2)))
        yield {
            "x": _draw(*(sizes[axis] for axis in layout), dtype=dtype),
            "cos": angle.cos(),
            "sin": angle.sin(),
            "layout": layout,
            "pairs": pairs,
            "table": "half",
        }


def _adamw(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def lists() -> list[torch.Tensor]:
        return [_draw(5, 3, dtype=dtype), _draw(7, dtype=dtype)]

    yield {
        "params": lists(),
        "grads": lists(),
        "exp_avgs": lists(),
        "exp_avg_sqs": [item.square() for item in lists()],
        "state_steps": [torch.tensor(4.0), torch.tensor(4.0)],
    }


def _route(tokens: int, experts: int, topk: int) -> torch.Tensor:
    chosen = torch.rand(tokens, experts, generator=_generator).topk(topk, dim=1).indices
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, chosen, True)


def _moe_permute(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for tokens, experts, topk, wide in ((9, 6, 2, False), (7, 5, 5, True), (1, 3, 1, False), (13, 8, 3, True)):
        probs = torch.rand(tokens, experts, generator=_generator).to(torch.float32 if wide else dtype)
        given = {"tokens": _draw(tokens, 16, dtype=dtype), "num_out_tokens": tokens * topk, "topk": topk}
        yield given | {"routing_map": _route(tokens, experts, topk), "probs": probs}
        yield given | {"routing_map": _route(tokens, experts, topk).int() * 2}  # what is not 0 counts


def _moe_unpermute(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for given in _moe_permute(dtype):
        routing_map = given["routing_map"]
        rows = routing_map.t().nonzero()[:, 1]
        call = {"permuted": _draw(len(rows), 16, dtype=dtype), "sorted_indices": rows, "topk": given["topk"]}
        call["num_tokens"] = len(routing_map)
        yield call | ({"probs": given["probs"], "routing_map": routing_map} if "probs" in given else {})


_MORE = {
    "adamw": _adamw,
    "scaled_masked_softmax": _softmax,
    "attention": _attention,
    "decode_attention": _decode,
    "moe_permute": _moe_permute,
    "moe_unpermute": _moe_unpermute,
    "rope": _rope,
}


def more_cases(dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    """The further cases, numbered from 1000."""
    for name, inputs in _MORE.items():
        op = find_op(name)
        for dtype in dtypes:
            for number, arguments in enumerate(inputs(dtype)):
                yield Case(op, 1000 + number, dtype, op.bind(**arguments))
