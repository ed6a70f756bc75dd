"""Megatron's core attention by the operator attention, against Megatron's own in this process."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.frameworks.megatron.real_megatron import (
    agree,
    calling,
    gradients,
    on_one_rank,
    reseed,
    served,
)


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    """Real Megatron-Core, patched for the whole module."""
    with on_one_rank():
        yield


@pytest.fixture(autouse=True)
def leave_nothing_patched() -> None:
    """The fixture above unpatches at the end of the module, and not each test."""


def kind(name: str) -> Any:
    """A mask type."""
    return importlib.import_module("megatron.core.transformer.enums").AttnMaskType[name]


def core(
    mask_type: str = "causal", dtype: torch.dtype = torch.float32, scale: float | None = None, **values: Any
) -> Any:
    """DotProductAttention with 4 heads of 8, and 2 key heads."""
    transformer = importlib.import_module("megatron.core.transformer")
    modules = importlib.import_module("megatron.core.transformer.dot_product_attention")
    defaults = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "attention_dropout": 0.0,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": dtype,
    }
    layer_number = values.pop("layer_number", 2)
    config = transformer.TransformerConfig(**{**defaults, **values})
    return modules.DotProductAttention(config, layer_number, kind(mask_type), "self", softmax_scale=scale)


def qkv(
    queries: int, keys: int, dtype: torch.dtype = torch.float32, batch: int = 2, size: int = 8
) -> list[torch.Tensor]:
    """Query, key and value in Megatron's layout."""
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    sizes = (queries, batch, 4, 8), (keys, batch, 2, 8), (keys, batch, 2, size)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in sizes]


def masks(name: str, queries: int, keys: int) -> torch.Tensor | None:
    """Masks as Megatron's data gives them: True = masked out. No row is masked out whole."""
    if name == "none":
        return None
    if name == "causal":
        return torch.ones(1, 1, queries, keys).tril(max(keys - queries, 0)) < 0.5
    if name == "padding":
        return torch.arange(keys).view(1, 1, 1, keys) >= torch.tensor([keys, max(1, keys - 2)]).view(2, 1, 1, 1)
    hidden = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(4)) < 0.4
    hidden[..., 0] = False
    return hidden


