"""Single values of the OpenMP kernels: rounding, infinities, NaN, errors, sizes beyond 32 bits, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_adapt.ops.dispatch.call import describe
from llm_adapt.ops.dispatch.choice import refusal
from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy
from llm_adapt.ops.dispatch.proof import prove
from llm_adapt.ops.dispatch.registry import find_op, load_library
from llm_adapt.ops.rms_norm import rms_norm

if load_library("openmp"):
    pytest.skip(load_library("openmp"), allow_module_level=True)

from llm_adapt.ops.kernels.openmp.library import TYPES, function

convert = function("convert", "pi pi l")
values_of = function("function", "i pp l")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """The numbers that tests draw are the same in each run."""
    torch.manual_seed(0)


def computed(name: str, **arguments: Any) -> Any:
    """What our kernel of an op returns, asked directly."""
    return find_op(name).kernels["openmp"].function(**arguments)


def reason(name: str, **arguments: Any) -> str:
    """Why our kernel refuses a call."""
    op = find_op(name)
    return refusal(op, op.kernels["openmp"], describe(op.name, op.signature, op.bind(**arguments), op.lists))


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit by bit, any NaN equal to any other."""
    is_nan = torch.isnan(expected)
    kind = torch.int32 if expected.dtype == torch.float32 else torch.int16
    numbers = torch.equal(found.view(kind)[~is_nan], expected.view(kind)[~is_nan])
    return numbers and torch.equal(torch.isnan(found), is_nan)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_is_that_of_torch(dtype: torch.dtype) -> None:
    """Four million float32 of any bits, halfway cases among them, round as x.to(dtype) does; NaN stays NaN."""
    drawn = torch.randint(-(2**31), 2**31, (2**22,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    drawn[::2] &= ~0x1FFF  # ties of float16
    drawn[1::4] = (drawn[1::4] & ~0xFFFF) | 0x8000  # ties of bfloat16
    x = drawn.view(torch.float32)
    y = torch.empty(x.shape, dtype=dtype)
    convert(x.data_ptr(), 0, y.data_ptr(), TYPES[dtype], x.numel())
    assert same_bits(y, x.to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_widening_is_exact(dtype: torch.dtype) -> None:
    """Each of the 65536 numbers of 16 bits becomes the float32 of the same value."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    y = torch.empty(x.shape)
    convert(x.data_ptr(), TYPES[dtype], y.data_ptr(), 0, x.numel())
    assert same_bits(y, x.float())


@pytest.mark.parametrize(
    ("which", "expected", "most"), [(0, torch.exp, 2.0), (1, torch.tanh, 3.0)], ids=["exp", "tanh"]
)
def test_functions_are_exact_to_a_few_roundings(which: int, expected: Any, most: float) -> None:
    """Within a few units of 2^-24, over all that does not overflow."""
    x = torch.linspace(-86.9, 88.7, 1_000_001)
    y = torch.empty_like(x)
    values_of(which, x.data_ptr(), y.data_ptr(), x.numel())
    wanted = expected(x.double())
    assert float(((y - wanted) / wanted).abs().max()) < most * 2.0**-24


def test_functions_at_the_ends() -> None:
    """exp, tanh and erf of infinities, NaN and numbers that overflow are those of torch."""
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 200.0, -200.0, 88.72, 3e38, -3e38, 0.0])
    for which, expected in enumerate((torch.exp, torch.tanh, torch.erf)):
        y = torch.empty_like(x)
        values_of(which, x.data_ptr(), y.data_ptr(), x.numel())
        torch.testing.assert_close(y, expected(x), equal_nan=True)


def test_exp_overflows_where_that_of_torch_does() -> None:
    """Between the largest number and where the exponent ends, too."""
    x = torch.linspace(88.0, 400.0, 1_000_001)
    y = torch.empty_like(x)
    values_of(0, x.data_ptr(), y.data_ptr(), x.numel())
    assert not torch.isnan(y).any()
    certain = (x < 88.722) | (x > 88.723)
    assert torch.equal(torch.isinf(y)[certain], torch.isinf(torch.exp(x))[certain])


def test_erf_is_off_by_less_than_a_millionth() -> None:
    """erf is compared absolutely: gelu adds 1 to it."""
    x = torch.linspace(-6, 6, 1_000_001)
    y = torch.empty_like(x)
    values_of(2, x.data_ptr(), y.data_ptr(), x.numel())
    assert float((y - torch.erf(x.double())).abs().max()) < 1e-6


def test_infinite_and_nan_logits_are_as_in_the_reference() -> None:
    """Minus infinity is a class that cannot be; infinity and NaN come through as in log-sum-exp."""
    rows = torch.zeros(5, 2500)
    rows[0, ::2] = -torch.inf
    rows[1, :2000] = -torch.inf
    rows[2, 1500] = torch.inf
    rows[3, 2400] = torch.nan
    rows[4] = -torch.inf
    target = torch.tensor([1, 2400, 1, 1, 1])
    expected = find_op("softmax_partials").reference(rows, target, with_total=True)
    found = computed("softmax_partials", logits=rows, target=target, with_total=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_an_empty_shard_has_no_gradient() -> None:
    """A shard of padding alone, all minus infinity, gets a gradient of 0 and not NaN."""
    logits = torch.full((3, 40), -torch.inf, requires_grad=True)
    lse, _ = computed("softmax_partials", logits=logits, target=torch.zeros(3, dtype=torch.int64))
    lse.sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(3, 40))


def test_a_row_of_minus_infinity_is_nan_and_a_hidden_row_is_zero() -> None:
    """scaled_masked_softmax tells keys that are masked out from scores that are minus infinity."""
    x = torch.full((1, 1, 2, 8), -torch.inf)
    mask = torch.tensor([[False] * 8, [True] * 8])
    p = computed("scaled_masked_softmax", x=x, mask=mask)
    assert torch.equal(torch.isnan(p), torch.tensor([[[[True] * 8, [False] * 8]]]))
    assert torch.equal(p[0, 0, 1], torch.zeros(8))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_row_that_is_nearly_certain_keeps_its_gradient(dtype: torch.dtype) -> None:
    """Where one key has nearly all the weight, dx is as exact as its dtype: it is not taken from a rounded p."""
    x = torch.tensor([[[[6.0, 0.0, -1.0]]]], dtype=dtype)
    verdict = prove(find_op("scaled_masked_softmax"), find_op("scaled_masked_softmax").kernels["openmp"], {"x": x})
    assert verdict.holds, verdict.reason
    assert verdict.errors["gradient of x"] < 0.2


def test_nan_comes_through_every_activation() -> None:
    """A NaN that goes in comes out, of relu too."""
    x = torch.tensor([[torch.nan, 1.0]])
    for name in ("gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "sigmoid", "silu"):
        y = computed("activation", x=x, function=name)
        assert (bool(torch.isnan(y[0, 0])), bool(torch.isnan(y[0, 1]))) == (True, False), name


def test_activations_at_the_ends_are_those_of_the_reference() -> None:
    """Where exp overflows or vanishes, and at infinities: f(-inf) = -inf * 0 is NaN for silu, as torch has it."""
    x = torch.cat([torch.linspace(-400.0, 400.0, 80_000), torch.tensor([torch.inf, -torch.inf, 3e38, -3e38])])
    for name in ("gelu_tanh", "quick_gelu", "sigmoid", "silu"):
        wanted = find_op("activation").reference(x[None], function=name)
        found = computed("activation", x=x[None], function=name)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-35, equal_nan=True)


def test_all_targets_ignored_is_nan() -> None:
    """The mean of no row is NaN as torch's is; its sum is 0, and no row has a gradient."""
    logits = torch.randn(4, 9, requires_grad=True)
    target = torch.full((4,), -100)
    assert torch.isnan(computed("cross_entropy", logits=logits, target=target)[0])
    loss = computed("cross_entropy", logits=logits, target=target, reduction="sum")[0]
    loss.backward()
    assert (float(loss.detach()), logits.grad.count_nonzero()) == (0.0, 0)


@pytest.mark.parametrize("wrong", [-1, 9, -(2**40)])
def test_a_target_outside_the_classes_is_an_error(wrong: int) -> None:
    """It names the target and the classes, and reads no memory that is not ours."""
    with pytest.raises(IndexError, match=f"target {wrong} was given; the logits have 9 classes"):
        computed("cross_entropy", logits=torch.randn(2, 9), target=torch.tensor([1, wrong]))


@pytest.mark.parametrize("wrong", [-1, 5])
def test_a_position_beyond_the_table_is_an_error(wrong: int) -> None:
    """It names the position and the rows of the tables."""
    x, table = torch.randn(1, 2, 1, 4), torch.randn(5, 4)
    with pytest.raises(IndexError, match=f"position {wrong} was asked; the tables have 5 rows"):
        computed("rope", x=x, cos=table, sin=table, positions=torch.tensor([0, wrong]))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("rms_norm", {"x": torch.randn(4, 8).double()}, "x is torch.float64"),
        ("rms_norm", {"x": torch.randn(4, 8), "weight": torch.randn(7)}, "size of the last axis"),
        ("rms_norm", {"x": torch.randn(4, 8), "form": "one_plus"}, "speaks of a weight"),
        ("rms_norm", {"x": torch.randn(4, 0)}, "at least 2 numbers"),
        ("add_rms_norm", {"x": torch.randn(4, 8), "residual": torch.randn(8)}, "of one shape"),
        ("layer_norm", {"x": torch.randn(4, 2)}, "at least 3 numbers"),
        ("layer_norm", {"x": torch.randn(999, 999), "weight": torch.randn(999)}, "no faster than torch's own"),
        ("glu", {"x": torch.randn(4, 8), "up": torch.randn(4, 8)}, "no faster than torch's own for fewer than 131072"),
        ("glu", {"x": torch.randn(4, 7)}, "even number of columns"),
        ("glu", {"x": torch.randn(4, 8), "limit": -1.0}, "positive limit"),
        ("glu", {"x": torch.randn(999, 999), "up": torch.randn(999, 999), "activation": "gelu"}, "torch's erf"),
        ("activation", {"x": torch.randn(999, 999), "function": "relu"}, "one kernel that torch has"),
        ("activation", {"x": torch.randn(4, 8), "bias": torch.randn(4, 8)}, "a bias of 8 numbers"),
        ("cross_entropy", {"logits": torch.randn(4, 8), "target": torch.zeros(4).long()}, "fewer than 65536"),
        ("cross_entropy", {"logits": torch.randn(4, 8), "target": torch.zeros(3).long()}, "a target for each row"),
        ("cross_entropy", {"logits": torch.randn(4, 8), "target": torch.zeros(4)}, "a target of indices"),
        ("rope", {"x": torch.randn(1, 2, 3, 4), "cos": torch.ones(1, 4), "sin": torch.ones(1, 4)}, "do not fit"),
        ("scaled_masked_softmax", {"x": torch.randn(2, 3, 4, 5), "mask": torch.zeros(3, 5).bool()}, "a boolean mask"),
        ("scaled_masked_softmax", {"x": torch.randn(2, 3, 4, 5), "sinks": torch.zeros(2)}, "one sink a head"),
    ],
)
def test_what_is_refused(name: str, arguments: dict[str, Any], words: str) -> None:
    """A call that the library cannot take, or not faster, is refused with the reason."""
    assert words in reason(name, **arguments)


def test_other_devices_and_transforms_are_refused() -> None:
    """Only tensors on the CPU, outside vmap and torch.compile."""
    op = find_op("rms_norm")
    arguments = op.bind(x=torch.randn(4, 8))
    kernel = op.kernels["openmp"]
    call = describe(op.name, op.signature, op.bind(x=torch.randn(4, 8, device="meta")), op.lists)
    assert refusal(op, kernel, call) != ""
    assert "x is on meta; computes on the CPU" in (kernel.refuses(call) or "")
    transformed = describe(op.name, op.signature, arguments, op.lists, is_transformed=True)
    assert refusal(op, kernel, transformed) == "does not serve inside vmap, grad and jvp"
    compiled = describe(op.name, op.signature, arguments, op.lists, is_compiling=True)
    assert refusal(op, kernel, compiled) == "cannot be traced by torch.compile"


def test_a_gradient_of_a_gradient_is_an_error() -> None:
    """Backward is differentiable once; a second time raises, where silence would give a wrong number."""
    x = torch.randn(4, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(computed("rms_norm", x=x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_the_dispatcher_serves_it() -> None:
    """In an order it serves eager calls, and a call that it refuses goes on to the next."""
    x, weight = torch.randn(4, 64), torch.rand(64)
    op = find_op("rms_norm")
    with using(Policy(order=("openmp", "torch_native"))):
        y = rms_norm(x, weight)
        rms_norm(x.double(), weight.double())
    chosen = [binding.choice.library for binding in rms_norm._dispatcher.bindings.values()]
    assert chosen[-2:] == ["openmp", "torch_native"]
    torch.testing.assert_close(y, op.reference(x, weight))


def test_sizes_beyond_32_bits() -> None:
    """Offsets are counted in 64 bits: a row 2^31 elements behind another is read where it lies."""
    base = torch.empty(2**31 + 2**16, dtype=torch.bfloat16)  # what is not touched takes no memory
    x = base.as_strided((2, 64), (2**31, 1))
    x[0], x[1] = 1.0, torch.arange(64)
    torch.testing.assert_close(computed("rms_norm", x=x), find_op("rms_norm").reference(x))
