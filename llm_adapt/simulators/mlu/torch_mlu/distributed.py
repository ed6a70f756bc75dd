"""torch.distributed on MLUs: the backend "cncl", which is gloo on the device's bytes behind CNCL's limits."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch_mlu import _native

__all__ = ["Options", "register"]


class Options:
    """ProcessGroupCNCL.Options: one option, which changes nothing here."""

    __slots__ = ("is_high_priority_stream",)

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.is_high_priority_stream = is_high_priority_stream


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """A group; pg_options never arrive here, as in the builds of 2024, which registered the plain creator."""
    gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
    return _native.ProcessGroupCNCL(gloo)


def is_cncl_available() -> bool:
    """True."""
    return True


def register() -> None:
    """Add the backend and its names to torch.distributed."""
    if not dist.is_available():
        return
    _native.ProcessGroupCNCL.Options = Options
    dist.Backend.register_backend("cncl", _create, devices=["mlu"])
    dist.ProcessGroupCNCL = _native.ProcessGroupCNCL  # type: ignore[attr-defined]
    dist.distributed_c10d.ProcessGroupCNCL = _native.ProcessGroupCNCL  # type: ignore[attr-defined]
    dist.is_cncl_available = is_cncl_available  # type: ignore[attr-defined]
    dist.distributed_c10d.is_cncl_available = is_cncl_available  # type: ignore[attr-defined]
