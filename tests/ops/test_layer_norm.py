"""LayerNorm: the reference is what torch, Megatron-Core and Nemotron in transformers compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy
from llm_adapt.ops.layer_norm import FORMS, layer_norm
from tests.ops.norm_checks import FLOATS, agree, hidden_states, results

# Torch sums in another order than the reference: a few roundings of the accumulation, and one of the result.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
# On the CPU torch adds up the gradients of weight and bias in bfloat16: 15 rows, 15 roundings.
CLOSE_GRADIENTS = {torch.float32: 1e-5, torch.bfloat16: 2**-4}


def _drawn(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _compared(module: torch.nn.Module, dtype: torch.dtype, form: Any, has_bias: bool = True) -> None:
    """The op and a module with the same weights agree in outputs and gradients."""
    tensors = [_drawn(3, 5, 65, dtype=dtype), _drawn(65, dtype=dtype, seed=1), _drawn(65, dtype=dtype, seed=2)]
    names = ["weight", "bias"] if has_bias else ["weight"]

    def upstream(x: torch.Tensor, *vectors: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, vectors, strict=True)), (x,))

    given = tensors[: 1 + len(names)]
    (expected,), theirs = results(upstream, *given)
    (found,), ours = results(layer_norm, *given, form=form)
    agree([found], [expected], rtol=CLOSE[dtype])
    agree(ours, theirs, rtol=CLOSE_GRADIENTS[dtype])


@pytest.mark.parametrize("dtype", CLOSE)
def test_the_standard_form_is_torchs_and_megatrons(dtype: torch.dtype) -> None:
    """The default is what WrappedTorchNorm builds for LayerNorm, torch.nn.LayerNorm."""
    config = TransformerConfig(num_layers=1, hidden_size=65, num_attention_heads=1)
    module = WrappedTorchNorm(config, 65).to(dtype)
    assert isinstance(module, torch.nn.LayerNorm)
    _compared(module, dtype, "standard")


@pytest.mark.parametrize("dtype", CLOSE)
def test_one_plus_rounded_is_nemotrons(dtype: torch.dtype) -> None:
    """LayerNorm1P adds 1 to the weight in the weight's dtype, as zero-centered gamma in Megatron-Core."""
    _compared(NemotronLayerNorm1P(65).to(dtype), dtype, "one_plus_rounded")


@pytest.mark.parametrize("dtype", CLOSE)
def test_a_weight_without_bias_is_coheres(dtype: torch.dtype) -> None:
    """Without a bias it is the norm of Cohere."""
    _compared(CohereLayerNorm(65).to(dtype), dtype, "standard", has_bias=False)


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_weight_and_bias_are_optional(has_weight: bool, has_bias: bool) -> None:
    """Each may be absent, as in torch."""
    x = _drawn(4, 33)
    weight, bias = _drawn(33, seed=1) if has_weight else None, _drawn(33, seed=2) if has_bias else None
    (expected,), theirs = results(lambda x, w, b: F.layer_norm(x, (33,), w, b, 1e-5), x, weight, bias)
    (found,), ours = results(layer_norm, x, weight, bias)
    agree([found, *ours], [expected, *theirs], rtol=CLOSE[torch.float32])


@given(
    hidden_states(),
    st.sampled_from(FLOATS),
    st.sampled_from(FLOATS),
    st.sampled_from(FORMS),
    st.sampled_from(["x", "weight", "promoted"]),
)
def test_any_shape_stride_and_dtype(
    x: torch.Tensor, dtype: torch.dtype, bias_dtype: torch.dtype, form: Any, result_dtype: Any
) -> None:
    """For every shape, stride and dtypes the result is the formula's in float64, in the dtype asked for."""
    weight, bias = _drawn(x.shape[-1], dtype=dtype), _drawn(x.shape[-1], dtype=bias_dtype, seed=1)
    found = layer_norm(x, weight, bias, form=form, result_dtype=result_dtype)
    w = weight.double() + (0 if form == "standard" else 1)
    expected = F.layer_norm(x.double(), x.shape[-1:], w, bias.double())
    assert found.dtype == {"x": x.dtype, "weight": dtype, "promoted": torch.promote_types(x.dtype, dtype)}[result_dtype]
    coarsest = max(torch.finfo(t).eps for t in (x.dtype, dtype, found.dtype))
    # 64: where all of x is nearly one value, the mean's rounding is scaled up by 1/sqrt(var + eps).
    torch.testing.assert_close(found.double(), expected, rtol=4 * coarsest, atol=64 * coarsest)


