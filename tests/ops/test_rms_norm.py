"""RMSNorm: the reference is what transformers, torch and Megatron-Core compute, in each of its forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.torch_norm import L2Norm, WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from llm_adapt.ops.rms_norm import FORMS, rms_norm, shrink_rows
from tests.ops.norm_checks import FLOATS, agree, hidden_states, results, upstream_norm

LLAMA = [
    ("llama", "LlamaRMSNorm"),
    ("qwen2", "Qwen2RMSNorm"),
    ("qwen3", "Qwen3RMSNorm"),
    ("mistral", "MistralRMSNorm"),
    ("mixtral", "MixtralRMSNorm"),
    ("deepseek_v3", "DeepseekV3RMSNorm"),
]
FAMILIES = [
    *((family, name, "cast_first", "promoted") for family, name in LLAMA),
    ("gemma2", "Gemma2RMSNorm", "one_plus", "x"),
    ("gemma3", "Gemma3RMSNorm", "one_plus", "x"),
    ("gpt_oss", "GptOssRMSNorm", "standard", "x"),
]
MIXED = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)]


def _drawn(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("x_dtype", "weight_dtype"), MIXED)
@pytest.mark.parametrize(("family", "name", "form", "result_dtype"), FAMILIES)
def test_each_form_is_its_models_norm(
    family: str, name: str, form: Any, result_dtype: Any, x_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    """Outputs and gradients equal those of the model's own class bit by bit, also with a float32 weight on 16 bits."""
    x, weight = _drawn(3, 5, 65, dtype=x_dtype), _drawn(65, dtype=weight_dtype, seed=1)

    def upstream(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        model = upstream_norm(family, name, weight, 1e-5)
        return torch.func.functional_call(model, {"weight": weight}, (x,))

    (expected,), theirs = results(upstream, x, weight)
    (found,), ours = results(rms_norm, x, weight, eps=1e-5, form=form, result_dtype=result_dtype)
    agree([found, *ours], [expected, *theirs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_standard_form_is_torchs_and_megatrons(dtype: torch.dtype) -> None:
    """The default is what WrappedTorchNorm builds for RMSNorm, torch.nn.RMSNorm."""
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=1, normalization="RMSNorm")
    norm = WrappedTorchNorm(config, 64, eps=1e-5).to(dtype)
    x, weight = _drawn(4, 64, dtype=dtype), _drawn(64, dtype=dtype, seed=1)

    def upstream(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    (expected,), theirs = results(upstream, x, weight)
    (found,), ours = results(rms_norm, x, weight, eps=1e-5)
    assert isinstance(norm, torch.nn.RMSNorm)
    agree([found, *ours], [expected, *theirs], rtol=1e-6 if dtype == torch.float32 else 2**-8)


def test_zero_centered_gamma_is_one_plus_rounded() -> None:
    """Megatron adds 1 in the weight's dtype, as does MuseSpark in transformers; Gemma adds it in float32."""
    x, weight = _drawn(4, 64, dtype=torch.bfloat16), _drawn(64, dtype=torch.bfloat16, seed=1)
    expected = F.rms_norm(x, (64,), weight + 1, 1e-6)
    assert torch.equal(rms_norm(x, weight, form="one_plus_rounded"), expected)
    assert not torch.equal(rms_norm(x, weight, form="one_plus"), expected)


def test_no_weight_is_megatrons_l2_norm() -> None:
    """Without a weight it is L2Norm of Megatron-Core."""
    x = _drawn(4, 64, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x), L2Norm(64)(x))


@given(hidden_states(), st.sampled_from(FLOATS), st.sampled_from(FORMS), st.sampled_from(["x", "weight", "promoted"]))
def test_any_shape_stride_and_dtype(x: torch.Tensor, dtype: torch.dtype, form: Any, result_dtype: Any) -> None:
    """For every shape, stride and pair of dtypes the result is the formula's in float64, in the dtype asked for."""
    weight = _drawn(x.shape[-1], dtype=dtype)
    found = rms_norm(x, weight, form=form, result_dtype=result_dtype)
    wide = x.double()
    w = weight.double() + (1 if form.startswith("one_plus") else 0)
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w
    assert found.dtype == {"x": x.dtype, "weight": dtype, "promoted": torch.promote_types(x.dtype, dtype)}[result_dtype]
    coarsest = max(torch.finfo(x.dtype).eps, torch.finfo(dtype).eps, torch.finfo(found.dtype).eps)
    torch.testing.assert_close(found.double(), expected, rtol=4 * coarsest, atol=8 * coarsest)


@given(hidden_states())
def test_arguments_are_left_alone(x: torch.Tensor) -> None:
    """The op never changes its inputs."""
    weight = _drawn(x.shape[-1])
    before = x.clone(), weight.clone()
    rms_norm(x, weight, form="one_plus")
    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])


