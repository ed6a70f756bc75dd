"""Tensor.mlu, Tensor.is_mlu and the storage's moves: torch_mlu sets them by hand."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["register"]


def _mlu(self: torch.Tensor, device: Any = None, non_blocking: bool = False) -> torch.Tensor:
    """The tensor on an MLU; the current one without a device."""
    where = torch.device("mlu", device) if isinstance(device, int) else torch.device(device or "mlu")
    if where.type != "mlu":
        raise RuntimeError(f"Invalid device, must be mlu device: {where} was given.")
    return self.to(where, non_blocking=non_blocking)


def _storage_mlu(self: Any, device: Any = None, non_blocking: bool = False) -> Any:
    index = torch.device(device).index if isinstance(device, (str, torch.device)) else device
    where = torch.device("mlu", torch.mlu.current_device() if index is None else index)  # type: ignore[attr-defined]
    if self.device == where:
        return self
    return torch.UntypedStorage(self.size(), device=where).copy_(self, non_blocking)


def register() -> None:
    """Add the methods to torch's classes."""
    torch.Tensor.mlu = _mlu  # type: ignore[attr-defined]
    torch.Tensor.is_mlu = property(lambda self: self.device.type == "mlu")  # type: ignore[attr-defined]
    torch.UntypedStorage.mlu = _storage_mlu  # type: ignore[attr-defined]
    torch.UntypedStorage.is_mlu = property(lambda self: self.device.type == "mlu")  # type: ignore[attr-defined]
