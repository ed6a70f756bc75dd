"""Megatron's norms without apex and TransformerEngine: values, gradients, and what the config asks for."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_adapt.adapters.cpu import ADAPTER
from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron import norms, served_norms
from llm_adapt.frameworks.megatron.norms import wrapped, wrapped_served
from llm_adapt.frameworks.megatron.plain_norms import LayerNorm, RMSNorm
from llm_adapt.report import Report
from llm_adapt.settings import resolve

EPS = 1e-5
BOTH = (wrapped, wrapped_served)  # by torch, and by the operators
# Largest error relative to the largest value: a few units in the last place of each dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def config(normalization: str, **values: Any) -> SimpleNamespace:
    """A Megatron config as far as the norms read it."""
    defaults = {
        "layernorm_zero_centered_gamma": False,
        "sequence_parallel": False,
        "persist_layer_norm": True,
        "memory_efficient_layer_norm": True,
    }
    return SimpleNamespace(normalization=normalization, **{**defaults, **values})


def original(cls: type, config: Any, hidden_size: int, eps: float = EPS, **kwargs: Any) -> torch.nn.Module:
    """Stands for Megatron's own `__new__`."""
    raise AssertionError(f"the original was called for {config.normalization}")


def build(
    hidden_size: int, normalization: str, make: Callable[..., Callable[..., torch.nn.Module]] = wrapped, **values: Any
) -> torch.nn.Module:
    """The norm that Megatron gets."""
    return make(original)(object, config(normalization, **values), hidden_size, EPS)