@settings(max_examples=20, deadline=None)
@given(
    mask_type=st.sampled_from(["causal", "padding", "no_mask", "arbitrary"]),
    mask=st.sampled_from(["none", "causal", "padding", "arbitrary"]),
    sizes=st.sampled_from([(6, 6), (1, 6), (5, 7), (7, 5)]),
    scale=st.sampled_from([None, 0.7]),
    softmax_type=st.sampled_from(["vanilla", "off-by-one", "learnable"]),
    layer_scaling=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_dense_attention_is_megatrons(
    mask_type: str,
    mask: str,
    sizes: tuple[int, int],
    scale: float | None,
    softmax_type: str,
    layer_scaling: bool,
    dtype: torch.dtype,
) -> None:
    """Mask types and tensors, lengths, scales, sinks and dtypes: results and all gradients are Megatron's."""
    if mask_type == "causal" and mask == "none" and sizes[0] not in (1, sizes[1]):
        sizes = (6, 6)
    module = core(
        mask_type,
        dtype,
        scale,
        softmax_type=softmax_type,
        apply_query_key_layer_scaling=layer_scaling,
        attention_softmax_in_fp32=True,
    )
    if softmax_type == "learnable":
        torch.nn.init.normal_(module.softmax_offset)
    hidden = masks(mask, *sizes)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return module(*tensors, hidden)  # type: ignore[no-any-return]

    def everything() -> list[torch.Tensor | None]:
        module.zero_grad()
        found = gradients(call, *qkv(*sizes, dtype))
        return found if softmax_type != "learnable" else [*found, module.softmax_offset.grad.clone()]

    expected = everything()
    with served("attention"), calling("attention"):
        found = everything()
    agree(found, expected, dtype, factor=2.0)


def hidden_by(
    causal: bool, window: tuple[int, int], queries: int, keys: int, mask: torch.Tensor | None
) -> torch.Tensor:
    """What a query must not see, written out: the diagonal ends at the last key, -1 is no limit."""
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    hidden = torch.zeros(1, 1, queries, keys, dtype=torch.bool)
    if causal:
        hidden = hidden | (distance > 0)
    if window[0] >= 0:
        hidden = hidden | (distance < -window[0])
    if window[1] >= 0:
        hidden = hidden | (distance > window[1])
    return hidden if mask is None else hidden | mask


@pytest.mark.parametrize("window", [(2, 0), (2, 1), (-1, 0), (3, -1)])
@pytest.mark.parametrize("mask", ["none", "padding"])
@pytest.mark.parametrize(("mask_type", "sizes"), [("causal", (6, 6)), ("no_mask", (3, 7)), ("causal", (3, 7))])
def test_a_window_and_a_mask_hide_together(
    mask_type: str, sizes: tuple[int, int], mask: str, window: tuple[int, int]
) -> None:
    """A window hides in addition to mask and diagonal, and -1 in it is no limit, as its documentation says."""
    given_mask = masks(mask, *sizes)
    is_causal = mask_type == "causal" and mask == "none"
    plain, windowed = core("arbitrary"), core(mask_type, window_size=window)
    hidden = hidden_by(is_causal, window, *sizes, given_mask)
    expected = gradients(lambda *x: plain(*x, hidden), *qkv(*sizes))
    with served("attention"), calling("attention"):
        found = gradients(lambda *x: windowed(*x, given_mask), *qkv(*sizes))
    agree(found, expected, torch.float32)


def test_a_plain_window_is_megatrons() -> None:
    """(left, 0) without a mask is what Megatron's own code computes."""
    module = core("causal", window_size=(2, 0))
    expected = gradients(lambda *x: module(*x, None), *qkv(6, 6))
    with served("attention"):
        found = gradients(lambda *x: module(*x, None), *qkv(6, 6))
    agree(found, expected, torch.float32)


@pytest.mark.parametrize("built", ["causal", "padding", "no_mask"])
@pytest.mark.parametrize("called", ["causal", "padding", "no_mask", "causal_bottom_right", "padding_causal"])
def test_the_mask_type_of_the_call_wins(built: str, called: str) -> None:
    """Whatever the module was built with, a call is causal where it says so, and sees every key where it does not."""
    is_causal = called in ("causal", "causal_bottom_right", "padding_causal")
    hidden = masks("causal", 6, 6) if is_causal else torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    tensors = qkv(6, 6)
    expected = core("arbitrary")(*tensors, hidden)
    with served("attention"), calling("attention"):
        found = core(built)(*tensors, None, attn_mask_type=kind(called))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mask_type", ["causal", "padding"])
def test_a_query_without_keys_gives_zero(mask_type: str) -> None:
    """Where a mask hides every key of a query it gives 0, with gradient 0, and not the mean of all values."""
    mask = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    mask[:, :, 2] = True
    with served("attention"):
        found, dq, *_ = gradients(lambda *x: core(mask_type)(*x, mask), *qkv(6, 6))
    assert found is not None
    assert dq is not None
    assert not found[2].any()
    assert not dq[2].any()
    assert bool(found[3].any())


def test_causal_at_the_bottom_right_takes_any_lengths() -> None:
    """With causal_bottom_right the last query stands at the last key."""
    tensors, module = qkv(3, 7), core("arbitrary")
    expected = module(*tensors, masks("causal", 3, 7))
    with served("attention"):
        torch.testing.assert_close(module(*tensors, None, attn_mask_type=kind("causal_bottom_right")), expected)


def test_a_padding_mask_does_not_lift_padding_causal() -> None:
    """padding_causal with the mask of the padding hides both; causal with a mask is the mask alone, as in Megatron."""
    tensors, padding, module = qkv(6, 6), masks("padding", 6, 6), core("arbitrary")
    causal = masks("causal", 6, 6)
    assert padding is not None
    assert causal is not None
    both, alone = module(*tensors, padding | causal), module(*tensors, padding)
    with served("attention"):
        torch.testing.assert_close(module(*tensors, padding, attn_mask_type=kind("padding_causal")), both)
        torch.testing.assert_close(module(*tensors, padding, attn_mask_type=kind("causal")), alone)


def test_the_mask_and_the_module_are_as_before() -> None:
    """A call changes neither the mask that it is given, nor anything of the config or the module."""
    module, mask = core("causal", window_size=(2, 0)), masks("arbitrary", 6, 6)
    assert mask is not None
    before = mask.clone(), dict(vars(module.config)), module.attn_mask_type
    with served("attention"):
        module(*qkv(6, 6), mask, attn_mask_type=kind("padding"))
    assert torch.equal(mask, before[0])
    assert vars(module.config) == before[1]
    assert module.attn_mask_type == before[2]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"attention_bias": torch.zeros(1, 4, 6, 6)}, AssertionError),
        ({"attn_mask_type": "causal", "sizes": (4, 6)}, ValueError),
        ({"attn_mask_type": "padding_causal", "sizes": (4, 6)}, ValueError),
        ({"qkv_format": "sbhd"}, AssertionError),
    ],
    ids=["bias", "causal of other lengths", "padding causal of other lengths", "another packed format"],
)
def test_what_is_not_supported_is_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    """A bias, an alignment that nobody named and other packed formats end with an error, not with a wrong result."""
    options = dict(arguments)
    sizes = options.pop("sizes", (6, 6))
    if "attn_mask_type" in options:
        options["attn_mask_type"] = kind(options["attn_mask_type"])
    if "qkv_format" in options:
        packed = importlib.import_module("megatron.core.packed_seq_params").PackedSeqParams
        options["packed_seq_params"] = packed(qkv_format=options.pop("qkv_format"))
    with served("attention"), pytest.raises(error):
        core("causal")(*qkv(*sizes), None, **options)


