"""Rotary embedding of torch_npu: x cos + turned(x) sin, with tables as wide as what is rotated.

npu_rotary_mul casts the tables to the dtype of x without a word; so where the op computes in float32 and the tables
are float32, x is cast to them instead. Its gradients of the tables have a limit of their own, B H of at most 1024, past
which its backward fails; nobody trains tables, so they are detached, and calls that want their gradients are refused.
B batch, H heads, D head size; letters of shapes as in llm_adapt/ops/rope.py.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch_npu

from llm_adapt.ops.dispatch import Call
from llm_adapt.ops.kernels.torch_npu.library import npu_kernel
from llm_adapt.ops.rope import Layout, beside, table_rows

__all__ = ["rope"]

_MOST = 1000  # heads, batch, and for interleaved pairs their product: op-plugin document of npu_rotary_mul


def _refuses(call: Call) -> str | None:
    if call.cos.shape[-1] * (1 if call.table == "full" else 2) >= 896:
        return "rotates fewer than 896 features"
    heads = call.x.shape[1 if call.layout == "bhsd" else -2]
    batch = 1 if call.layout == "thd" else call.x.shape[1 if call.layout == "sbhd" else 0]
    if heads >= _MOST or batch >= _MOST:
        return f"takes fewer than {_MOST} heads and sequences"
    if call.pairs == "interleaved":
        if batch * heads >= _MOST:
            return f"takes interleaved pairs of fewer than {_MOST} heads in all sequences together"
        if (
            call.layout == "bhsd"
            and batch > 1
            and max(call.cos.ndim - 2, call.positions.ndim - 1 if call.positions else 0)
        ):
            return "takes interleaved pairs of bhsd with one table for all sequences"
    return None


def _full(table: torch.Tensor, pairs: str) -> torch.Tensor:
    """One column for each feature, from one for each pair."""
    return table.repeat_interleave(2, -1) if pairs == "interleaved" else torch.cat([table, table], -1)


@npu_kernel("rope", "npu_rotary_mul", refuses=_refuses, no_gradient=frozenset({"cos", "sin"}))
def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    layout: Layout = "bshd",
    pairs: Literal["half", "interleaved", "interleaved_to_half"] = "half",
    table: Literal["full", "half"] = "full",
    compute: Literal["float32", "x"] = "float32",
    inverse: bool = False,
) -> torch.Tensor:
    """npu_rotary_mul; pairs that are read and written differently are put in order before it or after it."""
    cos, sin = cos.detach(), sin.detach()
    rows = table_rows(x, positions, cu_seqlens, layout)
    cos, sin = (beside(t if table == "full" else _full(t, pairs), rows, x, layout) for t in (cos, sin))
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if compute == "float32":
        turned = turned.to(torch.promote_types(x.dtype, torch.promote_types(cos.dtype, sin.dtype)))
    if inverse:
        sin = -sin
    if pairs == "interleaved_to_half" and not inverse:
        turned = turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    y = _turned(turned, cos.to(turned.dtype), sin.to(turned.dtype), layout, pairs)
    if pairs == "interleaved_to_half" and inverse:
        y = y.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    y = y.to(x.dtype)
    return torch.cat([y, rest], -1) if rest.shape[-1] else y


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str, pairs: str) -> torch.Tensor:
    mode = "interleave" if pairs == "interleaved" else "half"
    if mode == "interleave" and layout in ("bshd", "sbhd") and 1 not in cos.shape[:2]:
        # Interleaved pairs take one table for all sequences: as one packed sequence each token has its own row.
        packed: torch.Tensor = torch_npu.npu_rotary_mul(
            x.flatten(0, 1), cos.flatten(0, 1), sin.flatten(0, 1), rotary_mode=mode
        )
        return packed.reshape(x.shape)
    turned: torch.Tensor = torch_npu.npu_rotary_mul(x, cos, sin, rotary_mode=mode)
    return turned
