"""Attention of flash-attn 3, for Hopper: the flash_attn_interface package.

Source: hopper/flash_attn_interface.py of Dao-AILab/flash-attention, 3.0 beta: no dropout, ALiBi and sinks. Not run:
tests/contracts calls it against a fake.
"""

from __future__ import annotations

from typing import Literal

import torch
from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

from llm_adapt.ops.attention_parts.flash import Flash
from llm_adapt.ops.dispatch import kernel

__all__ = ["attention"]

_flash = Flash(flash_attn_func, flash_attn_varlen_func)


@kernel("attention", "flash_attn_func and flash_attn_varlen_func of flash-attn 3.0", refuses=_flash.refuses)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    layout: Literal["bshd", "sbhd", "bhsd", "thd"] = "bshd",
    causal: Literal["none", "top_left", "bottom_right"] = "none",
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    seed: int | None = None,  # of the dropout, which it does not have
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    return_lse: bool = False,
    deterministic: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """flash_attn_func, or flash_attn_varlen_func for packed sequences."""
    return _flash(dict(locals()) | {"alibi_slopes": None, "dropout_p": 0.0})
