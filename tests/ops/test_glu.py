"""Gated linear units against those of transformers, Megatron-Core and torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from llm_adapt.ops.activation import FUNCTIONS
from llm_adapt.ops.dispatch.proof import run_op
from llm_adapt.ops.glu import LAYOUTS, glu, split

reference = glu.op.reference


@pytest.fixture(autouse=True)
def eagerly() -> Iterator[None]:
    """Megatron's functions are compiled; here they run as they are written."""
    with torch.compiler.set_stance("force_eager"):
        yield


def draw(*sizes: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers in float64."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(theirs: Callable[..., torch.Tensor], tensors: dict[str, torch.Tensor], **options: Any) -> None:
    """Their function and the reference have one result and one gradient of each tensor."""
    expected = run_op(glu.op, theirs, tensors)
    found = run_op(glu.op, lambda **given: reference(**given, **options), tensors)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_swiglu_of_megatron() -> None:
    """activation="silu" is Megatron's bias_swiglu_impl, with and without bias."""
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    same(lambda x: bias_swiglu_impl(x, None), {"x": draw(3, 5, 32)})
    same(lambda x, bias: bias_swiglu_impl(x, bias), {"x": draw(7, 32), "bias": draw(32, seed=1)})


def test_weighted_swiglu_of_megatron() -> None:
    """weights are Megatron's router probabilities, with their gradient."""
    from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl

    tensors = {"x": draw(7, 32), "weights": draw(7, 1, seed=1)}
    same(lambda x, weights: weighted_bias_swiglu_impl(x, None, weights), tensors)


def test_geglu_of_megatron() -> None:
    """activation="gelu_tanh" is Megatron's bias_geglu_impl, to the eight digits of its constants."""
    from megatron.core.fusions.fused_bias_geglu import bias_geglu_impl

    same(lambda x: bias_geglu_impl(x, None), {"x": draw(7, 32)}, activation="gelu_tanh")
    tensors = {"x": draw(7, 32), "bias": draw(32, seed=1)}
    same(lambda x, bias: bias_geglu_impl(x, bias), tensors, activation="gelu_tanh")


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("limit", [None, 0.7])
def test_quick_geglu_of_megatron(offset: float, limit: float | None) -> None:
    """activation="quick_gelu" with weights, up_offset and limit is Megatron's weighted_bias_quick_geglu_impl."""
    from megatron.core.fusions.fused_bias_geglu import weighted_bias_quick_geglu_impl as theirs

    options = {"activation": "quick_gelu", "up_offset": offset, "limit": limit}
    tensors = {"x": draw(7, 32), "weights": draw(7, 1, seed=1)}
    same(lambda x, weights: theirs(x, None, weights, False, offset, limit), tensors, **options)
    if limit is None:
        tensors["bias"] = draw(32, seed=2)
        same(lambda x, weights, bias: theirs(x, bias, weights, False, offset), tensors, **options)


def test_the_bias_is_added_before_the_clamp() -> None:
    """bias, limit, activation and offset come in the order of Megatron's unfused MLP; its fused form clamps first."""
    from megatron.core.fusions.fused_bias_geglu import quick_gelu, weighted_bias_quick_geglu_impl

    def unfused(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        gate, linear = torch.chunk(x + bias, 2, dim=-1)
        return quick_gelu(gate.clamp(min=None, max=0.7)) * (linear.clamp(min=-0.7, max=0.7) + 1.0)

    tensors = {"x": draw(7, 32), "bias": draw(32, seed=2)}
    same(unfused, tensors, activation="quick_gelu", limit=0.7, up_offset=1.0)
    ones = torch.ones(7, 1, dtype=torch.float64)
    fused = weighted_bias_quick_geglu_impl(tensors["x"], tensors["bias"], ones, False, 1.0, 0.7)
    assert (fused - unfused(**tensors)).abs().max() > 0.1


def test_experts_of_gpt_oss() -> None:
    """The interleaved, clamped form with alpha and up + 1 is the gate of GptOssExperts in transformers."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=8, intermediate_size=16, num_local_experts=2)
    experts = GptOssExperts(config)
    options = {"layout": "interleaved", "alpha": experts.alpha, "limit": experts.limit, "up_offset": 1.0}
    same(lambda x: experts._apply_gate(x), {"x": 8 * draw(6, 32)}, **options)


@pytest.mark.parametrize(("family", "activation"), [("Gemma2", "gelu_tanh"), ("Llama", "silu"), ("Qwen3", "silu")])
def test_mlp_of_transformers(family: str, activation: str) -> None:
    """The MLP of gemma2 with gelu_pytorch_tanh, and of llama and qwen3 with silu, is glu between its projections."""
    import transformers

    module = f"transformers.models.{family.lower()}.modeling_{family.lower()}"
    config = getattr(transformers, f"{family}Config")(hidden_size=8, intermediate_size=16, num_attention_heads=2)
    mlp = getattr(__import__(module, fromlist=["x"]), f"{family}MLP")(config).double()
    x = draw(2, 3, 8)
    packed = torch.cat((mlp.gate_proj(x), mlp.up_proj(x)), -1)
    for found in (
        reference(mlp.gate_proj(x), mlp.up_proj(x), activation=activation),
        reference(packed, activation=activation),
    ):
        torch.testing.assert_close(mlp.down_proj(found), mlp(x))


def test_glu_of_torch() -> None:
    """activation="sigmoid" with the gate second is torch.nn.functional.glu."""
    same(lambda x: F.glu(x), {"x": draw(5, 3, 8)}, activation="sigmoid", layout="halves_swapped")


shapes = st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 17))


@given(shapes, st.sampled_from(sorted(FUNCTIONS)), st.sampled_from(LAYOUTS), st.booleans(), st.booleans(), st.data())
def test_layouts_hold_the_same_numbers(
    shape: tuple[int, int, int], activation: str, layout: str, has_bias: bool, has_weights: bool, data: st.DataObject
) -> None:
    """Every layout, packed or separate, strided or not, in every dtype, gives one result."""
    rows, columns, width = shape
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    packed = draw(rows, columns, 4 * width).to(dtype)[..., ::2]
    bias = draw(2 * width, seed=1).to(dtype) if has_bias else None
    weights = draw(rows, columns, 1, seed=2).to(dtype) if has_weights else None
    gate, up = split(packed, layout)
    both = None if bias is None else torch.cat(split(bias, layout))
    found = reference(packed, None, bias, weights, activation=activation, layout=layout)
    assert found.dtype == dtype
    assert torch.equal(found, reference(gate, up, both, weights, activation=activation))


def test_every_flag_changes_the_result() -> None:
    """No option and no optional tensor is ignored."""
    x, base = draw(6, 32), {"limit": None}
    plain = reference(x)
    flags = [{"activation": name} for name in FUNCTIONS if name != "silu"]
    flags += [{"layout": name} for name in LAYOUTS[1:]]
    flags += [{"alpha": 1.702}, {"limit": 0.5}, {"up_offset": 1.0}, {"bias": draw(32)}, {"weights": draw(6, 1)}]
    for flag in flags:
        assert not torch.allclose(reference(x, **(base | flag)), plain), flag


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"x": draw(2, 8), "activation": "swish"}, ValueError, "activation='swish' was asked"),
        ({"x": draw(2, 8), "layout": "packed"}, ValueError, "layout='packed' was asked"),
        ({"x": draw(2, 7)}, ValueError, "last axis of 7"),
        ({"x": draw(2, 8), "alpha": 2.0, "activation": "gelu"}, ValueError, "alpha belongs to 'silu'"),
        ({"x": draw(2, 8), "limit": 0.0}, ValueError, "must be positive"),
        ({"x": draw(2, 8), "up": draw(2, 8), "layout": "interleaved"}, ValueError, "leave the layout out"),
        ({"x": draw(2, 8), "up": draw(1, 8)}, ValueError, "must be equal"),
        ({"x": draw(2, 8), "up": draw(2, 8).float()}, TypeError, "cast one"),
        ({"x": draw(2, 8), "bias": draw(4)}, ValueError, "must broadcast"),
        ({"x": draw(2, 8), "bias": draw(1)}, ValueError, "must broadcast"),
        ({"x": draw(1, 8), "bias": draw(2, 8)}, ValueError, "must broadcast"),
        ({"x": draw(2, 8), "up": draw(2, 8), "bias": draw(8)}, ValueError, "must broadcast"),
        ({"x": draw(2, 8), "weights": draw(2)}, ValueError, "one a row"),
        ({"x": draw(2, 8), "weights": draw(1, 1)}, ValueError, "one a row"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    """Unknown names and shapes that do not fit are errors that say what was found."""
    with pytest.raises(kind, match=text):
        reference(**arguments)


def test_split_refuses_an_unknown_layout() -> None:
    """split knows three layouts."""
    with pytest.raises(ValueError, match="layout='packed'"):
        split(draw(2, 4), "packed")
