"""torch.mlu.memory: what is allocated and reserved, in bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch_mlu import _native

from .device_index import index_of

__all__ = [
    "empty_cache", "ipc_collect", "max_memory_allocated", "max_memory_reserved", "mem_get_info", "memory_allocated",
    "memory_reserved", "memory_snapshot", "memory_stats", "memory_summary", "reset_peak_memory_stats",
    "set_per_process_memory_fraction",
]  # fmt: skip


def memory_allocated(device: Any = None) -> int:
    """Bytes of the device's tensors now."""
    return torch.accelerator.memory_allocated(index_of(device))


def max_memory_allocated(device: Any = None) -> int:
    """The most bytes that tensors took since the peak was reset."""
    return torch.accelerator.max_memory_allocated(index_of(device))


def memory_reserved(device: Any = None) -> int:
    """Bytes that the allocator holds now."""
    return torch.accelerator.memory_reserved(index_of(device))


def max_memory_reserved(device: Any = None) -> int:
    """The most bytes that the allocator held since the peak was reset."""
    return torch.accelerator.max_memory_reserved(index_of(device))


def memory_stats(device: Any = None) -> dict[str, Any]:
    """The allocator's numbers, by torch's names; blocks are not split, so segments stay 0."""
    return dict(torch.accelerator.memory_stats(index_of(device)))


def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
    """The numbers for people to read."""
    stats = memory_stats(device)
    names = ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes")
    lines = [f"{name}: {stats[f'{name}.all.current']} now, {stats[f'{name}.all.peak']} at most" for name in names]
    return "\n".join([f"memory of mlu:{index_of(device)} in bytes", *lines])


def reset_peak_memory_stats(device: Any = None) -> None:
    """Start the peaks anew from what is allocated now."""
    torch.accelerator.reset_peak_memory_stats(index_of(device))


def empty_cache() -> None:
    """Give back what is reserved and not allocated."""
    torch.accelerator.empty_cache()


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """(free, total) bytes."""
    return torch.accelerator.get_memory_info(index_of(device))


def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
    """Refuse allocations beyond this part of the device's memory."""
    _native.set_memory_fraction(index_of(device), fraction)


def ipc_collect() -> None:
    """Nothing is shared between processes here, so there is nothing to collect."""


def memory_snapshot() -> Any:
    """Not modelled: blocks and segments of the real allocator."""
    raise NotImplementedError("torch.mlu.memory_snapshot: the MLU simulator has no blocks and segments.")


def _record_memory_history(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("torch.mlu.memory._record_memory_history: the MLU simulator records none.")
