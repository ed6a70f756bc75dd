"""quantize_fp8, dequantize_fp8, fp8_scale_update and linear_fp8: against torch's casts, by hand, and their guards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapt.ops.dequantize_fp8 import dequantize_fp8
from llm_adapt.ops.fp8_scale_update import fp8_scale_update
from llm_adapt.ops.linear_fp8 import _shrink, linear_fp8
from llm_adapt.ops.quantize_fp8 import quantize_fp8

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
STEP = {"e4m3": 2.0**-4, "e5m2": 2.0**-3}  # half a step of the mantissa
formats, blocks = st.sampled_from(list(FORMATS)), st.sampled_from(["tensor", "1x128", "128x128"])
sizes = st.tuples(st.integers(1, 140), st.integers(1, 300))


def draw(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers that are the same at each run."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tiles(x: torch.Tensor, block: str) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """The blocks of a matrix by their place, cut out one by one."""
    if block == "tensor":
        return [((), x)]
    rows = 1 if block == "1x128" else 128
    return [
        ((i, j), x[i * rows : (i + 1) * rows, j * 128 : (j + 1) * 128])
        for i in range(-(-x.shape[0] // rows))
        for j in range(-(-x.shape[1] // 128))
    ]


@settings(max_examples=30, deadline=None)
@given(size=sizes, form=formats, block=blocks, power_of_two=st.booleans())
def test_each_block_is_scaled_to_the_largest_number_and_cast_as_torch_casts(
    size: tuple[int, int], form: str, block: str, power_of_two: bool
) -> None:
    """q of a block is torch's cast of the block times largest / amax; the last blocks may be smaller."""
    x = draw(*size)
    q, scale_inv, amax = quantize_fp8(x, format=form, block=block, power_of_two=power_of_two)
    parts, whole = tiles(x, block), dict(tiles(q, block))
    assert amax.numel() == scale_inv.numel() == len(parts)
    for place, part in parts:
        largest = part.abs().max()
        scale = torch.finfo(FORMATS[form]).max / largest
        scale = 2.0 ** torch.floor(torch.log2(scale)) if power_of_two else scale
        assert amax[place] == largest
        torch.testing.assert_close(scale_inv[place], 1 / scale)
        assert torch.equal(whole[place].float(), (part * scale).to(FORMATS[form]).float())


