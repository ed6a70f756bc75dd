"""What TransformerEngine's parallel_cross_entropy computes, in float64. B batch, S positions, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from tests.contracts.recording import demand

__all__ = ["parallel_cross_entropy"]

OVERWRITTEN = 12345.0


def parallel_cross_entropy(_input: torch.Tensor, target: torch.Tensor, label_smoothing: float, **a: Any) -> Any:
    """The float32 loss of each row [B, S]; the memory of the logits then holds their gradient."""
    demand(_input.ndim == 3 and target.shape == _input.shape[:2], "logits are [B, S, V] and targets [B, S]")
    demand(_input.dtype in (torch.float32, torch.bfloat16), "takes float32 and bfloat16")
    demand(not a["reduce_loss"] and a["dist_process_group"] is None, "only rows on one rank are faked")
    rows = F.cross_entropy(
        _input.double().flatten(0, 1),
        target.flatten(),
        ignore_index=a["ignore_idx"],
        reduction="none",
        label_smoothing=label_smoothing,
    )
    with torch.no_grad():
        _input.detach().fill_(OVERWRITTEN)
    return rows.reshape(target.shape).float()
