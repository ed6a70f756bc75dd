"""The norms of torch_npu over the simulated NPU: results, gradients, and the limits that are documented."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from tests.simulators.npu_checks import FLOATS, HALVES, agrees, close, refuses, said_on

pytestmark = pytest.mark.simulator("npu")

PAIRS = [*((dtype, dtype) for dtype in FLOATS), *((dtype, torch.float32) for dtype in HALVES)]
EPS = 1e-3


def _npu() -> Any:
    import torch_npu

    return torch_npu


def _data(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _rms(x: torch.Tensor, gamma: torch.Tensor, plus: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    axes = tuple(range(-gamma.ndim, 0))
    scale = (x * x).mean(axes, keepdim=True).add(EPS).sqrt()
    return x / scale * (gamma + plus), 1 / scale


def _layer(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> tuple[torch.Tensor, ...]:
    mean = x.mean(-1, keepdim=True)
    deviation = ((x - mean) ** 2).mean(-1, keepdim=True).add(EPS).sqrt()
    return (x - mean) / deviation * gamma + beta, mean, 1 / deviation


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("axes", [1, 2])
def test_rms_norm(dtypes: tuple[torch.dtype, torch.dtype], axes: int) -> None:
    """npu_rms_norm with gamma over one and two axes, in the five documented pairs of dtypes, with both gradients."""
    x, gamma = _data((3, 4, 8, 48), (8, 48)[2 - axes :])
    call = lambda x, gamma: _npu().npu_rms_norm(x, gamma, epsilon=EPS)  # noqa: E731
    agrees(call, _rms, [x, gamma], dtypes, node="NpuRmsNormBackward")


def test_rms_norm_keeps_rstd_in_float32_with_normed_axes_of_one() -> None:
    """rstd is float32 and keeps the normed axes as 1."""
    x, gamma = (t.bfloat16().npu() for t in _data((2, 8, 64), (8, 64)))
    rstd = _npu().npu_rms_norm(x, gamma)[1]
    assert rstd.dtype == torch.float32
    assert rstd.shape == (2, 1, 1)


def test_rms_norm_of_strided_input() -> None:
    """Inputs that are not contiguous are read where they lie."""
    x, gamma = _data((6, 4, 48), (48,))
    call = lambda x, gamma: _npu().npu_rms_norm(x.transpose(0, 1), gamma, epsilon=EPS)  # noqa: E731
    agrees(call, lambda x, gamma: _rms(x.transpose(0, 1), gamma), [x, gamma], torch.float32)


@pytest.mark.parametrize(
    ("x", "gamma", "text"),
    [
        (torch.ones(4, 64), torch.ones(64).half(), "does not go with x"),
        (torch.ones(4, 64).half(), torch.ones(64).bfloat16(), "does not go with x"),
        (torch.ones(64), torch.ones(64), "2 to 8 axes"),
        (torch.ones(4, 64), torch.ones(32), "trailing axes"),
        (torch.ones(4, 64, dtype=torch.int32), torch.ones(64), "must be float32, float16 or bfloat16"),
    ],
    ids=["narrower gamma", "other 16 bits", "one axis", "other width", "integers"],
)
def test_rms_norm_refuses(x: torch.Tensor, gamma: torch.Tensor, text: str) -> None:
    """Pairs of dtypes, ranks and shapes that are not documented are refused by name."""
    with refuses(text):
        _npu().npu_rms_norm(x.npu(), gamma.npu())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    """npu_add_rms_norm gives y, rstd and the sum."""

    def formula(x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return *_rms(x1 + x2, gamma), x1 + x2

    call = lambda *a: _npu().npu_add_rms_norm(*a, epsilon=EPS)  # noqa: E731
    agrees(call, formula, _data((4, 6, 48), (4, 6, 48), (48,)), dtype, backward=False)


def test_add_rms_norm_has_no_backward() -> None:
    """Its backward raises, as torch_npu registers it."""
    x, gamma = (t.npu().requires_grad_() for t in _data((4, 48), (48,)))
    y = _npu().npu_add_rms_norm(x, x, gamma)[0]
    with refuses("derivative for npu::npu_add_rms_norm is not implemented"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("x1", "x2", "gamma", "text"),
    [
        (torch.ones(4, 8), torch.ones(4, 8).half(), torch.ones(8), "x2 must have the dtype of x1"),
        (torch.ones(4, 8).half(), torch.ones(4, 8).half(), torch.ones(8), "gamma must have the dtype of x1"),
        (torch.ones(4, 8), torch.ones(1, 8), torch.ones(8), "x2 must have the shape of x1"),
        (torch.ones(0, 8), torch.ones(0, 8), torch.ones(8), "empty tensors"),
    ],
    ids=["x2", "gamma", "shape", "empty"],
)
def test_add_rms_norm_refuses(x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, text: str) -> None:
    """One dtype, one shape, nothing empty."""
    with refuses(text):
        _npu().npu_add_rms_norm(x1.npu(), x2.npu(), gamma.npu())


def test_add_rms_norm_v2_works_in_place() -> None:
    """npu_add_rms_norm_v2 turns x1 into y and x2 into the sum, and returns rstd."""
    x1, x2, gamma = _data((4, 48), (4, 48), (48,))
    a, b = x1.npu(), x2.npu()
    rstd = _npu().npu_add_rms_norm_v2(a, b, gamma.npu(), epsilon=EPS)
    y, expected = _rms(x1.double() + x2.double(), gamma.double())
    close(a, y)
    close(b, x1.double() + x2.double())
    close(rstd, expected)
    kept = x1.npu()
    _npu().npu_add_rms_norm_v2_functional(kept, x2.npu(), gamma.npu(), epsilon=EPS)
    close(kept, x1.double())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_add_rms_norm_cast(dtype: torch.dtype) -> None:
    """npu_add_rms_norm_cast gives y in float32 and in the dtype of x."""

    def formula(x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, rstd = _rms(x1 + x2, gamma)
        return y, y, rstd, x1 + x2

    tensors = _data((4, 48), (4, 48), (48,))
    call = lambda *a: _npu().npu_add_rms_norm_cast(*a, epsilon=EPS)  # noqa: E731
    agrees(call, formula, tensors, dtype, backward=False)
    with refuses("must be float16 or bfloat16"):
        call(*(t.npu() for t in tensors))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gemma_rms_norm(dtype: torch.dtype) -> None:
    """npu_gemma_rms_norm multiplies by 1 + gamma."""
    call = lambda *a: _npu().npu_gemma_rms_norm(*a, epsilon=EPS)  # noqa: E731
    agrees(call, lambda x, gamma: _rms(x, gamma, 1.0), _data((4, 6, 48), (48,)), dtype, backward=False)


def test_gemma_rms_norm_drops_gradients() -> None:
    """Without a derivative its backward warns and leaves inputs without a gradient, as torch_npu does."""
    x, gamma = (t.npu().requires_grad_() for t in _data((4, 48), (48,)))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        _npu().npu_gemma_rms_norm(x, gamma)[0].sum().backward()
    assert x.grad is None
    assert gamma.grad is None


LAYER_DTYPES = [*((d, d, d, d) for d in FLOATS), *((d, d, torch.float32, torch.float32) for d in HALVES)]


@pytest.mark.parametrize("dtypes", LAYER_DTYPES, ids=str)
def test_add_layer_norm(dtypes: tuple[torch.dtype, ...]) -> None:
    """npu_add_layer_norm gives y, mean, rstd and the sum; y has gradients of all four inputs."""

    def formula(x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> tuple[Any, ...]:
        return *_layer(x1 + x2, gamma, beta), x1 + x2

    call = lambda *a: _npu().npu_add_layer_norm(*a, EPS, True)  # noqa: E731
    agrees(call, formula, _data((4, 6, 48), (4, 6, 48), (48,), (48,)), dtypes, node="NpuAddLayerNormBackward")


def test_add_layer_norm_passes_the_gradient_of_the_sum() -> None:
    """The gradient that reaches the sum is added to that of the norm."""
    tensors = _data((4, 48), (4, 48), (48,), (48,))
    here = [t.npu().requires_grad_() for t in tensors]
    there = [t.double().requires_grad_() for t in tensors]
    y, _, _, x = _npu().npu_add_layer_norm(*here, EPS, True)
    (y.square().sum() + 3 * x.square().sum()).backward()
    total = there[0] + there[1]
    (_layer(total, there[2], there[3])[0].square().sum() + 3 * total.square().sum()).backward()
    for one, value in zip(here, there, strict=True):
        close(one.grad, value.grad)


def test_add_layer_norm_refuses() -> None:
    """Two dtypes of 16 bits and gamma that is narrower than the sum do not go together."""
    x, gamma = torch.ones(4, 48), torch.ones(48)
    with refuses("do not go together"):
        _npu().npu_add_layer_norm(x.half().npu(), x.bfloat16().npu(), gamma.npu(), gamma.npu())
    with refuses("does not go with a sum"):
        _npu().npu_add_layer_norm(x.npu(), x.npu(), gamma.half().npu(), gamma.half().npu())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_deep_norm(dtype: torch.dtype) -> None:
    """npu_deep_norm is the layer norm of alpha x + gx; it returns mean, rstd, y, and y has gradients of all inputs."""

    def formula(x: torch.Tensor, gx: torch.Tensor, beta: torch.Tensor, gamma: torch.Tensor) -> tuple[Any, ...]:
        y, mean, rstd = _layer(0.4 * x + gx, gamma, beta)
        return y, mean, rstd

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean, rstd, y = _npu().npu_deep_norm(*tensors, alpha=0.4, epsilon=EPS)
        return y, mean, rstd

    agrees(call, formula, _data((4, 6, 48), (4, 6, 48), (48,), (48,)), dtype, node="NpuDeepNormBackward")


def test_norms_on_a_chip_without_bfloat16() -> None:
    """310P: no bfloat16, no mixed dtypes, 32 bytes at least, an rstd of no use, no gemma."""
    code = """
torch.npu.set_compile_mode(jit_compile=False)  # refused in the first phase, and the queue goes on
one = lambda *shape, dtype=torch.float16: torch.ones(*shape, dtype=dtype).npu()
outcome(lambda: torch_npu.npu_rms_norm(one(4, 16), one(16)))
outcome(lambda: torch_npu.npu_rms_norm(one(4, 16, dtype=torch.bfloat16), one(16, dtype=torch.bfloat16)))
outcome(lambda: torch_npu.npu_rms_norm(one(4, 16), one(16, dtype=torch.float32)))
outcome(lambda: torch_npu.npu_rms_norm(one(4, 8), one(8)))
print(bool(torch_npu.npu_add_rms_norm(one(4, 16), one(4, 16), one(16))[1].cpu().isnan().all()))
outcome(lambda: torch_npu.npu_gemma_rms_norm(one(4, 16), one(16)))
"""
    text = said_on("Ascend310P3", code)
    assert text.startswith("done")
    for part in ("bfloat16, which Ascend310P3", "does not go with x", "at least 32 bytes", "True", "documented for"):
        assert part in text, f"{part!r} is not in:\n{text}"
