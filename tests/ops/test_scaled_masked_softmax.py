"""Softmax of attention scores against Megatron-Core and torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import llm_adapt
from llm_adapt.ops.dispatch.proof import run_op
from llm_adapt.ops.scaled_masked_softmax import scaled_masked_softmax

op = scaled_masked_softmax.op
reference = op.reference


def draw(*sizes: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers in float64."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_mask(*sizes: int) -> torch.Tensor:
    """A mask that leaves the first key of each row."""
    mask = torch.rand(sizes, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[..., 0] = False
    return mask


@pytest.fixture
def on_the_host() -> Iterator[None]:
    """Megatron makes its masks on the device "cuda", which is the CPU here."""
    with llm_adapt.patched(device="cpu", ops="off"):
        yield


def megatron(kind: str, scale: float | None, window: tuple[int, int] | None = None) -> Any:
    """Megatron's module without its CUDA kernel, in float64."""
    from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.utils import attention_mask_func

    return FusedScaleMaskSoftmax(
        False, False, getattr(AttnMaskType, kind), False, attention_mask_func, True, scale, window
    )


def same(module: Any, x: torch.Tensor, mask: torch.Tensor | None, sinks: torch.Tensor | None, **options: Any) -> None:
    """Megatron's module and the reference have one result and one gradient of scores and sinks."""
    tensors = {"x": x} | ({} if mask is None else {"mask": mask}) | ({} if sinks is None else {"sinks": sinks})
    expected = run_op(op, lambda x, mask=None, sinks=None: module(x.clone(), mask, sinks), tensors)
    # Where Megatron makes the mask itself, the options say so.
    found = run_op(op, lambda **call: reference(**call, **options), tensors)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_padding_mask_of_megatron(scale: float | None, has_sinks: bool) -> None:
    """With a boolean mask, True = masked out, scale and sinks it is Megatron's unfused module."""
    sinks = draw(3, seed=2) if has_sinks else None
    for mask in (drawn_mask(2, 1, 5, 9), drawn_mask(2, 3, 5, 9), None):
        same(megatron("padding", scale), draw(2, 3, 5, 9), mask, sinks, scale=scale or 1.0)


@pytest.mark.parametrize("has_sinks", [False, True])
def test_causal_mask_of_megatron(on_the_host: None, has_sinks: bool) -> None:
    """causal is Megatron's causal mask for as many queries as keys, and for one query, which sees every key."""
    sinks = draw(3, seed=2) if has_sinks else None
    for queries, keys in ((7, 7), (1, 7), (1, 1)):
        same(megatron("causal", 0.5), draw(2, 3, queries, keys), None, sinks, scale=0.5, causal=True)


@pytest.mark.parametrize("window", [(3, 0), (0, 0), (2, 1)])
def test_sliding_window_of_megatron(on_the_host: None, window: tuple[int, int]) -> None:
    """window is Megatron's sliding window, also for more keys than queries."""
    for queries, keys in ((7, 7), (4, 9)):
        same(megatron("causal", None, window), draw(2, 3, queries, keys), None, None, window=window)


def test_rows_masked_out_whole_are_zero() -> None:
    """Such a row is 0 with gradient 0, as of Megatron's fused kernel; its unfused module makes it uniform."""
    x, mask = draw(1, 1, 3, 4).requires_grad_(), torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    mask[..., 1, :] = True
    found = reference(x, mask)
    assert found[0, 0, 1].tolist() == [0.0] * 4
    (grad,) = torch.autograd.grad(found, x, draw(1, 1, 3, 4, seed=1))
    assert torch.isfinite(grad).all()
    assert not grad[0, 0, 1].any()
    assert megatron("padding", None)(x.detach().clone(), mask)[0, 0, 1].tolist() == [0.25] * 4


def test_more_queries_than_keys() -> None:
    """causal is aligned at the bottom right: the first queries, which have no key, are 0."""
    found = reference(torch.zeros(1, 3, 2), causal=True)
    assert found.tolist() == [[[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]]]


@given(
    sizes=st.tuples(st.integers(0, 2), st.integers(1, 2), st.integers(0, 5), st.integers(1, 6)),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.tuples(st.integers(-1, 3), st.integers(-1, 3))),
    has_mask=st.booleans(),
    has_sinks=st.booleans(),
    is_flat=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_masks_add_up(
    sizes: tuple[int, int, int, int],
    causal: bool,
    window: tuple[int, int] | None,
    has_mask: bool,
    has_sinks: bool,
    is_flat: bool,
    dtype: torch.dtype,
) -> None:
    """Mask, causal and window together hide what any of them hides, element by element; strided x, any dtype."""
    batch, heads, queries, keys = sizes
    x = draw(batch, heads, queries, 2 * keys).to(dtype)[..., ::2]
    mask = drawn_mask(batch, 1, queries, keys) if has_mask else None
    sinks = draw(heads, seed=3) if has_sinks and not is_flat else None
    hidden = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    for i in range(queries):
        for j in range(keys):
            ahead = j - (i + keys - queries)
            left, right = window or (-1, -1)
            if (causal and ahead > 0) or (0 <= right < ahead) or (left >= 0 and ahead < -left):
                hidden[:, :, i, j] = True
    hidden = hidden if mask is None else hidden | mask
    weights = torch.where(hidden, 0.0, torch.exp(0.5 * x.double()))
    total = weights.sum(-1, keepdim=True) + (0.0 if sinks is None else torch.exp(sinks)[:, None, None])
    expected = torch.where(total > 0, weights / total, 0.0)
    if is_flat:
        mask = None if mask is None else mask.expand(batch, heads, queries, keys).flatten(0, 1)
        x, expected = x.flatten(0, 1), expected.flatten(0, 1)
    found = reference(x, mask, sinks, 0.5, causal, window)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_every_flag_changes_the_result() -> None:
    """No option and no optional tensor is ignored."""
    x = draw(1, 2, 5, 5)
    plain = reference(x)
    flags = [{"mask": drawn_mask(1, 1, 5, 5)}, {"sinks": draw(2)}, {"scale": 0.5}, {"causal": True}, {"window": (1, 1)}]
    for flag in flags:
        assert not torch.allclose(reference(x, **flag), plain), flag


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"x": draw(5, 5)}, ValueError, "x has 2 axes"),
        ({"mask": draw(5, 5)}, TypeError, "True where a key is masked out"),
        ({"mask": torch.zeros(4, 5, dtype=torch.bool)}, ValueError, "must broadcast"),
        ({"mask": torch.zeros(2, 1, 2, 5, 5, dtype=torch.bool)}, ValueError, "must broadcast"),
        ({"sinks": draw(3)}, ValueError, "one a head"),
        ({"x": draw(2, 5, 5), "sinks": draw(2)}, ValueError, "one a head"),
        ({"window": (-2, 0)}, ValueError, "use -1"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    """Shapes, dtypes and numbers that do not fit are errors that say what was found."""
    with pytest.raises(kind, match=text):
        reference(**({"x": draw(1, 2, 5, 5)} | arguments))
