"""RMS norms of torch_npu that quantize to int8, over the simulated NPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.simulators.npu_checks import HALVES, close, refuses

pytestmark = pytest.mark.simulator("npu")

EPS = 1e-3


def _npu() -> Any:
    import torch_npu

    return torch_npu


def _data(dtype: torch.dtype) -> list[torch.Tensor]:
    """x1, x2 [3, 4, 48], gamma, beta [48]."""
    generator = torch.Generator().manual_seed(19)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 4, 48), (3, 4, 48), (48,), (48,))]


def _norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x * x).mean(-1, keepdim=True).add(EPS).sqrt() * gamma.double()


def _near(found: torch.Tensor, unrounded: torch.Tensor) -> None:
    """int8, at most half a step (and the arithmetic of float32) from the value before rounding, saturated."""
    assert found.dtype == torch.int8
    assert (found.cpu().double() - unrounded.clamp(-128, 127)).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rms_norm_quant(dtype: torch.dtype) -> None:
    """npu_rms_norm_quant multiplies by the scale, adds the offset, rounds and saturates."""
    x, _, gamma, beta = _data(dtype)
    scale, offset = torch.tensor([60.0]).to(dtype), torch.tensor([3], dtype=torch.int8)
    found = _npu().npu_rms_norm_quant(*(t.npu() for t in (x, gamma, beta, scale, offset)), EPS)
    _near(found, (_norm(x, gamma) + beta.double()) * 60 + 3)


def test_rms_norm_quant_refuses() -> None:
    """float32, scales of another shape, offsets of another dtype, outputs of four bits."""
    x, _, gamma, beta = _data(torch.float16)
    scale, offset = torch.ones(1).half(), torch.zeros(1, dtype=torch.int8)

    def call(*tensors: torch.Tensor, **given: Any) -> None:
        _npu().npu_rms_norm_quant(*(t.npu() for t in tensors), **given)

    with refuses("must be float16 or bfloat16"):
        call(*(t.float() for t in (x, gamma, beta, scale)), offset)
    with refuses("scale must have the shape"):
        call(x, gamma, beta, scale.expand(48).contiguous(), offset)
    with refuses("offset must be int8"):
        call(x, gamma, beta, scale, scale)
    with refuses("only int8"):
        call(x, gamma, beta, scale, offset, dst_dtype=torch.quint4x2)


@pytest.mark.parametrize("divide", [True, False])
def test_rms_norm_quant_v2(divide: bool) -> None:
    """npu_rms_norm_quant_v2 divides by the scale unless told otherwise; one scale or one for each feature."""
    x, _, gamma, _ = _data(torch.float16)
    scale = torch.linspace(0.02, 0.05, 48).half() if divide else torch.linspace(20, 50, 48).half()
    found = _npu().npu_rms_norm_quant_v2(x.npu(), gamma.npu(), scale.npu(), epsilon=EPS, div_mode=divide)[0]
    y = _norm(x, gamma)
    _near(found, y / scale.double() if divide else y * scale.double())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_add_rms_norm_quant(dtype: torch.dtype) -> None:
    """npu_add_rms_norm_quant gives one or two quantized results and the sum."""
    x1, x2, gamma, beta = _data(dtype)
    wide = dtype if dtype == torch.bfloat16 else torch.float32
    scales = [torch.linspace(0.02, 0.05, 48).to(wide), torch.linspace(0.03, 0.04, 48).to(wide)]
    zero = torch.full((48,), 2).to(torch.bfloat16 if dtype == torch.bfloat16 else torch.int32)
    y1, y2, x = _npu().npu_add_rms_norm_quant(
        *(t.npu() for t in (x1, x2, gamma, scales[0], zero, beta, scales[1], zero)), epsilon=EPS
    )
    y = _norm(x1.double() + x2.double(), gamma) + beta.double()
    for found, scale in zip((y1, y2), scales, strict=True):
        _near(found, y / scale.double() + 2)
    close(x, x1.double() + x2.double())
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    with refuses("scales1 must be"):
        _npu().npu_add_rms_norm_quant(*(t.npu() for t in (x1, x2, gamma, scales[0].to(other), zero)))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_add_rms_norm_dynamic_quant(dtype: torch.dtype) -> None:
    """npu_add_rms_norm_dynamic_quant scales each row by its largest value over 127, after smoothing."""
    x1, x2, gamma, smooth = _data(dtype)
    smooth = smooth.abs() + 0.5
    y1, _, x, scale1, _ = _npu().npu_add_rms_norm_dynamic_quant(
        x1.npu(), x2.npu(), gamma.npu(), smooth_scale1=smooth.npu(), epsilon=EPS
    )
    y = _norm(x1.double() + x2.double(), gamma) * smooth.double()
    scale = y.abs().amax(-1) / 127
    close(scale1, scale)
    _near(y1, y / scale.unsqueeze(-1))
    close(x, x1.double() + x2.double())
    with refuses("needs smooth_scale1"):
        _npu().npu_add_rms_norm_dynamic_quant(x1.npu(), x2.npu(), gamma.npu(), smooth_scale2=smooth.npu())
