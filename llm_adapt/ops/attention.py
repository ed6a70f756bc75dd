"""Attention: dense or packed, causal, windowed, masked, with ALiBi, softcap, sinks, dropout and log-sum-exp.

B batch, H query heads, G key and value heads (H / G query heads share one), Sq and Sk lengths, D head size of query
and key, Dv of value; N sequences of Tq queries and Tk keys together, packed one behind the other (layout "thd").

Which keys a query sees. Query i stands at place p(i) among the keys of its sequence: p(i) = i + Sk - Sq, so that the
last query stands at the last key, or p(i) = i with causal="top_left". It sees key j when, of what was given, all hold:
- causal, either alignment: j <= p(i);
- window: p(i) - window_left <= j <= p(i) + window_right, where -1 = unlimited and 0 = up to p(i) itself;
- the boolean mask is True (an added mask hides a key by -inf);
- key and query are in one sequence, and in the part of it that is used (seqused_q, seqused_k; Sq and Sk are these).
causal="bottom_right" and windows are those of flash-attn since 2.1, "top_left" is is_causal of torch; a window with
"top_left" counts from that diagonal. ALiBi counts from p(i) too, under causal as well (flash-attn adds a number to each
row there, which its log-sum-exp keeps). A query that sees no key gives 0, and gradients 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

from llm_adapt.ops.attention_parts.narrowing import narrowed
from llm_adapt.ops.attention_parts.request import Biases, Options, Request, Sequences
from llm_adapt.ops.attention_parts.softmax import attend
from llm_adapt.ops.attention_parts.tolerances import ATTENTION
from llm_adapt.ops.dispatch import HEAD_SIZES, fused_op

__all__ = ["attention"]


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    def three(rows: int, columns: int, heads: int = 4, groups: int = 2, size: int = 16) -> dict[str, Any]:
        q, k, v = draw(2, rows, heads, size), draw(2, columns, groups, size), draw(2, columns, groups, size)
        return {"q": q, "k": k, "v": v}

    def flipped(layout: str, named: dict[str, Any]) -> dict[str, Any]:
        turn = {"sbhd": lambda x: x.transpose(0, 1), "bhsd": lambda x: x.transpose(1, 2)}[layout]
        return {name: turn(value).contiguous() for name, value in named.items()} | {"layout": layout}

    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    keep = torch.rand(2, 1, 12, 12, generator=generator) > 0.3
    keep[..., 0] = True
    yield three(12, 12)
    yield three(12, 12) | {"causal": "top_left"}
    yield three(12, 12) | {"causal": "bottom_right"}
    yield three(9, 17, groups=4) | {"causal": "bottom_right", "scale": 0.3}
    yield three(17, 9, groups=1) | {"causal": "bottom_right"}  # the first 8 queries see no key
    yield three(12, 15) | {"causal": "top_left", "window_left": 4}
    yield three(12, 12) | {"window_left": 3, "window_right": 2, "softcap": 5.0}
    yield three(12, 12) | {"causal": "bottom_right", "window_left": 4, "sinks": draw(4), "scale": 1.0}
    yield three(12, 15) | {"causal": "bottom_right", "alibi_slopes": slopes, "return_lse": True}
    yield three(12, 15) | {"alibi_slopes": torch.stack([slopes, slopes * 2]), "deterministic": True}
    yield three(12, 12) | {"mask": keep}
    yield three(12, 12) | {"mask": draw(1, 4, 12, 12), "causal": "bottom_right"}
    yield three(12, 12) | {"dropout_p": 0.2, "seed": 7, "sinks": draw(4), "return_lse": True}
    yield three(9, 11) | {
        "causal": "bottom_right",
        "seqused_q": torch.tensor([9, 4], dtype=torch.int32),
        "seqused_k": torch.tensor([11, 6], dtype=torch.int32),
    }
    yield flipped("sbhd", three(12, 12)) | {"causal": "top_left", "return_lse": True}
    mla = {"q": draw(2, 12, 4, 24), "k": draw(2, 12, 4, 24), "v": draw(2, 12, 4, 16)}
    yield flipped("bhsd", mla) | {"causal": "bottom_right"}
    yield three(0, 8)
    yield three(8, 0)
    ends_q = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    ends_k = torch.tensor([0, 7, 9, 17], dtype=torch.int32)
    packed = {"q": draw(12, 4, 16), "k": draw(17, 2, 16), "v": draw(17, 2, 16), "layout": "thd"} | {
        "cu_seqlens_q": ends_q,
        "cu_seqlens_k": ends_k,
        "max_seqlen_q": 7,
        "max_seqlen_k": 8,
    }
    yield packed
    yield packed | {"causal": "bottom_right", "return_lse": True}
    yield packed | {"causal": "bottom_right", "window_left": 2, "alibi_slopes": torch.stack([slopes] * 3)}


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    """A causal call with q of this shape, and eight key heads where that many fit."""
    batch, length, heads, size = shape
    groups = heads if heads % 8 else 8
    sizes = {"q": shape, "k": (batch, length, groups, size), "v": (batch, length, groups, size)}
    tensors = {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}
    return tensors | {"causal": "bottom_right"}


@fused_op(
    inputs=_inputs,
    example=_example,
    sizes=HEAD_SIZES,
    differentiable=("q", "k", "v", "mask", "sinks"),
    dynamic=frozenset({"seed"}),
    hints=frozenset({"max_seqlen_q", "max_seqlen_k"}),
    random="dropout_p",
    autocast=("q", "k", "v"),
    shrink=narrowed,
    tolerance=ATTENTION,
)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    layout: Literal["bshd", "sbhd", "bhsd", "thd"] = "bshd",
    causal: Literal["none", "top_left", "bottom_right"] = "none",
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    return_lse: bool = False,
    deterministic: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """out_i = sum_j dropout(exp(s_ij) / (sum_j exp(s_ij) + exp(sink))) v_j over the keys j that query i sees.

    Which those are says the docstring of this module, under "Which keys a query sees".

    s_ij = cap(scale * q_i . k_j) - slope * |p(i) - j| + mask_ij, where cap(x) = softcap * tanh(x / softcap).

    cu_seqlens: cumulative lengths with a leading 0 (layout "thd"); tokens behind the last give 0. mask: bool, True =
    keep, or added. alibi_slopes: no gradient. scale: None = 1 / sqrt(D). softcap: 0 = none. seed: dropout needs one,
    the same drops the same weights, in recompute too. max_seqlen: for kernels that need it on the host, 0 = not known.
    return_lse: also log(sum_j exp(s_ij) + exp(sink)), before dropout, with gradient. deterministic: each run has the
    same gradients.

    Shapes: q [B, Sq, H, D], k [B, Sk, G, D], v [B, Sk, G, Dv] in the order of the layout, or [Tq, H, D], [Tk, G, D] and
        [Tk, G, Dv]; cu_seqlens [N + 1], seqused [B] or [N], mask broadcast to [B, H, Sq, Sk] or [1, H, Tq, Tk],
        alibi_slopes [H], [B, H] or [N, H], sinks [H] -> out as q with Dv, contiguous; lse [B, H, Sq] or [H, Tq].
    Dtypes: computed in float32 (float64 for float64), out rounded once to the dtype of q; lengths int32.
    Raises: ValueError and TypeError for shapes, dtypes and options that do not fit; no value of a tensor is looked at.
    Source: Vaswani et al. 2017, 3.2.1; Press et al. 2022 (ALiBi); Gemma 2 report, section 2 (softcap);
        flash_attn_interface.py of flash-attn 2.8 (places, varlen); modeling_gpt_oss.py of transformers 5 (sinks).
    """
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    options = Options(layout, causal, window_left, window_right, scale, softcap, dropout_p, seed)
    request = Request(q, k, v, sequences, Biases(mask, alibi_slopes, sinks), options)
    query, key, value = request.heads_first()
    everything = slice(0, query.shape[2]), slice(0, key.shape[2])
    out, lse = request.finished(*attend(query, key, value, *request.added(), request.weighting(), *everything))
    return (out, lse) if return_lse else out
