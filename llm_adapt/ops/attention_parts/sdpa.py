"""Attention through torch.nn.functional.scaled_dot_product_attention, where it computes the very same.

Its is_causal is aligned top-left. What else hides keys is given as a mask, which costs Sq * Sk elements once for all
heads; a query that would see no key sees all of them, and its output is put to 0 afterwards, because torch's backends
differ there (0 or NaN). Letters as in llm_adapt/ops/attention.py.
Source: documentation of the function in torch 2.13; aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (what each
CUDA backend takes).
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_adapt.ops.attention_parts.cache import CacheRequest
from llm_adapt.ops.attention_parts.layouts import from_heads_first, to_heads_first
from llm_adapt.ops.attention_parts.places import Places, dense_places
from llm_adapt.ops.attention_parts.scores import attention_by_scores, is_for_scores
from llm_adapt.ops.dispatch import Call

__all__ = ["sdpa", "sdpa_of_cache", "why_not_sdpa", "why_not_sdpa_of_cache"]

_MOST_ROWS = 2048


def why_not_sdpa(call: Call) -> str | None:
    """Why a call of attention whose arguments sdpa all honours is not for it; None when it is."""
    if call.layout == "thd":
        return "scaled_dot_product_attention does not take packed sequences"
    mask = call.mask
    if mask is not None and mask.dtype not in (torch.bool, call.q.dtype):
        return f"scaled_dot_product_attention would round the {mask.dtype} mask to {call.q.dtype}"
    is_empty = any(call.tensors[name].sizes is not None and 0 in call.tensors[name].shape for name in ("q", "k"))
    if is_empty and call.device != "cpu":  # seen on an NPU: aclnnFlashAttentionScore fails on 0 keys
        return "scaled_dot_product_attention is not known to take no queries or no keys on this device"
    if call.deterministic and call.device != "cpu":
        return "the backward is not deterministic unless torch.use_deterministic_algorithms asks for it"
    return None


def why_not_sdpa_of_cache(call: Call) -> str | None:
    """Why a call of decode_attention is not for sdpa; None when it is."""
    if call.device != "cpu" and call.q.sizes is not None and 0 in call.q.shape:
        return "scaled_dot_product_attention returns None for no queries (seen on an H200, torch 2.11)"
    return None


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    layout: str,
    causal: str,
    window_left: int,
    window_right: int,
    scale: float | None,
) -> torch.Tensor:
    """Attention of one sequence for each batch entry; arguments and result as of `attention`."""
    if q.device.type == "cpu" and _adds_up_in_16_bits(q, k, v, layout):
        # Workaround: cpu-16-bit-attention
        mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
        wide = q.float(), k.float(), v.float()
        return sdpa(*wide, mask, layout, causal, window_left, window_right, scale).to(q.dtype)
    query, key, value = (to_heads_first(x, layout) for x in (q, k, v))
    rows, columns = query.shape[2], key.shape[2]
    has_window = window_left >= 0 or window_right >= 0
    if causal == "bottom_right" and rows == columns:
        causal = "top_left"
    if causal == "bottom_right" and rows == 1:
        causal = "none"  # the last query sees every key
    is_causal = causal == "top_left" and mask is None and not has_window
    if is_causal or (causal == "none" and mask is None and not has_window):
        return from_heads_first(_sdpa(query, key, value, None, is_causal, scale), layout)
    places = dense_places(rows, columns, causal == "top_left", q.device)
    seen = places.visible(causal != "none", window_left, window_right)
    combined = _combined(mask, seen).expand(-1, -1, rows, columns)
    if combined.dtype == torch.bool:
        is_empty = ~combined.any(-1, keepdim=True)
        combined = combined | is_empty
    else:
        is_empty = (combined == -torch.inf).all(-1, keepdim=True)
        combined = combined.masked_fill(is_empty, 0.0)
    if query.is_cuda and query.shape[1] != key.shape[1]:
        # No CUDA backend takes a mask and grouped heads: it would form all scores.
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    is_mask_alone = combined.requires_grad and not any(x.requires_grad for x in (query, key, value))
    # Workaround: cuda-mask-gradient
    with sdpa_kernel(SDPBackend.MATH) if query.is_cuda and is_mask_alone else contextlib.nullcontext():
        out = _sdpa(query, key, value, combined, False, scale)
    return from_heads_first(out.masked_fill(is_empty, 0.0), layout)


def _adds_up_in_16_bits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> bool:
    """Whether torch's kernel for the CPU would lose gradients of key and value: sums of 16 bits over many queries.

    Of bfloat16 it is nearer to the truth than eager attention up to 2048 queries, measured with four heads on a key.
    """
    if q.dtype not in (torch.bfloat16, torch.float16):
        return False
    has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    rows = q.shape[{"bshd": 1, "sbhd": 0, "bhsd": 2}[layout]]
    return has_gradient and (q.dtype == torch.float16 or rows > _MOST_ROWS)


def sdpa_of_cache(request: CacheRequest) -> torch.Tensor:
    """Attention of new tokens to a KV cache in the dtype of the query; result as of `decode_attention`.

    The query heads of a group are given as rows of one head: every backend takes that, with a mask too.
    """
    q, key, value = request.q, request.gathered(request.k_cache), request.gathered(request.v_cache)
    batch, rows, heads, size = q.shape
    places, key, value = _keys_of_sequences(request.places(key.shape[1]), key, value)
    columns, groups = key.shape[1:3]
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    seen = places.visible(request.causal != "none", request.window_left, request.window_right)
    assert seen is not None
    is_empty = ~seen.any(-1, keepdim=True)
    each = heads // groups
    stacked = q.view(batch, rows, groups, each, size).permute(0, 2, 3, 1, 4).reshape(batch, groups, each * rows, size)
    mask = (seen | is_empty).expand(batch, each, rows, columns).reshape(batch, 1, each * rows, columns)
    out = _sdpa(stacked, key, value, mask, False, request.scale).reshape(batch, heads, rows, value.shape[-1])
    return from_heads_first(out.masked_fill(is_empty, 0.0), "bshd")


def _keys_of_sequences(
    places: Places, key: torch.Tensor, value: torch.Tensor
) -> tuple[Places, torch.Tensor, torch.Tensor]:
    """Keys and values [B, Sk, G, D] with 0 where no token has been written yet: 0 * NaN is NaN.

    On the CPU, where nothing has to be waited for, the end that no sequence has reached is left out, and nothing is
    copied where all have the same length.
    """
    assert places.key_of is not None
    is_key = places.key_of >= 0
    if key.device.type == "cpu" and not torch.compiler.is_compiling() and is_key.any():
        end = is_key.shape[1] - int(is_key.any(0).flip(0).int().argmax())
        places, key, value, is_key = places.part(slice(None), slice(end)), key[:, :end], value[:, :end], is_key[:, :end]
        if is_key.all():
            return places, key, value
    key, value = (torch.where(is_key[:, :, None, None], x, 0) for x in (key, value))
    return places, key, value


def _combined(mask: torch.Tensor | None, seen: torch.Tensor | None) -> torch.Tensor:
    """One mask [B or 1, H or 1, Sq or 1, Sk or 1] of the two, of which one is there."""
    if mask is None:
        assert seen is not None
        return seen
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    if seen is None:
        return mask
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)


@functools.cache
def _takes_groups(device: str) -> bool:
    """Whether this device's function takes enable_gqa, tried once: torch_mlu's math path of 2024 does not know it."""
    query, key = torch.zeros(1, 2, 1, 8, device=device), torch.zeros(1, 1, 1, 8, device=device)
    try:
        F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    except (TypeError, RuntimeError):
        return False
    return True


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    if is_for_scores(query, key, value):
        return attention_by_scores(query, key, value, mask, is_causal, scale)
    is_grouped = query.shape[1] != key.shape[1]
    if is_grouped and query.device.type not in ("cpu", "cuda") and not _takes_groups(query.device.type):
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
    )
