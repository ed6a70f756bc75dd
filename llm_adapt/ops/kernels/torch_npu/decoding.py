"""Attention of one new token to a KV cache: npu_fused_infer_attention_score, which is for inference.

For one query it ignores sparse_mode, so the lengths of the cache alone say what is seen. The lengths are a list on
the host: reading them waits for the device (once for each version of the tensor, outside torch.inference_mode).

B batch, H query heads, G key heads, D head size; R cache entries of length S, or P pages of C tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch_npu

from llm_adapt.ops.attention_parts.host_lists import host_list
from llm_adapt.ops.dispatch import Call
from llm_adapt.ops.kernels.torch_npu.library import npu_kernel

__all__ = ["decode_attention"]


def _refuses(call: Call) -> str | None:
    batch, rows, heads, size = call.q.shape
    groups = call.k_cache.shape[2]
    if rows != 1:
        return "takes one new token of each sequence"
    if {call.q.dtype, call.k_cache.dtype, call.v_cache.dtype} - {torch.float16, torch.bfloat16}:
        return "takes float16 and bfloat16"
    if not (call.k_cache.is_contiguous and call.v_cache.is_contiguous):
        return "takes a contiguous cache"
    if size % 16 or size > 512 or call.v_cache.shape[-1] != size or heads > 256 or heads // groups > 64:
        return "takes head sizes up to 512 in steps of 16, the same for keys and values, and up to 64 heads a group"
    if call.block_table and (call.k_cache.shape[1] % 16 or call.k_cache.shape[1] > 512):
        return "takes pages of up to 512 tokens, in steps of 16"
    if batch > 65536 or (not call.block_table and call.k_cache.shape[1] > 262144):
        return "takes up to 65536 sequences of 262144 tokens"
    return None


@npu_kernel("decode_attention", "npu_fused_infer_attention_score", refuses=_refuses, has_backward=False)
def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None = None,
    causal: Literal["none", "bottom_right"] = "bottom_right",
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """npu_fused_infer_attention_score in layout BSH; causal or not is the same for one query at the end."""
    batch, _, heads, size = q.shape
    pages = {}
    if block_table is not None:  # what stands behind an entry's length may be anything
        pages = {"block_table": block_table.clamp(min=0).to(torch.int32), "block_size": k_cache.shape[1]}
    else:
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    out, lse = torch_npu.npu_fused_infer_attention_score(
        q.flatten(2).contiguous(),
        k_cache.flatten(2),
        v_cache.flatten(2),
        actual_seq_lengths_kv=host_list(cache_seqlens),
        num_heads=heads,
        num_key_value_heads=k_cache.shape[2],
        scale=size**-0.5 if scale is None else scale,
        input_layout="BSH",
        softmax_lse_flag=return_lse,
        **pages,
    )
    is_empty = (cache_seqlens == 0)[:, None, None]
    out = out.unflatten(2, (heads, size)).masked_fill(is_empty[..., None], 0.0)
    return (out, lse.squeeze(-1).masked_fill(is_empty, -torch.inf)) if return_lse else out
