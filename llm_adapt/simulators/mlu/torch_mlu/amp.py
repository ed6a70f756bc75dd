"""torch.mlu.amp: torch.amp for the device type "mlu"."""

from __future__ import annotations

import functools
from typing import Any

import torch

__all__ = ["GradScaler", "autocast", "custom_bwd", "custom_fwd"]


class autocast(torch.amp.autocast_mode.autocast):
    """torch.autocast("mlu")."""

    def __init__(self, enabled: bool = True, dtype: torch.dtype = torch.float16, cache_enabled: bool = True) -> None:
        super().__init__("mlu", enabled=enabled, dtype=dtype, cache_enabled=cache_enabled)


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler("mlu")."""

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        super().__init__("mlu", init_scale, growth_factor, backoff_factor, growth_interval, enabled)


custom_fwd: Any = functools.partial(torch.amp.custom_fwd, device_type="mlu")
custom_bwd: Any = functools.partial(torch.amp.custom_bwd, device_type="mlu")
