"""Megatron's masked softmax by the operator scaled_masked_softmax, against Megatron's own in this process."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapt.adapters.cpu import ADAPTER
from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron import softmax
from llm_adapt.report import Report
from llm_adapt.settings import resolve
from tests.frameworks.megatron.real_megatron import agree, calling, gradients, on_one_rank, served

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "": torch.float32}


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    """Real Megatron-Core, patched for the whole module."""
    with on_one_rank():
        yield


@pytest.fixture(autouse=True)
def leave_nothing_patched() -> None:
    """The fixture above unpatches at the end of the module, and not each test."""


def fused_softmax() -> Any:
    """Megatron's module."""
    return importlib.import_module("megatron.core.fusions.fused_softmax")


def module(
    mask_type: str = "padding", flag: str = "", mask_func: Callable[..., Any] | None = None, **values: Any
) -> Any:
    """FusedScaleMaskSoftmax as attention classes build it."""
    func = importlib.import_module("megatron.core.transformer.utils").attention_mask_func
    mask = importlib.import_module("megatron.core.transformer.enums").AttnMaskType[mask_type]
    options = {"scaled_masked_softmax_fusion": True, "softmax_in_fp32": True, "scale": None} | values
    built = fused_softmax().FusedScaleMaskSoftmax(
        flag == "fp16", flag == "bf16", mask, mask_func=mask_func or func, **options
    )
    return built


def draw(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random scores."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(6)).to(dtype)


def mask_of(name: str, queries: int, keys: int) -> torch.Tensor | None:
    """None, or a mask that leaves at least the first key to every query."""
    if name == "none":
        return None
    hidden = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(4)) < 0.4
    hidden[..., 0] = False
    return hidden if name == "of each query" else hidden[:, :, :1]


@settings(max_examples=20, deadline=None)
@given(
    mask_type=st.sampled_from(["causal", "padding"]),
    mask=st.sampled_from(["none", "of each query", "of keys"]),
    sizes=st.sampled_from([(6, 6), (1, 5), (4, 7)]),
    flag=st.sampled_from(list(DTYPES)),
    scale=st.sampled_from([None, 3.0]),
    in_fp32=st.booleans(),
    has_sink=st.booleans(),
)
def test_probabilities_are_megatrons(
    mask_type: str, mask: str, sizes: tuple[int, int], flag: str, scale: float | None, in_fp32: bool, has_sink: bool
) -> None:
    """Causal and given masks, sinks, scales, dtypes and flags: result, its dtype and the gradient are Megatron's."""
    if mask_type == "causal" and mask == "none" and sizes == (4, 7):
        sizes = (6, 6)
    built = module(mask_type, flag, softmax_in_fp32=in_fp32 or scale is not None, scale=scale)
    given_mask, sink = mask_of(mask, *sizes), draw(4) if has_sink else None

    def call(x: torch.Tensor) -> torch.Tensor:
        y = x * 1.0  # Megatron writes into the scores, which a leaf does not allow
        return built(y, given_mask, *(() if sink is None else (sink.to(x.dtype),)))  # type: ignore[no-any-return]

    x = draw(2, 4, *sizes, dtype=DTYPES[flag])
    expected = gradients(call, x)
    with served("softmax"), calling("scaled_masked_softmax"):
        found = gradients(call, x)
    agree(found, expected, DTYPES[flag])


@pytest.mark.parametrize("flag", ["fp16", "bf16"])
def test_scores_of_another_dtype_give_the_dtype_of_the_flag(flag: str) -> None:
    """float32 scores of a 16-bit model come out in 16 bits, as from Megatron."""
    with served("softmax"):
        assert module("causal", flag)(draw(2, 4, 6, 6), None).dtype == DTYPES[flag]


