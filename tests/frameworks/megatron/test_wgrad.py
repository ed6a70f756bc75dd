"""The stand-in for fused_weight_gradient_mlp_cuda: what it accumulates, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapt.frameworks.stand_ins.wgrad import modules, wgrad_gemm_accum_fp16, wgrad_gemm_accum_fp32
from llm_adapt.ops import using
from llm_adapt.ops.dispatch.receipt import receipt

# Largest error relative to the largest value: a few units in the last place of each dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def exact(main_grad: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """main_grad + dy^T x in float64, as an explicit sum over all rows."""
    return main_grad.double() + torch.einsum("no,ni->oi", dy.double().flatten(0, -2), x.double().flatten(0, -2))


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.integers(1, 6), min_size=1, max_size=2),
    sizes=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 2**16),
)
def test_fp32_accumulates_the_float64_sum(
    rows: list[int], sizes: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    """main_grad of float32 receives dy^T x to float32 precision, whatever the dtype of the inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*rows, sizes[0], generator=generator).to(dtype)
    dy = torch.randn(*rows, sizes[1], generator=generator).to(dtype)
    main_grad = torch.randn(sizes[1], sizes[0], generator=generator)
    expected, storage = exact(main_grad, x, dy), main_grad.data_ptr()
    wgrad_gemm_accum_fp32(x, dy, main_grad)
    torch.testing.assert_close(main_grad.double(), expected, rtol=1e-5, atol=1e-5)
    assert main_grad.data_ptr() == storage


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp16_accumulates_in_the_dtype_that_all_share(dtype: torch.dtype) -> None:
    """main_grad of 16 bits receives dy^T x, rounded to its own dtype."""
    x, dy = torch.randn(4, 2, 8).to(dtype), torch.randn(4, 2, 5).to(dtype)
    main_grad = torch.randn(5, 8).to(dtype)
    expected = exact(main_grad, x, dy)
    wgrad_gemm_accum_fp16(x, dy, main_grad)
    assert main_grad.dtype == dtype
    scale = expected.abs().max()
    assert (main_grad.double() - expected).abs().max() <= TOLERANCE[dtype] * scale


def test_a_second_call_adds_to_the_first() -> None:
    """Two micro-batches give the sum of both gradients."""
    x, dy, main_grad = torch.randn(3, 4), torch.randn(3, 2), torch.zeros(2, 4)
    wgrad_gemm_accum_fp32(x, dy, main_grad)
    once = main_grad.clone()
    wgrad_gemm_accum_fp32(x, dy, main_grad)
    torch.testing.assert_close(main_grad, 2 * once)
    assert once.abs().max() > 0


def test_rows_that_are_not_contiguous_are_read_right() -> None:
    """A transposed view ([b, s, h] seen as [s, b, h]) gives the same sum as its copy."""
    x, dy = torch.randn(2, 3, 4).transpose(0, 1), torch.randn(2, 3, 5).transpose(0, 1)
    main_grad = torch.zeros(5, 4)
    expected = exact(main_grad, x, dy)
    wgrad_gemm_accum_fp32(x, dy, main_grad)
    torch.testing.assert_close(main_grad.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fp32_refuses_another_main_grad(dtype: torch.dtype) -> None:
    """A main_grad that is not float32 is refused and stays as it was."""
    main_grad = torch.zeros(2, 4, dtype=dtype)
    with pytest.raises(TypeError, match="float32 was expected"):
        wgrad_gemm_accum_fp32(torch.ones(3, 4), torch.ones(3, 2), main_grad)
    assert main_grad.count_nonzero() == 0


def test_fp16_refuses_mixed_dtypes() -> None:
    """Inputs of one dtype and a main_grad of another are refused."""
    with pytest.raises(TypeError, match="One dtype was expected"):
        wgrad_gemm_accum_fp16(torch.ones(3, 4).half(), torch.ones(3, 2).half(), torch.zeros(2, 4).bfloat16())


def test_sizes_that_do_not_fit_raise() -> None:
    """Rows that do not match are an error, not a broadcast."""
    for wgrad in (wgrad_gemm_accum_fp32, wgrad_gemm_accum_fp16):
        with pytest.raises(ValueError, match="were expected"):
            wgrad(torch.ones(3, 4), torch.ones(2, 2), torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_add_nothing(dtype: torch.dtype) -> None:
    """A micro-batch without tokens leaves main_grad as it is."""
    main_grad = torch.randn(2, 4)
    expected = main_grad.clone()
    wgrad_gemm_accum_fp32(torch.ones(0, 4, dtype=dtype), torch.ones(0, 2, dtype=dtype), main_grad)
    assert torch.equal(main_grad, expected)
    narrow = main_grad.to(dtype)
    wgrad_gemm_accum_fp16(torch.ones(0, 3, 4, dtype=dtype), torch.ones(0, 3, 2, dtype=dtype), narrow)
    assert torch.equal(narrow, expected.to(dtype))


def test_fp32_takes_inputs_of_two_dtypes() -> None:
    """A gradient of float32 beside an input of bfloat16 is added in float32."""
    x, dy, main_grad = torch.randn(3, 4).bfloat16(), torch.randn(3, 2), torch.zeros(2, 4)
    wgrad_gemm_accum_fp32(x, dy, main_grad)
    torch.testing.assert_close(main_grad, dy.t() @ x.float())


def test_the_operator_computes_it() -> None:
    """Both functions are calls of wgrad_accumulate: a library that the policy chooses serves them."""
    for library in ("reference", "torch_native"):
        for wgrad, dtype in ((wgrad_gemm_accum_fp32, torch.bfloat16), (wgrad_gemm_accum_fp16, torch.bfloat16)):
            before = calls_of(library)
            grad = torch.zeros(2, 4) if wgrad is wgrad_gemm_accum_fp32 else torch.zeros(2, 4, dtype=dtype)
            with using(f"wgrad_accumulate={library}"):
                wgrad(torch.ones(3, 4, dtype=dtype), torch.ones(3, 2, dtype=dtype), grad)
                assert calls_of(library) == before + 1
            assert grad.eq(3).all()


def calls_of(library: str) -> int:
    """How often a library has served the operator in this block."""
    return sum(row["calls"] for row in receipt() if row["op"] == "wgrad_accumulate" and row["library"] == library)


def test_the_package_has_the_two_functions_and_nothing_else() -> None:
    """A name that the stand-in does not compute is an AttributeError."""
    package = modules()["fused_weight_gradient_mlp_cuda"]
    assert {name for name in vars(package) if not name.startswith("__")} == {
        "wgrad_gemm_accum_fp32",
        "wgrad_gemm_accum_fp16",
    }
