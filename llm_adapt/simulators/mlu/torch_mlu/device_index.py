"""Which MLU an argument names."""

from __future__ import annotations

from typing import Any

import torch
from torch_mlu import _native

__all__ = ["index_of"]


def index_of(device: Any = None) -> int:
    """Index of an int, "mlu", "mlu:N" or torch.device; the current MLU for None and without an index.

    Raises:
        ValueError: it names another kind of device.
    """
    if isinstance(device, int) and not isinstance(device, bool):
        return device
    if device is None:
        return int(_native.current_device())
    where = torch.device(device)
    if where.type != "mlu":
        raise ValueError(f"Expected a mlu device, but got: {device}")
    return int(_native.current_device()) if where.index is None else where.index