def test_each_form_gives_another_result() -> None:
    """In bfloat16 no two forms agree, so a kernel of one form cannot pass for another."""
    x, weight = _drawn(64, 64, dtype=torch.bfloat16), _drawn(64, dtype=torch.bfloat16, seed=1)
    found = [layer_norm(x, weight, form=form) for form in FORMS]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("form", ["standard", "one_plus"])
def test_16_bits_are_rounded_once(form: Any) -> None:
    """In 16 bits it is the float32 norm of the same numbers, rounded at the end."""
    tensors = [_drawn(64, 64, dtype=torch.bfloat16), *(_drawn(64, dtype=torch.bfloat16, seed=i) for i in (1, 2))]
    expected = layer_norm(*(t.float() for t in tensors), form=form).to(torch.bfloat16)
    assert torch.equal(layer_norm(*tensors, form=form), expected)


def test_shifting_x_changes_nothing() -> None:
    """The norm does not depend on the mean of x, which RMSNorm does."""
    x = _drawn(4, 32, dtype=torch.float64)
    torch.testing.assert_close(layer_norm(x + 3), layer_norm(x))


def test_torchs_kernel_is_not_used_where_its_gradients_are_rounded() -> None:
    """On the CPU torch adds up 16-bit gradients of weight and bias in 16 bits; the reference serves those calls."""
    weight = torch.ones(8)
    with using(Policy(order=("torch_native",))):
        for x, w in ((_drawn(4, 8), weight), (_drawn(4, 8).bfloat16(), weight.bfloat16()), (_drawn(4, 8), None)):
            layer_norm(x, w, bias=None)
        served = [b.choice.library for b in layer_norm._dispatcher.table.values()]
    assert served == ["torch_native", "reference", "torch_native"]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "form='cast_first' was asked", {"form": "cast_first"}),
        (ValueError, "result_dtype='y' was asked", {"result_dtype": "y"}),
        (ValueError, r"weight has shape \(1,\)", {"weight": torch.ones(1)}),
        (ValueError, r"bias has shape \(5,\)", {"bias": torch.ones(5)}),
        (TypeError, "x is torch.int64", {"x": torch.ones(2, 4, dtype=torch.long)}),
        (TypeError, "bias is torch.int64", {"bias": torch.ones(4, dtype=torch.long)}),
        (ValueError, "x is a scalar", {"x": torch.ones(()), "weight": None, "bias": None}),
        (ValueError, "form='one_plus' speaks of weight", {"weight": None, "form": "one_plus"}),
        (ValueError, "result_dtype='weight' speaks of weight", {"weight": None, "result_dtype": "weight"}),
    ],
)
def test_what_cannot_be_is_refused(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    """Each guard says what was asked, what was found and what to pass."""
    with pytest.raises(error, match=message):
        layer_norm(**{"x": torch.ones(2, 4), "weight": torch.ones(4), "bias": torch.ones(4)} | arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_far_from_zero_has_the_right_gradient(dtype: torch.dtype) -> None:
    """Where torch keeps the mean in 16 bits for backward, as on the CPU, torch does not serve."""
    x = (_drawn(4, 64) * 0.02 + 0.55).to(dtype)
    dy = _drawn(4, 64, dtype=dtype, seed=1)
    found, expected = x.clone().requires_grad_(), x.double().requires_grad_()
    with using(Policy(order=("torch_native",))):
        layer_norm(_drawn(4, 64, dtype=dtype).requires_grad_())  # rows on which torch's kernel passes its proof
        layer_norm(found).backward(dy)
    F.layer_norm(expected, (64,)).backward(dy.double())
    assert found.grad is not None
    assert expected.grad is not None
    assert (found.grad - expected.grad).abs().max() <= torch.finfo(dtype).eps * expected.grad.abs().max()