def test_context_parallelism_is_still_refused() -> None:
    """Megatron's local attention says that it has none, with the table too."""
    with served("attention"), pytest.raises(AssertionError, match="Context parallelism"):
        core("causal", context_parallel_size=2)


def packed_params(lengths: list[int], padded: list[int] | None = None) -> Any:
    """PackedSeqParams of self-attention."""
    packed = importlib.import_module("megatron.core.packed_seq_params").PackedSeqParams

    def ends(sizes: list[int]) -> torch.Tensor:
        return torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)

    cu, cu_padded = ends(lengths), None if padded is None else ends(padded)
    return packed("thd", cu, cu, cu_padded, cu_padded, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))


@pytest.mark.parametrize("padded", [None, [4, 4, 8]])
@pytest.mark.parametrize("mask_type", ["causal", "padding_causal", "padding"])
@pytest.mark.parametrize("window", [None, (1, 0)])
def test_packed_sequences_are_as_one_by_one(
    mask_type: str, padded: list[int] | None, window: tuple[int, int] | None
) -> None:
    """Each packed sequence gives what it gives alone, with gradients; padding between them gives 0 and sees nothing."""
    lengths = [3, 1, 5]
    module, alone = core(mask_type, window_size=window), core(mask_type, window_size=window)
    starts = torch.tensor([0, *(padded or lengths)]).cumsum(0).tolist()
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(starts[-1], heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)]
    with served("attention"), calling("attention"):
        out = module(*tensors, None, packed_seq_params=packed_params(lengths, padded))
        out.square().sum().backward()
    assert out.shape == (starts[-1], 32)
    copies = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    expected = torch.zeros_like(out)
    single = "causal" if mask_type != "padding" else "padding"
    for start, length in zip(starts, lengths, strict=False):
        parts = [tensor[start : start + length].unsqueeze(1) for tensor in copies]
        found = alone(*parts, masks("causal", length, length) if single == "causal" and window is None else None)
        expected[start : start + length] = found.squeeze(1)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected)
    for tensor, copy in zip(tensors, copies, strict=True):
        torch.testing.assert_close(tensor.grad, copy.grad)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_recompute_drops_the_same(sequence_parallel: bool) -> None:
    """Under Megatron's checkpoint output and gradients are those without it, and another call drops others."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    module = core("causal", attention_dropout=0.4)
    module.config.sequence_parallel = sequence_parallel
    with served("attention"):
        found = []
        for call in (module, lambda *x: random.checkpoint(module, False, *x)):
            reseed(3)
            tensors = [tensor.requires_grad_() for tensor in qkv(6, 6)]
            y = call(*tensors, None)
            torch.rand(10)
            y.square().sum().backward()
            found.append([y.detach(), *(tensor.grad for tensor in tensors)])
        agree(found[1], found[0], torch.float32)
        again = module(*qkv(6, 6), None)
        assert not torch.allclose(again, found[0][0])  # type: ignore[arg-type]


def test_dropout_draws_where_megatron_draws() -> None:
    """Only in training, from the tracker's state without sequence parallelism: the default generator is left alone."""
    module = core("causal", attention_dropout=0.4)
    with served("attention"):
        module.eval()
        plain = module(*qkv(6, 6), None)
        module.train()
        reseed(3)
        state = torch.get_rng_state()
        first, second = module(*qkv(6, 6), None), module(*qkv(6, 6), None)
        assert torch.equal(torch.get_rng_state(), state)
        reseed(3)
        torch.rand(5)  # of the default generator, which counts for nothing here
        assert torch.equal(module(*qkv(6, 6), None), first)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(plain, core("causal")(*qkv(6, 6), None))


