"""Mixed precision: torch.autocast("cuda"), torch.cuda.amp and GradScaler on this device.

CUDA's default autocast dtype, float16, is kept: the script chose its numbers for CUDA. (The CPU's own
default is bfloat16.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.frameworks.torch_cuda.devices import DeviceTranslator
from llm_adapt.patching import Patch, Row

__all__ = ["rows"]


def rows(translate: DeviceTranslator) -> list[Row]:
    """Rows for autocast, its state functions, custom_fwd/custom_bwd and GradScaler."""
    target, why = translate.target, f"autocast of cuda is autocast of {translate.target}"
    # Taken before the patch: the dtype that CUDA's autocast defaults to, which scripts may also set.
    cuda_dtype, set_cuda_dtype = torch.get_autocast_dtype, torch.set_autocast_dtype

    def device_type(value: Any) -> Any:
        return target if value == "cuda" else value

    def autocast_init(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def init(self: Any, device_type: str, dtype: torch.dtype | None = None, *args: Any, **kwargs: Any) -> None:
            if device_type == "cuda":
                device_type, dtype = target, cuda_dtype("cuda") if dtype is None else dtype
            original(self, device_type, dtype, *args, **kwargs)

        return init

    def scaler_init(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def init(self: Any, device: str = "cuda", *args: Any, **kwargs: Any) -> None:
            original(self, device_type(device), *args, **kwargs)

        return init

    def custom(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def decorator(*args: Any, device_type: str, **kwargs: Any) -> Any:
            return original(*args, device_type=target if device_type == "cuda" else device_type, **kwargs)

        return decorator

    found: list[Row] = [
        Patch("torch.amp.autocast_mode:autocast.__init__", autocast_init, why, kind="wrap"),
        Patch("torch.amp.grad_scaler:GradScaler.__init__", scaler_init, why, kind="wrap"),
    ]
    if hasattr(torch.cuda.amp.common, "amp_definitely_not_available"):
        found.append(Patch("torch.cuda.amp.common:amp_definitely_not_available", lambda: False, why))
    for name in ("custom_fwd", "custom_bwd"):
        found += [
            Patch("torch.amp.autocast_mode:" + name, custom, why, kind="wrap"),
            Patch("torch.amp:" + name, custom, why, kind="wrap"),
        ]
    states = _state(target, device_type, cuda_dtype, set_cuda_dtype)
    return found + [Patch(f"torch:{name}", new, why, kind="wrap") for name, new in states.items()]


def _state(
    target: str,
    device_type: Callable[[Any], Any],
    cuda_dtype: Callable[[str], torch.dtype],
    set_cuda_dtype: Callable[[str, torch.dtype], None],
) -> dict[str, Callable[..., Any]]:
    """Functions that read and set autocast's state; without a device type they mean cuda."""
    enabled, set_enabled = torch.is_autocast_enabled, torch.set_autocast_enabled

    def is_autocast_enabled(original: Any) -> Any:
        return lambda device="cuda": enabled(device_type(device))

    def set_autocast_enabled(original: Any) -> Any:
        return lambda *args: set_enabled(device_type(args[0]) if len(args) > 1 else target, args[-1])

    def get_dtype(device: str = "cuda") -> torch.dtype:
        """Inside a region the region's dtype; outside it what a region of cuda would default to."""
        return cuda_dtype(target if device == "cuda" and enabled(target) else device)

    def set_dtype(device: str, dtype: torch.dtype) -> None:
        set_cuda_dtype(device, dtype)
        if device == "cuda" and enabled(target):
            set_cuda_dtype(target, dtype)

    return {
        "is_autocast_enabled": is_autocast_enabled,
        "set_autocast_enabled": set_autocast_enabled,
        "get_autocast_dtype": lambda original: get_dtype,
        "set_autocast_dtype": lambda original: set_dtype,
        "get_autocast_gpu_dtype": lambda original: lambda: get_dtype("cuda"),
        "set_autocast_gpu_dtype": lambda original: lambda dtype: set_dtype("cuda", dtype),
    }
