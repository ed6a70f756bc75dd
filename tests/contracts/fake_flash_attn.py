"""What flash-attn documents of its two public functions, in float64, for its builds of three vendors.

B batch, N sequences, H query heads, G key heads, S and K lengths, D head size.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from tests.contracts.recording import demand

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]

NOT_WRITTEN = 12345.0  # what rows and gradients of tokens behind the last sequence hold
LARGEST = 256


class _Unset(torch.autograd.Function):
    """x; its gradient is not written for tokens behind the last sequence."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, end: int) -> torch.Tensor:
        ctx.end = end
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        g = g.clone()
        g[ctx.end :] = NOT_WRITTEN
        return g, None


def _attend(q: Any, k: Any, v: Any, slopes: Any, a: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence [S, H, D] -> [S, H, D] and log-sum-exp [H, S]."""
    q, k, v = (t.double().transpose(0, 1) for t in (q, k, v))
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scale = q.shape[-1] ** -0.5 if a["softmax_scale"] is None else a["softmax_scale"]
    scores = scale * q @ k.transpose(-1, -2)
    if a["softcap"] > 0:
        scores = a["softcap"] * torch.tanh(scores / a["softcap"])
    place = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    key = torch.arange(k.shape[1])[None]
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * (place - key).abs()
    left, right = a["window_size"]
    seen = torch.ones_like(place - key, dtype=torch.bool)
    if a["causal"] or right >= 0:
        seen &= key <= place + (0 if a["causal"] else right)
    if left >= 0:
        seen &= key >= place - left
    scores = scores.masked_fill(~seen, -math.inf)
    if a.get("s_aux") is not None:
        sink = a["s_aux"].detach().double()[:, None, None].expand(-1, q.shape[1], 1)
        scores = torch.cat([scores, sink], -1)
        return (scores.softmax(-1)[..., :-1] @ v).transpose(0, 1), scores.logsumexp(-1).detach()
    is_empty = ~seen.any(-1)
    scores = scores.masked_fill(is_empty[:, None], 0.0)
    out = (scores.softmax(-1) @ v).masked_fill(is_empty[:, None], 0.0) if k.shape[1] else q * 0.0
    lse = (scores.logsumexp(-1) if k.shape[1] else q[..., 0]).masked_fill(is_empty, math.inf)
    return out.transpose(0, 1), lse.detach()


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: dict[str, Any]) -> None:
    demand(q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16), "takes float16 and bfloat16")
    demand(q.shape[-1] == k.shape[-1] == v.shape[-1] <= LARGEST, f"one head size, at most {LARGEST}")
    demand(q.shape[-2] % k.shape[-2] == 0, "query heads must be a multiple of key heads")
    demand(all(t.stride(-1) == 1 for t in (q, k, v)), "the last axis must be contiguous")
    slopes = a.get("alibi_slopes")
    demand(slopes is None or slopes.dtype == torch.float32, "alibi_slopes are float32")
    demand(a.get("dropout_p", 0.0) == 0.0 and not a.get("bhsd"), "dropout and bhsd are not faked")
    demand(a.get("s_aux") is None or a["s_aux"].dtype == q.dtype, "s_aux has the dtype of q")


def _slopes(a: dict[str, Any], index: int) -> Any:
    slopes = a.get("alibi_slopes")
    return slopes if slopes is None or slopes.ndim == 1 else slopes[index]


def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **a: Any) -> Any:
    """Attention of [B, S, H, D]."""
    _check(q, k, v, a)
    found = [_attend(q[b], k[b], v[b], _slopes(a, b), a) for b in range(q.shape[0])]
    out, lse = (torch.stack(parts) for parts in zip(*found, strict=True))
    return _result(out.to(q.dtype), lse.float(), a)


def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, **a: Any
) -> Any:
    """Attention of packed sequences [T, H, D]; tokens behind the last are not written."""
    _check(q, k, v, a)
    demand(cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32, "cumulative lengths are int32")
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    demand(ends_q[0] == ends_k[0] == 0 and len(ends_q) == len(ends_k), "cumulative lengths start with 0")
    longest = [max(e - s for s, e in itertools.pairwise(ends)) for ends in (ends_q, ends_k)]
    demand(a["max_seqlen_q"] >= longest[0] and a["max_seqlen_k"] >= longest[1], "max_seqlen is too small")
    q, k, v = _Unset.apply(q, ends_q[-1]), _Unset.apply(k, ends_k[-1]), _Unset.apply(v, ends_k[-1])
    outs, sums = [], []
    for index, (s, e, ks, ke) in enumerate(zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)):
        out, lse = _attend(q[s:e], k[ks:ke], v[ks:ke], _slopes(a, index), a)
        outs.append(out), sums.append(lse)
    behind = q.shape[0] - ends_q[-1]
    out = torch.cat([*outs, q.new_full((behind, *q.shape[1:]), NOT_WRITTEN, dtype=torch.float64)])
    lse = torch.cat([*sums, q.new_full((q.shape[1], behind), NOT_WRITTEN, dtype=torch.float64)], -1)
    # Every input has a gradient, also where no query sees a key.
    return _result((out + 0.0 * (k.sum() + v.sum())).to(q.dtype), lse.float(), a)


def _result(out: torch.Tensor, lse: torch.Tensor, a: dict[str, Any]) -> Any:
    if not a["return_attn_probs"]:
        return out
    return (out, lse) if "dropout_p" not in a else (out, lse, None)  # flash-attn 3 has no third


def flash_attn_with_kvcache(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, **a: Any) -> Any:
    """Attention of [B, S, H, D] to the first cache_seqlens keys of a cache, whole or in pages; no backward."""
    given = {name for name in ("k", "v", "rotary_cos", "rotary_sin") if a[name] is not None}
    demand(not given, f"{given} are not faked")
    _check(q, k_cache, v_cache, a)
    table, lengths = a["block_table"], a["cache_seqlens"]
    integers = [lengths, *(a[name] for name in ("cache_batch_idx", "cache_leftpad") if a[name] is not None)]
    demand(all(t.dtype == torch.int32 for t in integers), "lengths and indices are int32")
    if table is not None:
        demand(k_cache.shape[1] % 256 == 0, "pages are a multiple of 256 tokens")
        demand(a["cache_batch_idx"] is None and a["cache_leftpad"] is None, "pages go without batch index and leftpad")
    outs, sums = [], []
    for b in range(q.shape[0]):
        entry = b if a["cache_batch_idx"] is None else int(a["cache_batch_idx"][b])
        first = 0 if a["cache_leftpad"] is None else int(a["cache_leftpad"][b])
        k, v = (t[table[b].long()].flatten(0, 1) if table is not None else t[entry] for t in (k_cache, v_cache))
        out, lse = _attend(q[b], k[first : lengths[b]], v[first : lengths[b]], _slopes(a, b), a)
        outs.append(out), sums.append(lse)
    out, lse = torch.stack(outs).to(q.dtype), torch.stack(sums).float()
    return (out, lse) if a["return_softmax_lse"] else out
