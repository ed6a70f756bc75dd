"""Layouts of attention's tensors, and the one that it is computed in: [B, H, S, D].

B batch, S length, H heads, D head size, T tokens of all sequences packed one behind the other.
"""

from __future__ import annotations

import torch

__all__ = ["LAYOUTS", "from_heads_first", "lengths", "to_heads_first"]

# layout -> axes of that layout in the order B, H, S, D; and back.
_TO = {"bshd": (0, 2, 1, 3), "sbhd": (1, 2, 0, 3), "bhsd": (0, 1, 2, 3)}
_FROM = {"bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3), "bhsd": (0, 1, 2, 3)}
LAYOUTS = (*_TO, "thd")


def to_heads_first(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A view [B, H, S, D]; packed sequences are one batch entry of length T."""
    return x.transpose(0, 1).unsqueeze(0) if layout == "thd" else x.permute(_TO[layout])


def from_heads_first(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Back to the layout, contiguous; but [B, H, S, D] as it is, since who asks for it transposes it next."""
    if layout == "bhsd":
        return x
    return (x.squeeze(0).transpose(0, 1) if layout == "thd" else x.permute(_FROM[layout])).contiguous()


def lengths(x: torch.Tensor, layout: str) -> int:
    """The size of the axis of tokens."""
    return x.shape[0] if layout == "thd" else x.shape[_TO[layout][2]]