def test_dropout_keeps_the_mean() -> None:
    """Over many calls the mean output is that without dropout: weights are divided by what is kept."""
    module = core("causal", attention_dropout=0.3)
    tensors = qkv(4, 4)
    with served("attention"):
        mean = torch.stack([module(*tensors, None) for _ in range(600)]).mean(0)
    torch.testing.assert_close(mean, core("causal")(*tensors, None), atol=0.25, rtol=0)


def test_a_subclass_that_calls_its_base_is_served() -> None:
    """A class of another package that derives from Megatron's computes by the operator."""
    base = importlib.import_module("megatron.core.transformer.dot_product_attention").DotProductAttention

    class Doubled(base):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().forward(*args, **kwargs)

    module = core("causal")
    module.__class__ = Doubled
    tensors = qkv(6, 6)
    expected = module(*tensors, None)
    with served("attention"), calling("attention"):
        torch.testing.assert_close(module(*tensors, None), expected)


def test_a_constructor_of_multi_latent_attention_is_understood() -> None:
    """k_channels and v_channels, which only TransformerEngine's class takes, give the scale and the output's width."""
    with served("attention"):
        modules = importlib.import_module("megatron.core.transformer.dot_product_attention")
        config = core("causal").config
        config.num_query_groups = 4
        module = modules.DotProductAttention(config, 1, kind("causal"), "self", k_channels=12, v_channels=6)
        assert module.softmax_scale == 12**-0.5
        q, k, v = torch.randn(5, 2, 4, 12), torch.randn(5, 2, 4, 12), torch.randn(5, 2, 4, 6)
        found = module(q, k, v, None)
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) * 12**-0.5
    p = torch.softmax(scores.masked_fill(torch.ones(5, 5).tril() < 0.5, -torch.inf), -1)
    torch.testing.assert_close(found, torch.einsum("bhij,jbhd->ibhd", p, v).flatten(-2))
    torch.testing.assert_close(module(q, k, v, None), found)  # Megatron's own code, in what was built so


def test_the_compiler_traces_through() -> None:
    """torch.compile takes the module's forward in one graph."""
    module = core("causal", window_size=(2, 0))
    with served("attention"):
        compiled = torch.compile(lambda *x: module(*x, None), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*qkv(6, 6)), module(*qkv(6, 6), None))


def test_undone_it_is_megatrons_method_again() -> None:
    """After undo the class has its own forward and constructor."""
    owner = importlib.import_module("megatron.core.transformer.dot_product_attention").DotProductAttention
    names = ("forward", "__init__")
    before = {name: id(owner.__dict__[name]) for name in names}
    with served("attention") as outcomes:
        assert [outcome.status for outcome in outcomes if "DotProduct" in outcome.row.target] == ["applied", "applied"]
        assert not [name for name in names if id(owner.__dict__[name]) == before[name]]
    assert {name: id(owner.__dict__[name]) for name in names} == before