@settings(max_examples=30, deadline=None)
@given(size=sizes, form=formats, block=blocks, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_number_is_off_by_half_a_step_at_most(
    size: tuple[int, int], form: str, block: str, dtype: torch.dtype
) -> None:
    """Back in floating point, each number is itself within half a step of its own size, or of the smallest step."""
    x = draw(*size, dtype=dtype)
    q, scale_inv, amax = quantize_fp8(x, format=form, block=block)
    back = dict(tiles(dequantize_fp8(q, scale_inv, block), block))
    smallest = torch.finfo(FORMATS[form]).smallest_normal / torch.finfo(FORMATS[form]).max
    for place, part in tiles(x.float(), block):
        allowed = STEP[form] * torch.maximum(part.abs(), amax[place] * smallest) * 1.0001
        assert ((back[place] - part).abs() <= allowed).all()


def test_a_given_scale_is_used_and_what_is_too_large_becomes_the_largest() -> None:
    """With a scale that is too large the numbers saturate, where torch's cast to e5m2 gives inf; nan stays nan."""
    x = torch.tensor([1.0, 100.0, -1e9, float("inf"), float("nan")])
    q, scale_inv, amax = quantize_fp8(x, torch.tensor([8.0]))
    assert q.float()[:4].tolist() == [8, 448, -448, 448]
    assert q.float()[4].isnan()
    assert scale_inv.item() == 1 / 8
    assert amax.isnan()
    assert quantize_fp8(x, torch.tensor(1e3), "e5m2")[0].float()[1:4].tolist() == [57344, -57344, 57344]


def test_scales_that_would_not_be_finite() -> None:
    """Of zeros and of inf the scale is 1, of almost nothing the largest float32; min_amax bounds it."""
    x = torch.zeros(4, 128)
    x[1, 0], x[2, 0], x[3, 0] = float("inf"), 1e-38, 1e-6
    _, scale_inv, _ = quantize_fp8(x, block="1x128")
    largest = torch.finfo(torch.float32).max
    assert scale_inv.flatten().tolist()[:2] == [1, 1]
    assert scale_inv[2].item() == (1 / torch.tensor(largest)).item()
    _, bounded, _ = quantize_fp8(x, block="1x128", min_amax=1e-3)
    torch.testing.assert_close(bounded.flatten(), torch.tensor([1e-3, 448, 1e-3, 1e-3]) / 448)


def test_blocks_of_rows_keep_the_leading_axes() -> None:
    """1x128 blocks are of the last axis, whatever comes before it, strided or not."""
    x = draw(3, 4, 200)
    q, scale_inv, amax = quantize_fp8(x, block="1x128")
    assert (q.shape, scale_inv.shape, amax.shape) == ((3, 4, 200), (3, 4, 2), (3, 4, 2))
    turned = quantize_fp8(x.transpose(0, 1), block="1x128")
    assert torch.equal(turned[0].float(), q.float().transpose(0, 1))
    back = dequantize_fp8(q, scale_inv, "1x128", torch.bfloat16)
    assert back.dtype == torch.bfloat16
    torch.testing.assert_close(back.float(), x, rtol=2.0**-3, atol=0.02)
    assert quantize_fp8(torch.zeros(0, 5))[2].item() == 0


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("margin", [0, 3])
def test_delayed_scales_follow_the_history(algorithm: str, margin: int) -> None:
    """The scale is that of the largest or the last amax; the history rotates, and its row 0 is free again."""
    history = torch.tensor([[2.0, 0.0, float("inf"), 1e-44], [8.0, 0.0, 1.0, 0.0], [4.0, 0.0, 1.0, 0.0]])
    scale = torch.tensor([1.0, 5.0, 6.0, 7.0])
    before = history.clone()
    fp8_scale_update(history, scale, "e4m3", algorithm, margin)
    amax = 8.0 if algorithm == "max" else 2.0
    assert scale.tolist() == [448 / amax / 2**margin, 5, 6, torch.finfo(torch.float32).max]
    assert torch.equal(history[:], torch.cat([torch.zeros(1, 4), before[2:], before[:1]]))


def test_a_history_of_one_step_and_the_other_format() -> None:
    """A history of one row is emptied; e5m2 has another largest number."""
    history, scale = torch.tensor([[7.0]]), torch.ones(1)
    fp8_scale_update(history, scale, "e5m2")
    assert (history.item(), scale.item()) == (0, 57344 / 7)


def test_delayed_scaling_settles() -> None:
    """Ten steps of a growing tensor: from the second on, the scale takes the last amax to the largest number."""
    history, scale = torch.zeros(3, 1), torch.ones(1)
    for step in range(1, 11):
        x = draw(4, 8) * step
        _, _, amax = quantize_fp8(x, scale)
        history[0] = torch.maximum(history[0], amax)
        fp8_scale_update(history, scale)
        assert scale.item() == pytest.approx(448 / x.abs().max().item())


def operand(matrix: torch.Tensor, recipe: str, block: str, form: str = "e4m3", power: bool = False) -> torch.Tensor:
    """A matrix rounded to fp8 and back, by the two ops."""
    block = block if recipe == "block" else "tensor"
    q, scale_inv, _ = quantize_fp8(matrix, format=form, block=block, power_of_two=power)
    return dequantize_fp8(q, scale_inv, block)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 140),
    inner=st.integers(1, 140),
    outer=st.integers(1, 140),
    recipe=st.sampled_from(["tensor", "block"]),
    form=formats,
    power=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_linear_layer_multiplies_what_fp8_holds(
    rows: int, inner: int, outer: int, recipe: str, form: str, power: bool, dtype: torch.dtype
) -> None:
    """y, dx, dweight and dbias are products of the rounded operands, with blocks along the axis that is summed."""
    x, weight = (
        draw(rows, inner, dtype=dtype).requires_grad_(),
        draw(outer, inner, dtype=dtype, seed=1).requires_grad_(),
    )
    bias, dy = draw(outer, dtype=dtype, seed=2).requires_grad_(), draw(rows, outer, dtype=dtype, seed=3)
    y = linear_fp8(x, weight, bias, recipe=recipe, gradient_format=form, power_of_two=power)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
    a, w = operand(x, recipe, "1x128", power=power), operand(weight, recipe, "128x128", power=power)
    expected = [
        a @ w.t() + bias.float(),
        operand(dy, recipe, "1x128", form, power) @ w,
        operand(dy.t(), recipe, "1x128", form, power) @ operand(x.t(), recipe, "1x128", power=power).t(),
        dy.float().sum(0),
    ]
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6}[dtype]
    for found, wanted in zip((y, dx, dweight, dbias), expected, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), wanted.detach(), rtol=tolerance, atol=tolerance * 10)


def test_the_linear_layer_uses_the_scales_it_is_given() -> None:
    """x_scale, weight_scale and dy_scale take the place of those that amax gives, each for its own operand."""
    x, weight, dy = draw(6, 8).requires_grad_(), draw(4, 8, seed=1).requires_grad_(), draw(6, 4, seed=2)
    scales = [torch.tensor(4.0), torch.tensor(1000.0), torch.tensor(2.0**-7)]

    def rounded(matrix: torch.Tensor, scale: torch.Tensor, form: str = "e4m3") -> torch.Tensor:
        q, scale_inv, _ = quantize_fp8(matrix, scale, form)
        return q.float() * scale_inv

    y = linear_fp8(x, weight, None, *scales)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    a, w, g = rounded(x, scales[0]), rounded(weight, scales[1]), rounded(dy, scales[2], "e5m2")
    torch.testing.assert_close(y, a @ w.t())
    torch.testing.assert_close(dx, g @ w)
    torch.testing.assert_close(dweight, g.t() @ a)