@pytest.mark.parametrize("mask", ["none", "of each query"])
def test_a_window_and_a_mask_hide_together(mask: str) -> None:
    """A window hides in addition to the mask, where Megatron's own code forgets the mask."""
    given_mask = mask_of(mask, 6, 6)
    distance = torch.arange(6) - torch.arange(6)[:, None]
    hidden = ((distance > 0) | (distance < -2)).view(1, 1, 6, 6)
    whole = hidden if given_mask is None else hidden | given_mask
    expected = torch.softmax(draw(2, 4, 6, 6).masked_fill(whole, -torch.inf), -1).nan_to_num(0.0)
    with served("softmax"):
        found = module("padding", window_size=(2, 0))(draw(2, 4, 6, 6), given_mask)
    torch.testing.assert_close(found, expected)


def test_the_scores_are_left_as_they_were() -> None:
    """The scores that are given are not written into."""
    x = draw(2, 4, 6, 6)
    with served("softmax"):
        module("causal")(x, None)
    assert torch.equal(x, draw(2, 4, 6, 6))


def test_a_row_without_keys_is_zero() -> None:
    """A query whose keys are all masked gives 0 with gradient 0, as in Megatron's CUDA kernel, and no NaN."""
    mask = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    mask[:, :, 2] = True
    with served("softmax"):
        found, dx = gradients(lambda x: module()(x, mask), draw(2, 4, 6, 6))
    assert found is not None
    assert dx is not None
    assert not found[:, :, 2].any()
    assert not dx[:, :, 2].any()
    assert bool(torch.isfinite(dx).all())


def test_another_mask_function_is_called() -> None:
    """A mask_func of somebody else's decides, as in Megatron."""

    def half(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return scores - 0.5 * mask

    mask = mask_of("of each query", 6, 6)
    expected = module(mask_func=half)(draw(2, 4, 6, 6), mask)
    with served("softmax"), calling("scaled_masked_softmax", 0):
        assert torch.equal(module(mask_func=half)(draw(2, 4, 6, 6), mask), expected)


def test_causal_of_other_lengths_is_still_refused() -> None:
    """Without a mask, causal attention of as many queries as keys only."""
    with served("softmax"), pytest.raises(AssertionError, match="self attention"):
        module("causal")(draw(2, 4, 4, 6), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_classes_of_the_cuda_extensions_are_served(dtype: torch.dtype) -> None:
    """All three compute and have the gradients of torch's softmax, where Megatron ends with an ImportError."""
    classes, mask = fused_softmax(), mask_of("of each query", 6, 6)
    assert mask is not None
    upper = torch.ones(6, 6).tril() < 0.5
    cases = {
        "ScaledUpperTriangMaskedSoftmax": ((8, 6, 6), (), upper),
        "ScaledMaskedSoftmax": ((2, 4, 6, 6), (mask.to(torch.uint8),), mask),
        "ScaledSoftmax": ((2, 4, 6, 6), (), torch.tensor(False)),
    }
    for name, (sizes, options, hidden) in cases.items():
        x = draw(*sizes, dtype=dtype)
        with pytest.raises(ImportError):
            getattr(classes, name).apply(x, *options, 0.5)

        def plain(x: torch.Tensor, hidden: torch.Tensor = hidden) -> torch.Tensor:
            return torch.softmax((x.float() * 0.5).masked_fill(hidden, -torch.inf), -1).to(x.dtype)

        expected = gradients(plain, x)
        with served("softmax"), calling("scaled_masked_softmax"):
            found = gradients(lambda x, name=name, options=options: getattr(classes, name).apply(x, *options, 0.5), x)
        agree(found, expected, dtype)


def test_built_extensions_keep_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Megatron's three CUDA extensions can be imported there is no row; one alone does not count."""
    context = Context(ADAPTER, resolve({}, device="cpu"), Report())
    monkeypatch.setattr(
        softmax.importlib.util, "find_spec", lambda name: name if name == "scaled_softmax_cuda" else None
    )
    assert len(softmax.rows(context)) == 7
    monkeypatch.setattr(softmax.importlib.util, "find_spec", lambda name: name)
    assert softmax.rows(context) == []


def test_the_compiler_traces_through() -> None:
    """torch.compile takes the module in one graph."""
    built = module("causal", scale=2.0)
    with served("softmax"):
        compiled = torch.compile(lambda x: built(x, None), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(draw(2, 4, 6, 6)), built(draw(2, 4, 6, 6), None))
