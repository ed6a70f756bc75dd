"""Quantisation on the simulated NPU: torch_npu's operators against integer arithmetic in float64.

Rounding is to the nearest, halves to even. int4 is packed, eight to an int32, the first in the low bits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.simulators.npu_checks import HALVES, close, refuses, said_on

pytestmark = pytest.mark.simulator("npu")

M, K, N = 6, 32, 16


def _npu() -> Any:
    import torch_npu

    return torch_npu


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _whole(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.int8)


def _int4(*shape: int) -> torch.Tensor:
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(sum(shape)))


def _packed(values: torch.Tensor) -> torch.Tensor:
    places = values.reshape(*values.shape[:-1], -1, 8)
    words = [sum((v & 15) << 4 * i for i, v in enumerate(word)) for word in places.reshape(-1, 8).tolist()]
    return torch.tensor([word - 2**32 if word >= 2**31 else word for word in words]).int().reshape(places.shape[:-1])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("smooth", [False, True])
def test_dynamic_quant(dtype: torch.dtype, smooth: bool) -> None:
    """npu_dynamic_quant: by token, scale = amax / 127 in float32; a token of zeros stays zeros."""
    x, factors = _random(2, M, K, dtype=dtype), _random(K, dtype=dtype)
    x[0, 1] = 0
    y, scale = _npu().npu_dynamic_quant(x.npu(), smooth_scales=factors.npu() if smooth else None)
    value = x.float() * factors.float() if smooth else x.float()
    expected = value.abs().amax(-1) / 127
    assert scale.dtype == torch.float32
    assert torch.equal(scale.cpu(), expected)
    assert torch.equal(y.cpu(), (value / expected[..., None]).nan_to_num(0.0).round().to(torch.int8))


def test_dynamic_quant_by_groups() -> None:
    """Each group of tokens has its own smooth_scales; group_index are the ends."""
    x, factors = _random(M, K).half(), _random(2, K).half()
    given = {"smooth_scales": factors.npu(), "group_index": torch.tensor([2, M]).int().npu()}
    y, scale = _npu().npu_dynamic_quant(x.npu(), **given)
    value = torch.cat([x[:2].float() * factors[0].float(), x[2:].float() * factors[1].float()])
    assert torch.equal(scale.cpu(), value.abs().amax(-1) / 127)
    assert torch.equal(y.cpu(), (value / scale.cpu()[:, None]).round().to(torch.int8))


def test_dynamic_quant_to_int4() -> None:
    """dst_type quint4x2: amax / 7, packed."""
    x = _random(M, K).half()
    y, scale = _npu().npu_dynamic_quant(x.npu(), dst_type=torch.quint4x2)
    assert torch.equal(scale.cpu(), x.float().abs().amax(-1) / 7)
    assert torch.equal(y.cpu(), _packed((x.float() / scale.cpu()[:, None]).round().long()))


def test_dynamic_quant_asymmetric() -> None:
    """scale = (max - min) / 255, offset = 127 - max / scale."""
    x = _random(M, K).half()
    y, scale, offset = (t.cpu() for t in _npu().npu_dynamic_quant_asymmetric(x.npu()))
    most, least = x.float().amax(-1), x.float().amin(-1)
    close(scale, (most.double() - least) / 255)
    close(offset, 127 - most.double() / scale)
    assert torch.equal(y, (x.float() / scale[:, None] + offset[:, None]).round().clamp(-128, 127).to(torch.int8))


@pytest.mark.parametrize(
    ("x", "given", "text"),
    [
        (torch.ones(M, K), {}, "input must be Half, BFloat16, not Float"),
        (torch.ones(M, K).half(), {"smooth_scales": torch.ones(K)}, "must have the dtype of input"),
        (torch.ones(M, K).half(), {"smooth_scales": torch.ones(K - 1).half()}, "smooth_scales .* must be"),
        (torch.ones(M, K).half(), {"quant_mode": "perchannel"}, "only quant_mode pertoken is modelled"),
        (torch.ones(M, K).half(), {"dst_type": torch.float8_e4m3fn}, "is not modelled, only int8"),
        (torch.ones(M, K).half(), {"group_index": torch.tensor([M]).int()}, "group_index needs smooth_scales"),
    ],
)
def test_dynamic_quant_refuses(x: torch.Tensor, given: dict[str, Any], text: str) -> None:
    """Each documented limit of npu_dynamic_quant, and what is not modelled."""
    on_npu = {name: one.npu() if isinstance(one, torch.Tensor) else one for name, one in given.items()}
    with refuses(text):
        _npu().npu_dynamic_quant(x.npu(), **on_npu)


@pytest.mark.parametrize(("kind", "low", "high"), [(torch.qint8, -128, 127), (torch.quint8, 0, 255)])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_quantize_divides(kind: torch.dtype, low: int, high: int, axis: int | None) -> None:
    """div_mode=True: round(x / scales + zero_points) along an axis, within the range of the result."""
    x = _random(M, K) * 50
    size = 1 if axis is None else x.shape[axis]
    scales, zeros = torch.rand(size) + 0.1, torch.arange(size).int()
    y = _npu().npu_quantize(x.npu(), scales.npu(), zeros.npu(), kind, -1 if axis is None else axis, True)
    shape = [-1, 1] if axis == 0 else [1, -1]
    expected = (x / scales.reshape(shape) + zeros.reshape(shape)).round().clamp(low, high)
    assert torch.equal(y.cpu().float(), expected)


@pytest.mark.parametrize("axis", [-1, -2])
def test_quantize_multiplies(axis: int) -> None:
    """div_mode=False: round(x scales + zero_points), along the last axis or the one before."""
    x, scales = _random(M, K).half() * 50, _random(K if axis == -1 else M).half()
    zeros = scales * 2
    shape = [1, -1] if axis == -1 else [-1, 1]
    value = x.float() * scales.float().reshape(shape) + zeros.float().reshape(shape)
    y = _npu().npu_quantize(x.npu(), scales.npu(), zeros.npu(), torch.qint8, axis, False)
    assert torch.equal(y.cpu(), value.round().clamp(-128, 127).to(torch.int8))
    if axis == -1:
        y = _npu().npu_quantize(x.npu(), scales.npu(), None, torch.quint4x2, axis, False)
        assert torch.equal(y.cpu(), _packed((x.float() * scales.float()).round().clamp(-8, 7).long()))


@pytest.mark.parametrize("dtype", HALVES)
def test_anti_quant(dtype: torch.dtype) -> None:
    """npu_anti_quant: (x + offset) scale, of int8 and of packed int4."""
    scale, offset = _random(K), _random(K).flip(0)
    x, small = _whole(M, K), _int4(M, K)
    given = {"offset": offset.npu(), "dst_dtype": dtype}
    y = _npu().npu_anti_quant(x.npu(), scale.npu(), **given)
    close(y, (x.double() + offset) * scale)
    y = _npu().npu_anti_quant(_packed(small).npu(), scale.npu(), src_dtype=torch.quint4x2, **given)
    close(y, (small.double() + offset) * scale)


def test_quantize_and_anti_quant_refuse() -> None:
    """Dtypes and shapes of scales."""
    x = torch.ones(M, K).npu()
    with refuses("scales must have the dtype of input|must have the dtype"):
        _npu().npu_quantize(x, torch.ones(K).half().npu(), None, torch.qint8, -1, False)
    with refuses("scales must have 1 or 32 elements"):
        _npu().npu_quantize(x, torch.ones(5).npu(), None, torch.qint8, -1, True)
    with refuses("scale must be Float, BFloat16"):
        _npu().npu_anti_quant(x.char(), torch.ones(K).half().npu())
    with refuses("scale must have 1 or 32 elements"):
        _npu().npu_anti_quant(x.char(), torch.ones(5).npu())


def test_trans_quant_param() -> None:
    """The float32 cut or rounded to 19 bits, bit 46, and nine bits of offset at bit 37."""
    scale, offset = torch.rand(K) + 0.1, torch.linspace(-300, 300, K)
    bits = scale.view(torch.int32).long()
    plain = _npu().npu_trans_quant_param(scale.npu()).cpu()
    assert torch.equal(plain, (bits & 0xFFFFE000) | (1 << 46))
    shifted = _npu().npu_trans_quant_param(scale.npu(), offset.npu()).cpu()
    nine = offset.round().clamp(-256, 255).long() & 0x1FF
    assert torch.equal(shifted, (bits & 0xFFFFE000) | (1 << 46) | (nine << 37))
    rounded = _npu().npu_trans_quant_param(scale.npu(), round_mode=1).cpu()
    nearest = (rounded & 0xFFFFFFFF).int().view(torch.float32)
    assert ((nearest - scale).abs() <= scale * 2.0**-11).all()
    with refuses("scale must be Float"):
        _npu().npu_trans_quant_param(scale.half().npu())


_BIASES = (None, torch.int32, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("bias_dtype", _BIASES)
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_quant_matmul(bias_dtype: torch.dtype | None, tokens: bool, transposed: bool) -> None:
    """npu_quant_matmul into bfloat16: an int32 bias is added to the sums, others to what the scales make of them."""
    x1, x2, scale, rows = _whole(M, K), _whole(K, N), torch.rand(N), torch.rand(M)
    bias = None if bias_dtype is None else (torch.arange(N) * 100).to(bias_dtype)
    given = {"pertoken_scale": rows.npu() if tokens else None, "bias": None if bias is None else bias.npu()}
    right = x2.t().contiguous().npu().t() if transposed else x2.npu()
    y = _npu().npu_quant_matmul(x1.npu(), right, scale.npu(), output_dtype=torch.bfloat16, **given)
    sums, added = x1.double() @ x2.double(), 0 if bias is None else bias.double()
    factor = scale.double() * (rows.double()[:, None] if tokens else 1)
    close(y, (sums + added) * factor if bias_dtype == torch.int32 else sums * factor + added)


def test_quant_matmul_gives_int8_unless_told() -> None:
    """Without output_dtype the result is int8, its scale packed to 19 bits on the way, its offset added."""
    x1, x2 = _whole(M, K), _whole(K, N)
    sums = x1.double() @ x2.double()
    offset = torch.arange(N).float()
    y = _npu().npu_quant_matmul(x1.npu(), x2.npu(), torch.full((N,), 2.0**-9).npu(), offset=offset.npu())
    assert torch.equal(y.cpu(), (sums / 512 + offset).round().clamp(-128, 127).to(torch.int8))
    whole = _npu().npu_quant_matmul(x1.npu(), x2.npu(), torch.ones(N).npu(), output_dtype=torch.int32)
    assert torch.equal(whole.cpu(), sums.int())
    exact, cut = torch.tensor([1 + 2.0**-10]), torch.tensor([1 + 2.0**-11])
    for scale, value in ((exact, exact), (cut, torch.ones(1))):
        y = _npu().npu_quant_matmul(x1.npu(), x2.npu(), (scale / 64).npu(), output_dtype=torch.float16)
        assert torch.equal(y.cpu(), (sums.float() * (value / 64)).half())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"x1": torch.ones(M, K).int(), "x2": torch.ones(K, N).int()}, "x1 .* and x2|is not modelled, only int8"),
        ({"pertoken_scale": torch.ones(M - 1)}, "pertoken_scale must be"),
        ({"pertoken_scale": torch.ones(M).half()}, "pertoken_scale must be Float"),
        ({"scale": torch.ones(N - 1)}, "scale must have 1 or 16 elements"),
        ({"scale": torch.ones(N).half()}, "scale must be Float, BFloat16"),
        ({"x1": torch.ones(1, 65536).char(), "x2": torch.ones(65536, N).char()}, "must be at most 65535"),
        ({"offset": torch.ones(N)}, "offset goes with an int8 result"),
    ],
)
def test_quant_matmul_refuses(given: dict[str, Any], text: str) -> None:
    """Each documented limit of npu_quant_matmul into bfloat16."""
    every = {"x1": _whole(M, K), "x2": _whole(K, N), "scale": torch.ones(N), **given}
    on_npu = {name: one.npu() for name, one in every.items()}
    with refuses(text):
        _npu().npu_quant_matmul(
            on_npu.pop("x1"), on_npu.pop("x2"), on_npu.pop("scale"), output_dtype=torch.bfloat16, **on_npu
        )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("group", [0, 32])
def test_weight_quant_batchmatmul(dtype: torch.dtype, kind: str, group: int) -> None:
    """npu_weight_quant_batchmatmul: x @ ((weight + offset) scale) + bias, by channel and by groups of rows."""
    rows = 2 * K + 8
    x, weight = _random(M, rows, dtype=dtype), _whole(rows, N).long() if kind == "int8" else _int4(rows, N)
    groups = 3 if group else 1
    scale, offset = _random(groups, N, dtype=dtype), _random(groups, N, dtype=dtype).flip(0)
    bias = _random(N, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    on_npu = (weight.to(torch.int8) if kind == "int8" else _packed(weight)).npu()
    shape = (groups, N) if group else (N,)
    y = _npu().npu_weight_quant_batchmatmul(
        x.npu(), on_npu, scale.reshape(shape).npu(), offset.reshape(shape).npu(), bias=bias.npu(),
        antiquant_group_size=group,
    )  # fmt: skip
    of_rows = torch.arange(rows) // (group or rows)
    close(y, x.double() @ ((weight.double() + offset.double()[of_rows]) * scale.double()[of_rows]) + bias.double())


def test_weight_quant_batchmatmul_refuses() -> None:
    """Dtypes of x, scale and bias; a quantised result is not modelled."""
    x, weight, ones = torch.ones(M, K).half().npu(), _whole(K, N).npu(), torch.ones(N).npu()
    call = _npu().npu_weight_quant_batchmatmul
    with refuses("x must be Half, BFloat16|not implemented"):
        call(x.float(), weight, ones)
    with refuses("antiquant_scale must have the dtype of x"):
        call(x, weight, ones.bfloat16())
    with refuses("bias must be Float with x of BFloat16"):
        call(x.bfloat16(), weight, ones.bfloat16(), bias=ones.bfloat16())
    with refuses("quant_scale and quant_offset are not modelled"):
        call(x, weight, ones.half(), quant_scale=ones)


def test_dequant_swiglu_quant() -> None:
    """npu_dequant_swiglu_quant, dynamic: dequantised sums, silu(right half) times the left, smoothed, by token."""
    x, columns, tokens = _whole(M, K).int() * 9, torch.rand(1, K), torch.rand(M, 1)
    smooth = torch.rand(1, K // 2) + 0.5
    given = {"weight_scale": columns.npu(), "activation_scale": tokens.npu(), "quant_scale": smooth.npu()}
    for left in (False, True):
        y, scale = _npu().npu_dequant_swiglu_quant(x.npu(), quant_mode=1, activate_left=left, **given)
        first, second = (x.double() * columns * tokens).chunk(2, -1)
        gate, other = (first, second) if left else (second, first)
        value = gate * torch.sigmoid(gate) * other * smooth
        close(scale, value.abs().amax(-1) / 127)
        assert ((y.cpu() - value / scale.cpu()[:, None]).abs() <= 0.5 + 1e-3).all()


def test_dequant_swiglu_quant_refuses() -> None:
    """int32 needs activation_scale; groups and static scales are not modelled."""
    x = _whole(M, K).npu()
    with refuses("x of int32 needs activation_scale"):
        _npu().npu_dequant_swiglu_quant(x.int(), quant_mode=1)
    with refuses("static"):
        _npu().npu_dequant_swiglu_quant(x.half(), quant_scale=torch.ones(1).npu(), quant_mode=0)
    with refuses("group_index is not modelled"):
        _npu().npu_dequant_swiglu_quant(x.half(), group_index=torch.tensor([M]).npu(), quant_mode=1)


_NO_FP8 = """
x = torch.ones(4, 64).half().npu()
outcome(lambda: torch_npu.npu_dynamic_mx_quant(x, dst_type=torch.float8_e4m3fn))
outcome(lambda: torch_npu.npu_dynamic_block_quant(x))
outcome(lambda: torch_npu.npu_dynamic_quant(x))
"""


@pytest.mark.parametrize(("model", "last"), [("Ascend910B3", "done"), ("Ascend310P3", "refused")])
def test_formats_that_are_not_modelled_raise(model: str, last: str) -> None:
    """MX and block formats of float8 raise, naming themselves; int8 is documented for A2, A3 and Ascend950."""
    said = [line for line in said_on(model, _NO_FP8).splitlines() if line.startswith(("done", "refused"))]
    assert "aclnnDynamicMxQuant" in said[0]
    assert "aclnnDynamicBlockQuant" in said[1]
    assert said[2].startswith(last)