def test_each_form_gives_another_result() -> None:
    """In bfloat16 no two forms agree, so a kernel of one form cannot pass for another."""
    x, weight = _drawn(64, 64, dtype=torch.bfloat16), _drawn(64, dtype=torch.bfloat16, seed=1)
    found = [rms_norm(x, weight, form=form) for form in FORMS]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("form", ["standard", "one_plus"])
def test_16_bits_are_rounded_once(form: Any) -> None:
    """In 16 bits these forms are the float32 norm of the same numbers, rounded at the end."""
    x, weight = _drawn(64, 64, dtype=torch.bfloat16), _drawn(64, dtype=torch.bfloat16, seed=1)
    assert torch.equal(rms_norm(x, weight, form=form), rms_norm(x.float(), weight.float(), form=form).bfloat16())


def test_scaling_x_changes_nothing() -> None:
    """Without eps the norm does not depend on the length of x."""
    x = _drawn(4, 32, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(3 * x, eps=0.0), rms_norm(x, eps=0.0))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "form='gemma' was asked", {"form": "gemma"}),
        (ValueError, "result_dtype='y' was asked", {"result_dtype": "y"}),
        (ValueError, r"weight has shape \(1,\)", {"weight": torch.ones(1)}),
        (ValueError, "flatten them", {"weight": torch.ones(2, 4)}),
        (TypeError, "x is torch.int64", {"x": torch.ones(2, 4, dtype=torch.long)}),
        (TypeError, "weight is torch.int64", {"weight": torch.ones(4, dtype=torch.long)}),
        (ValueError, "x is a scalar", {"x": torch.ones(()), "weight": None}),
        (ValueError, "form='one_plus' speaks of weight", {"weight": None, "form": "one_plus"}),
        (ValueError, "result_dtype='weight' speaks of weight", {"weight": None, "result_dtype": "weight"}),
    ],
)
def test_what_cannot_be_is_refused(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    """Each guard says what was asked, what was found and what to pass."""
    with pytest.raises(error, match=message):
        rms_norm(**{"x": torch.ones(2, 4), "weight": torch.ones(4)} | arguments)


@pytest.mark.parametrize("sizes", [(4096, 1024), (2, 4096, 1024), (2**21,), (1, 2**20, 3)])
def test_a_large_call_is_proved_on_some_of_its_rows(sizes: tuple[int, ...]) -> None:
    """shrink keeps the axes, the size that is normalised, and contiguity; what cannot be narrowed stays."""
    call = {"x": torch.empty(sizes), "weight": torch.empty(sizes[-1]), "form": "cast_first"}
    found = shrink_rows(call)
    assert found["x"].shape[-1] == sizes[-1]
    assert found["x"].ndim == len(sizes)
    assert found["x"].is_contiguous()
    assert found["x"].numel() <= max(2**18, sizes[-1])
    assert found["weight"] is call["weight"]
    strided = shrink_rows({"x": torch.empty(1024, 4096).t()})["x"]
    assert not strided.is_contiguous()
