"""Seeds for operators that drop: drawn from torch's generator, so that torch.manual_seed decides them."""

from __future__ import annotations

import torch

__all__ = ["drawn_seed"]


def drawn_seed() -> int:
    """A seed from torch's default generator, whose state activation recompute puts back. No device is waited for.

    Under torch.compile it breaks the graph.
    """
    return int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu"))
