"""Add and RMSNorm: the two lines of a decoder layer as one op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_adapt.ops.add_rms_norm import add_rms_norm
from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy
from llm_adapt.ops.rms_norm import FORMS, rms_norm, shrink_rows
from tests.ops.norm_checks import FLOATS, agree, hidden_states, results, upstream_norm

FAMILIES = [
    ("llama", "LlamaRMSNorm", "cast_first", "promoted"),
    ("gemma2", "Gemma2RMSNorm", "one_plus", "sum"),
    ("gpt_oss", "GptOssRMSNorm", "standard", "sum"),
]


def _drawn(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "name", "form", "result_dtype"), FAMILIES)
def test_it_is_the_addition_and_the_models_norm(
    family: str, name: str, form: Any, result_dtype: Any, dtype: torch.dtype
) -> None:
    """Both outputs and all gradients equal those of residual + x followed by the model's own norm, bit by bit."""
    x, residual, weight = (_drawn(*s, dtype=dtype, seed=i) for i, s in enumerate([(3, 5, 33), (3, 5, 33), (33,)]))

    def upstream(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        model = upstream_norm(family, name, weight, 1e-5)
        h = residual + x
        return torch.func.functional_call(model, {"weight": weight}, (h,)), h

    expected, theirs = results(upstream, x, residual, weight)
    found, ours = results(add_rms_norm, x, residual, weight, eps=1e-5, form=form, result_dtype=result_dtype)
    agree(found + ours, expected + theirs)


@given(
    hidden_states(),
    st.sampled_from(FLOATS),
    st.sampled_from(FLOATS),
    st.sampled_from(FORMS),
    st.sampled_from(["sum", "x", "weight", "promoted"]),
)
def test_it_is_the_sum_then_rms_norm(
    x: torch.Tensor, residual_dtype: torch.dtype, weight_dtype: torch.dtype, form: Any, result_dtype: Any
) -> None:
    """For every shape, stride, dtype and option: h = x + residual in torch's dtype, y = rms_norm(h)."""
    residual, weight = _drawn(*x.shape, dtype=residual_dtype), _drawn(x.shape[-1], dtype=weight_dtype)
    y, h = add_rms_norm(x, residual, weight, form=form, result_dtype=result_dtype)
    plain = result_dtype if result_dtype in ("weight", "promoted") else "x"
    expected = rms_norm(x + residual, weight, form=form, result_dtype=plain)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, expected.to(x.dtype) if result_dtype == "x" else expected)


def test_a_float32_residual_stays_float32() -> None:
    """With a float32 residual, as Megatron's fp32_residual_connection has it, h is float32 and y what was asked."""
    x, residual = _drawn(4, 8, dtype=torch.bfloat16), _drawn(4, 8, seed=1)
    assert [t.dtype for t in add_rms_norm(x, residual)] == [torch.float32, torch.float32]
    assert [t.dtype for t in add_rms_norm(x, residual, result_dtype="x")] == [torch.bfloat16, torch.float32]


def test_the_sum_passes_its_gradient_on() -> None:
    """x and residual have the same gradient: through the norm, and through h."""
    _, (dx, dresidual, _) = results(add_rms_norm, _drawn(4, 8), _drawn(4, 8, seed=1), _drawn(8, seed=2))
    assert torch.equal(dx, dresidual)


def test_torchs_kernel_serves_one_dtype_only() -> None:
    """torch's kernel serves equal dtypes, and leaves mixed ones to the reference."""
    x, weight = _drawn(4, 8, dtype=torch.bfloat16), _drawn(8, dtype=torch.bfloat16)
    with using(Policy(order=("torch_native",))):
        add_rms_norm(x, x, weight)
        add_rms_norm(x, x.float(), weight)
        served = [(b.choice.library, b.choice.refusals) for b in add_rms_norm._dispatcher.table.values()]
    assert served == [("torch_native", {}), ("reference", {"torch_native": "takes tensors of one dtype"})]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "pass equal shapes", {"residual": torch.ones(1, 4)}),
        (TypeError, "residual is torch.int64", {"residual": torch.ones(2, 4, dtype=torch.long)}),
        (TypeError, "x is torch.int64", {"x": torch.ones(2, 4, dtype=torch.long)}),
        (ValueError, "form='gemma' was asked", {"form": "gemma"}),
        (ValueError, "result_dtype='h' was asked", {"result_dtype": "h"}),
        (ValueError, r"weight has shape \(3,\)", {"weight": torch.ones(3)}),
        (ValueError, "result_dtype='promoted' speaks of weight", {"weight": None, "result_dtype": "promoted"}),
    ],
)
def test_what_cannot_be_is_refused(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    """Each guard says what was asked, what was found and what to pass."""
    call = {"x": torch.ones(2, 4), "residual": torch.ones(2, 4), "weight": torch.ones(4)}
    with pytest.raises(error, match=message):
        add_rms_norm(**call | arguments)


def test_a_large_call_is_proved_on_some_of_its_rows() -> None:
    """shrink narrows x and residual alike."""
    found = shrink_rows({"x": torch.empty(2, 4096, 512), "residual": torch.empty(4096, 2, 512).transpose(0, 1)})
    assert found["x"].shape == found["residual"].shape
    assert found["x"].numel() <= 2**18
    assert not found["residual"].is_contiguous()
