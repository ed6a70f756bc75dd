"""torch.autocast("cuda"), torch.cuda.amp and GradScaler on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.usefixtures("facade"),
    pytest.mark.filterwarnings("ignore:.torch.cuda.amp:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.[gs]et_autocast:DeprecationWarning"),
]

REGIONS: dict[str, tuple[Callable[[], Any], torch.dtype]] = {
    'autocast("cuda")': (lambda: torch.autocast("cuda"), torch.float16),
    "autocast(device_type=)": (lambda: torch.autocast(device_type="cuda", dtype=torch.bfloat16), torch.bfloat16),
    "amp.autocast": (lambda: torch.amp.autocast("cuda", torch.float16), torch.float16),
    "cuda.amp.autocast": (lambda: torch.cuda.amp.autocast(), torch.float16),
    "cuda.amp.autocast(dtype=)": (lambda: torch.cuda.amp.autocast(dtype=torch.bfloat16), torch.bfloat16),
    "enabled=False": (lambda: torch.autocast("cuda", enabled=False), torch.float32),
    'autocast("cpu")': (lambda: torch.autocast("cpu"), torch.bfloat16),
}


@pytest.mark.parametrize(("region", "dtype"), REGIONS.values(), ids=REGIONS.keys())
def test_a_region_computes_in_its_dtype(region: Callable[[], Any], dtype: torch.dtype) -> None:
    """Inside a region of cuda matrix products are in its dtype, float16 unless another is asked, as on CUDA."""
    linear, x = torch.nn.Linear(4, 4).cuda(), torch.ones(1, 4, device="cuda")
    with region():
        assert linear(x).dtype == dtype
    assert linear(x).dtype == torch.float32


@pytest.mark.parametrize(("region", "dtype"), list(REGIONS.values())[:5], ids=list(REGIONS)[:5])
def test_the_state_is_told(region: Callable[[], Any], dtype: torch.dtype) -> None:
    """Functions that ask for autocast's state answer for cuda, inside the region and outside."""

    def state() -> tuple[Any, ...]:
        return (
            torch.is_autocast_enabled(),
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            torch.get_autocast_gpu_dtype(),
        )

    outside = (False, False, torch.float16, torch.float16)
    assert state() == outside
    with region():
        assert state() == (True, True, dtype, dtype)
        with torch.autocast("cuda", enabled=False):
            assert not torch.is_autocast_enabled()
    assert state() == outside


def test_the_state_is_set() -> None:
    """The functions that set autocast's state, as Megatron and checkpointing use them, set cuda's."""
    x = torch.ones(1, 4)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with torch.autocast("cuda"):
            assert (x @ x.T).dtype == torch.bfloat16
        torch.set_autocast_gpu_dtype(torch.float16)
        with torch.autocast("cuda"):
            assert (x @ x.T).dtype == torch.float16
            torch.set_autocast_gpu_dtype(torch.bfloat16)
            assert (x @ x.T).dtype == torch.bfloat16
            torch.set_autocast_enabled(False)
            assert (x @ x.T).dtype == torch.float32
            torch.set_autocast_enabled("cuda", True)
            assert torch.is_autocast_enabled()
    finally:
        torch.set_autocast_dtype("cuda", torch.float16)
    assert not torch.is_autocast_enabled()


SCALERS: dict[str, Callable[[], Any]] = {
    "cuda.amp.GradScaler": lambda: torch.cuda.amp.GradScaler(init_scale=8.0),
    'amp.GradScaler("cuda")': lambda: torch.amp.GradScaler("cuda", init_scale=8.0),
    "GradScaler()": lambda: torch.GradScaler(init_scale=8.0),
}


@pytest.mark.parametrize("make", SCALERS.values(), ids=SCALERS.keys())
def test_a_scaler_scales(make: Callable[[], Any]) -> None:
    """The AMP tutorial's step: the loss is scaled, gradients are unscaled, clipped and applied."""
    weight = torch.nn.Parameter(torch.ones(2, device="cuda"))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), make()
    assert scaler.is_enabled()
    with torch.autocast("cuda", dtype=torch.float16):
        loss = (weight * 3).sum()
    scaler.scale(loss).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [24.0, 24.0]
    scaler.unscale_(optimizer)
    assert weight.grad.tolist() == [3.0, 3.0]
    torch.nn.utils.clip_grad_norm_([weight], 1e9)
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [-2.0, -2.0]
    scaler.load_state_dict(scaler.state_dict())


@pytest.mark.parametrize("make", SCALERS.values(), ids=SCALERS.keys())
def test_a_scaler_skips_overflow(make: Callable[[], Any]) -> None:
    """A step with an infinite gradient is left out, and the scale is halved."""
    weight = torch.nn.Parameter(torch.ones(2, device="cuda"))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), make()
    scaler.scale((weight * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [1.0, 1.0]
    assert scaler.get_scale() == 4.0


def test_custom_functions() -> None:
    """custom_fwd and custom_bwd, in both spellings, cast their inputs and turn autocast off."""

    class Old(torch.autograd.Function):
        @staticmethod
        @torch.cuda.amp.custom_fwd(cast_inputs=torch.float32)
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            assert x.dtype == torch.float32
            assert not torch.is_autocast_enabled()
            return x * 2

        @staticmethod
        @torch.cuda.amp.custom_bwd
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 2

    class New(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            assert x.dtype == torch.float32
            return x * 2

        @staticmethod
        @torch.amp.custom_bwd(device_type="cuda")
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 2

    for function in (Old, New):
        x = torch.ones(2, dtype=torch.float16, requires_grad=True, device="cuda")
        with torch.autocast("cuda"):
            function.apply(x).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [2.0, 2.0]


def test_recomputation_keeps_the_region() -> None:
    """torch.utils.checkpoint recomputes in the dtype of the region of cuda it was called in."""
    from torch.utils.checkpoint import checkpoint

    linear, seen = torch.nn.Linear(4, 4).cuda(), []

    def block(x: torch.Tensor) -> torch.Tensor:
        out = linear(x)
        seen.append(out.dtype)
        return out

    for use_reentrant in (True, False):
        with torch.autocast("cuda", dtype=torch.float16):
            out = checkpoint(block, torch.ones(1, 4, requires_grad=True), use_reentrant=use_reentrant)
        out.sum().backward()
    assert len(seen) >= 3  # torch stops a recomputation as soon as it has what it needs
    assert set(seen) == {torch.float16}