def test_the_linear_layer_is_near_the_exact_one() -> None:
    """In fp8 a product of many terms is off by a few per cent; leading axes and empty inputs are kept."""
    x, weight = draw(3, 5, 256), draw(16, 256, seed=1)
    exact = torch.nn.functional.linear(x, weight)
    for recipe in ("tensor", "block"):
        found = linear_fp8(x, weight, recipe=recipe)
        assert 1e-4 < ((found - exact).norm() / exact.norm()).item() < 0.06
    assert linear_fp8(torch.zeros(2, 0, 256), weight).shape == (2, 0, 16)


def test_every_option_of_the_linear_layer_changes_it() -> None:
    """No option is without effect, on the result or on a gradient."""
    base = {"x": draw(130, 140), "weight": draw(130, 140, seed=1)}

    def results(**change: Any) -> list[torch.Tensor]:
        arguments = base | change
        leaves = [arguments[name].clone().requires_grad_() for name in ("x", "weight")]
        y = linear_fp8(*leaves, **{k: v for k, v in arguments.items() if k not in ("x", "weight")})
        return [y, *torch.autograd.grad(y, leaves, draw(130, 130, seed=2))]

    plain = results()
    changes: list[dict[str, Any]] = [
        {"bias": torch.ones(130)},
        {"x_scale": torch.tensor(3.0)},
        {"weight_scale": torch.tensor(3.0)},
        {"dy_scale": torch.tensor(3.0)},
        {"recipe": "block"},
        {"gradient_format": "e4m3"},
        {"power_of_two": True},
    ]
    for change in changes:
        assert any(not torch.equal(a, b) for a, b in zip(results(**change), plain, strict=True)), change


def test_a_proof_of_a_large_call_is_made_small() -> None:
    """shrink keeps whole blocks: at most 256 rows and columns."""
    small = _shrink({"x": draw(3, 200, 300), "weight": draw(280, 300), "bias": draw(280)})
    assert [tuple(small[name].shape) for name in ("x", "weight", "bias")] == [(256, 256), (256, 256), (256,)]


FP8 = torch.zeros(2, 200).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize_fp8(torch.zeros(2), format="e3m4"), ValueError, "e3m4"),
        (lambda: quantize_fp8(torch.zeros(2), block="1x32"), ValueError, "1x32"),
        (lambda: quantize_fp8(torch.zeros(2, 2, 2), block="128x128"), ValueError, "matrix"),
        (lambda: quantize_fp8(torch.tensor(1.0), block="1x128"), ValueError, "rows"),
        (lambda: quantize_fp8(torch.zeros(2), min_amax=-1.0), ValueError, "min_amax"),
        (lambda: quantize_fp8(torch.zeros(2), torch.ones(2)), ValueError, "one number"),
        (lambda: quantize_fp8(torch.zeros(2), torch.ones(1), power_of_two=True), ValueError, "as it is"),
        (lambda: quantize_fp8(torch.zeros(2), torch.ones(1), block="1x128"), ValueError, "as it is"),
        (lambda: dequantize_fp8(torch.zeros(2), torch.ones(1)), TypeError, "float8"),
        (lambda: dequantize_fp8(FP8, torch.ones(2)), ValueError, "do not fit"),
        (lambda: dequantize_fp8(FP8, torch.ones(2, 1), "1x128"), ValueError, "do not fit"),
        (lambda: dequantize_fp8(FP8, torch.ones(2, 2), "128x128"), ValueError, "do not fit"),
        (lambda: dequantize_fp8(FP8, torch.ones(1), "1x32"), ValueError, "1x32"),
        (lambda: fp8_scale_update(torch.zeros(2, 3).half(), torch.ones(3)), TypeError, "float32"),
        (lambda: fp8_scale_update(torch.zeros(2, 3), torch.ones(2)), ValueError, "expected"),
        (lambda: fp8_scale_update(torch.zeros(0, 3), torch.ones(3)), ValueError, "expected"),
        (lambda: fp8_scale_update(torch.zeros(2, 3), torch.ones(3), "e3m4"), ValueError, "e3m4"),
        (lambda: fp8_scale_update(torch.zeros(2, 3), torch.ones(3), algorithm="mean"), ValueError, "mean"),
        (lambda: linear_fp8(torch.zeros(2, 3), torch.zeros(4, 5)), ValueError, "expected"),
        (lambda: linear_fp8(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3)), ValueError, "bias"),
        (lambda: linear_fp8(torch.zeros(2, 3), torch.zeros(4, 3), recipe="row"), ValueError, "row"),
        (lambda: linear_fp8(torch.zeros(2, 3), torch.zeros(4, 3), gradient_format="e3m4"), ValueError, "e3m4"),
        (
            lambda: linear_fp8(torch.zeros(2, 3), torch.zeros(4, 3), x_scale=torch.ones(1), recipe="block"),
            ValueError,
            "found by amax",
        ),
        (
            lambda: linear_fp8(torch.zeros(2, 3), torch.zeros(4, 3), None, *[torch.ones(1)] * 3, power_of_two=True),
            ValueError,
            "none is computed",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, error: type[Exception], message: str) -> None:
    """A wrong shape, dtype or option is an error that says which."""
    with pytest.raises(error, match=message):
        call()