def formula(kind: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Both norms from their papers, in the dtype of x."""
    if kind == "RMSNorm":
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight
    centered = x - x.mean(-1, keepdim=True)
    scaled = centered / torch.sqrt(centered.pow(2).mean(-1, keepdim=True) + EPS) * weight
    return scaled if bias is None else scaled + bias


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> bool:
    """Equal to a few units in the last place of `dtype`, on the scale of the tensor or of the sums behind it."""
    scale = max(scale, float(expected.abs().max()))
    return bool((found.double() - expected).abs().max() <= TOLERANCE[dtype] * scale)


@settings(max_examples=60, deadline=None)
@example(wrapped, "LayerNorm", [2], 2, torch.bfloat16, False, 2)  # a row far from zero for its spread
@given(
    make=st.sampled_from(BOTH),
    kind=st.sampled_from(["LayerNorm", "RMSNorm"]),
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    hidden=st.integers(2, 65),
    dtype=st.sampled_from(list(TOLERANCE)),
    zero_centered=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_are_the_formula(
    make: Callable[..., Any],
    kind: str,
    shape: list[int],
    hidden: int,
    dtype: torch.dtype,
    zero_centered: bool,
    seed: int,
) -> None:
    """For every shape, dtype and weight form, y, dx, dw and db equal the float64 formula of the paper."""
    generator = torch.Generator().manual_seed(seed)
    norm = build(hidden, kind, make, layernorm_zero_centered_gamma=zero_centered)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    norm = norm.to(dtype)
    x = torch.randn(*shape, hidden, generator=generator).to(dtype).requires_grad_()
    y = norm(x)
    dy = torch.randn(y.shape, generator=generator).to(dtype)
    y.backward(dy)

    exact = [tensor.detach().double().requires_grad_() for tensor in (x, *norm.parameters())]
    bias = exact[2] if kind == "LayerNorm" else None
    reference = formula(kind, exact[0], exact[1] + 1 if zero_centered else exact[1], bias)
    reference.backward(dy.double())
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert close(y, reference.detach(), dtype)
    # dx is a difference of terms of this size; for a short row they nearly cancel.
    row = exact[0].detach()
    spread = row.std(-1, correction=0) if kind == "LayerNorm" else row.pow(2).mean(-1).sqrt()
    spread = (spread.pow(2) + EPS).sqrt()
    # torch's LayerNorm on the CPU keeps a row's mean in the dtype of x: its rounding grows by mean / spread in a row.
    offset = 1 + float((row.mean(-1).abs() / spread).max()) if kind == "LayerNorm" else 1.0
    scale = float(dy.abs().max() * (norm.weight.detach().abs().max() + 1) / spread.min())
    summed = float(dy.abs().max()) * row[..., 0].numel() ** 0.5  # dw and db add a rounded term a row
    for found, expected in zip((x, *norm.parameters()), exact, strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        assert close(found.grad, expected.grad, dtype, offset * (scale if found is x else summed))


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_a_new_zero_centered_norm_starts_as_the_plain_one(kind: str, make: Callable[..., Any]) -> None:
    """With zero-centered weights the weight starts at 0 and the output is that of a weight of 1."""
    x = torch.randn(3, 8)
    centered, plain = build(8, kind, make, layernorm_zero_centered_gamma=True), build(8, kind, make)
    assert torch.equal(centered.weight, torch.zeros(8))
    assert torch.equal(plain.weight, torch.ones(8))
    torch.testing.assert_close(centered(x), plain(x))


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_every_parameter_carries_the_sequence_parallel_mark(
    kind: str, sequence_parallel: bool, make: Callable[..., Any]
) -> None:
    """Megatron sums gradients over tensor-parallel ranks by this mark, so it is on weight and bias."""
    norm = build(8, kind, make, sequence_parallel=sequence_parallel)
    marks = {name: parameter.sequence_parallel for name, parameter in norm.named_parameters()}
    names = {"LayerNorm": {"weight", "bias"}, "RMSNorm": {"weight"}}[kind]
    assert marks == dict.fromkeys(names, sequence_parallel)


def test_the_config_chooses_the_class_and_eps_is_kept() -> None:
    """LayerNorm and RMSNorm are torch's own classes by inheritance, with the eps that was asked for."""
    layer = wrapped(original)(object, config("LayerNorm"), 4, 0.5)
    rms = wrapped(original)(object, config("RMSNorm"), 4, 0.25)
    assert isinstance(layer, LayerNorm)
    assert isinstance(layer, torch.nn.LayerNorm)
    assert layer.eps == 0.5
    assert isinstance(rms, RMSNorm)
    assert isinstance(rms, torch.nn.RMSNorm)
    assert rms.eps == 0.25
    by_operators = [build(4, kind, wrapped_served) for kind in ("LayerNorm", "RMSNorm")]
    assert [type(norm) for norm in by_operators] == [served_norms.LayerNorm, served_norms.RMSNorm]
    assert isinstance(by_operators[0], LayerNorm)
    assert isinstance(by_operators[1], RMSNorm)


@pytest.mark.parametrize("make", BOTH)
def test_another_norm_is_left_to_megatron(make: Callable[..., Any]) -> None:
    """A norm that is not covered goes to the original with all of its arguments."""
    calls: list[Any] = []

    def record(*args: Any, **kwargs: Any) -> torch.nn.Module:
        calls.append((args, kwargs))
        return torch.nn.Identity()

    asked = config("L2Norm")
    make(record)(object, asked, 8, 1e-3, True, normalization="L2Norm")
    assert calls == [((object, asked, 8, 1e-3, True), {"normalization": "L2Norm"})]


@pytest.mark.parametrize("make", BOTH)
def test_the_state_has_the_names_of_torch(make: Callable[..., Any]) -> None:
    """A checkpoint has the names that Megatron's own wrapper writes, so it loads on any device."""
    assert list(build(4, "LayerNorm", make).state_dict()) == ["weight", "bias"]
    assert list(build(4, "RMSNorm", make).state_dict()) == ["weight"]


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_a_float32_residual_stream_comes_out_in_the_dtype_of_the_weight(kind: str) -> None:
    """With fp32_residual_connection x is float32 and the projection behind the norm bfloat16: so is the result."""
    norm = build(8, kind, wrapped_served).bfloat16()
    x = torch.randn(3, 8, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    bias = None if kind == "RMSNorm" else torch.zeros(8, dtype=torch.float64)
    expected = formula(kind, x.detach().double(), torch.ones(8, dtype=torch.float64), bias)
    assert close(y.detach(), expected, torch.bfloat16)
    assert (
        build(8, kind, wrapped_served)(x.detach().bfloat16()).dtype == torch.bfloat16
    )  # a wider weight changes nothing


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_the_compiler_traces_through_the_served_norms(kind: str) -> None:
    """torch.compile takes the forward in one graph."""
    norm, x = build(8, kind, wrapped_served, layernorm_zero_centered_gamma=True), torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="eager")(x), norm(x))


def context(**values: Any) -> Context:
    """The CPU's context."""
    return Context(ADAPTER, resolve({}, device="cpu", **values), Report())


def test_with_ops_off_the_norms_are_torchs() -> None:
    """The constructor is patched in any case where apex is missing; only with operators do they compute."""
    (row,) = norms.rows(context(ops="off"))
    assert row.new is wrapped  # type: ignore[union-attr]
    both = norms.rows(context())
    assert [row.new for row in both] == [wrapped_served, norms.served_l2_norm]  # type: ignore[union-attr]
