"""Megatron's rotary embedding by the operator rope, against Megatron's own in this process."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.frameworks.megatron.real_megatron import agree, calling, gradients, model, on_one_rank, served, step

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    """Real Megatron-Core, patched for the whole module."""
    if importlib.util.find_spec("transformer_engine") is not None:
        pytest.skip("transformer_engine is installed; this is the test of Megatron without it")
    with on_one_rank():
        yield


@pytest.fixture(autouse=True)
def leave_nothing_patched() -> None:
    """The fixture above unpatches at the end of the module, and not each test."""


def rope_utils() -> Any:
    """Megatron's module."""
    return importlib.import_module("megatron.core.models.common.embeddings.rope_utils")


def group() -> Any:
    """The context parallel group of one rank."""
    return importlib.import_module("megatron.core.parallel_state").get_context_parallel_group()


def draw(seed: int, *sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(rows: int, width: int, interleaved: bool, batch: int = 1) -> torch.Tensor:
    """[rows, batch, 1, width], each angle once for both features of its pair, as Megatron's embedding makes them."""
    half = draw(77, rows, batch, 1, width // 2) * 3
    return half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 3), st.integers(1, 3)),
    pairs=st.integers(1, 4),
    rest=st.sampled_from([0, 1, 4]),
    form=st.sampled_from(["half", "interleaved", "mla"]),
    per_batch=st.booleans(),
    mscale=st.sampled_from([1.0, 1.3]),
    dtype=st.sampled_from(DTYPES),
)
def test_dense_rotation_is_megatrons(
    sizes: tuple[int, int, int],
    pairs: int,
    rest: int,
    form: str,
    per_batch: bool,
    mscale: float,
    dtype: torch.dtype,
) -> None:
    """Halves, interleaved and multi-latent pairs, partial rotation, angles of each batch row, mscale: all as there."""
    t = draw(1, *sizes, 2 * pairs + rest, dtype=dtype)
    freqs = angles(sizes[0], 2 * pairs, form == "interleaved", sizes[1] if per_batch else 1)

    def call(t: torch.Tensor) -> torch.Tensor:
        bshd = rope_utils()._apply_rotary_pos_emb_bshd
        return bshd(t, freqs, form == "interleaved", multi_latent_attention=form == "mla", mscale=mscale)  # type: ignore[no-any-return]

    expected = gradients(call, t)
    with served("rotary"), calling("rope"):
        found = gradients(call, t)
    agree(found, expected, dtype)


LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(lambda found: sum(found) > 0)


@settings(max_examples=20, deadline=None)
@given(
    lengths=LENGTHS,
    form=st.sampled_from(["half", "interleaved", "mla"]),
    is_exact=st.booleans(),
    extra=st.integers(0, 3),
    mscale=st.sampled_from([1.0, 1.3]),
    dtype=st.sampled_from(DTYPES),
)
def test_packed_rotation_is_megatrons(
    lengths: list[int], form: str, is_exact: bool, extra: int, mscale: float, dtype: torch.dtype
) -> None:
    """Sequences of any lengths, with angles that count from each start or name every token of the batch: as there."""
    total = sum(lengths)
    rows = total if is_exact else max(lengths) + extra
    t = draw(1, total, 2, 10, dtype=dtype)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    freqs = angles(rows, 8, form == "interleaved")

    def call(t: torch.Tensor) -> torch.Tensor:
        thd = rope_utils()._apply_rotary_pos_emb_thd
        return thd(t, cu_seqlens, freqs, form == "interleaved", form == "mla", mscale, group())  # type: ignore[no-any-return]

    expected = gradients(call, t)
    with served("rotary"), calling("rope"):
        found = gradients(call, t)
    agree(found, expected, dtype)


def test_packed_sequences_are_rotated_as_one_by_one() -> None:
    """Each of the packed sequences turns as it does alone."""
    lengths = [3, 1, 5]
    t, freqs = draw(1, 9, 2, 8), angles(6, 8, False)
    cu_seqlens = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    with served("rotary"):
        packed = rope_utils()._apply_rotary_pos_emb_thd(t, cu_seqlens, freqs, cp_group=group())
        dense = rope_utils()._apply_rotary_pos_emb_bshd
        parts = [dense(part.unsqueeze(1), freqs[: part.shape[0]]).squeeze(1) for part in t.split(lengths)]
    torch.testing.assert_close(packed, torch.cat(parts))


def test_nothing_is_read_on_the_host() -> None:
    """Packed rotation works on tensors without numbers: it waits for no device."""
    t, freqs = torch.empty(9, 2, 8, device="meta"), torch.empty(6, 1, 1, 8, device="meta")
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    with served("rotary"):
        found = rope_utils()._apply_rotary_pos_emb_thd(t, cu_seqlens, freqs, cp_group=group())
    assert found.shape == t.shape


class TwoRanks:
    """A group as far as rope asks it."""

    def size(self) -> int:
        """Two ranks."""
        return 2

    def rank(self) -> int:
        """The second."""
        return 1


def test_context_parallel_ranks_keep_megatrons_code() -> None:
    """On one of two context parallel ranks the result is exactly Megatron's: its slices of the angles."""
    t, freqs, cu_seqlens = draw(1, 6, 2, 8), angles(12, 8, False), torch.tensor([0, 4, 12], dtype=torch.int32)
    expected = rope_utils()._apply_rotary_pos_emb_thd(t, cu_seqlens, freqs, cp_group=TwoRanks())
    with served("rotary"), calling("rope"):  # its inner call is served, with the rows it has chosen
        found = rope_utils()._apply_rotary_pos_emb_thd(t, cu_seqlens, freqs, cp_group=TwoRanks())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sizes", [(4, 8), (4, 2, 2, 8)], ids=["two axes", "angles of every head"])
def test_other_shapes_keep_megatrons_code(sizes: tuple[int, ...]) -> None:
    """Tensors without axes of batch and heads, and angles of every head, go to the original."""
    t, freqs = draw(1, *sizes), draw(2, *sizes)
    expected = rope_utils()._apply_rotary_pos_emb_bshd(t, freqs)
    with served("rotary"), calling("rope", 0):
        assert torch.equal(rope_utils()._apply_rotary_pos_emb_bshd(t, freqs), expected)


def test_too_few_angles_are_an_error_as_in_megatron() -> None:
    """Angles for another number of positions are refused, and not read from the first ones."""
    with served("rotary"), pytest.raises(RuntimeError, match="must match"):
        rope_utils()._apply_rotary_pos_emb_bshd(draw(1, 4, 2, 2, 8), angles(5, 8, False))


@pytest.mark.parametrize("interleaved", [False, True])
def test_fused_names_are_bound_and_rotate_as_unfused(interleaved: bool) -> None:
    """Without TransformerEngine the fused names are None, and served they compute what the unfused ones do."""
    utils = rope_utils()
    t, freqs, packed = draw(1, 4, 2, 2, 8), angles(4, 8, interleaved), draw(2, 9, 2, 8)
    cu_seqlens = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    assert utils.fused_apply_rotary_pos_emb is None
    dense = utils._apply_rotary_pos_emb_bshd(t, freqs, interleaved)
    thd = utils._apply_rotary_pos_emb_thd(packed, cu_seqlens, freqs, interleaved, cp_group=group())
    with served("rotary"):
        torch.testing.assert_close(utils.fused_apply_rotary_pos_emb(t, freqs, interleaved=interleaved), dense)
        found = utils.fused_apply_rotary_pos_emb_thd(packed, cu_seqlens, freqs, 1, 0, interleaved)
        torch.testing.assert_close(found, thd)
        with pytest.raises(ValueError, match="on rank 1 of 2 context parallel ranks"):
            utils.fused_apply_rotary_pos_emb_thd(packed, cu_seqlens, freqs, 2, 1)
        with pytest.raises(ValueError, match="pass t"):
            utils.fused_apply_rotary_pos_emb(packed, freqs)
    assert utils.fused_apply_rotary_pos_emb is None


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("mscale", [1.0, 1.3])
def test_no_argument_is_dropped_by_fusion(is_fused: bool, is_packed: bool, mscale: float) -> None:
    """With rope fusion, packed or not, mscale counts as without: the fused name has no argument for it."""
    t, cu_seqlens = (
        (draw(1, 9, 2, 8), torch.tensor([0, 4, 9], dtype=torch.int32)) if is_packed else (draw(1, 5, 2, 2, 8), None)
    )
    freqs = angles(5, 8, False)

    def call(fusion: bool) -> torch.Tensor:
        config = SimpleNamespace(
            apply_rope_fusion=fusion, rotary_interleaved=False, multi_latent_attention=False, mrope_section=None
        )
        apply: Callable[..., torch.Tensor] = rope_utils().apply_rotary_pos_emb
        return apply(t, freqs, config, cu_seqlens, mscale=mscale, cp_group=group())

    expected = call(False)
    with served("rotary"), calling("rope"):
        torch.testing.assert_close(call(is_fused), expected)


def test_a_model_with_rope_fusion_is_served() -> None:
    """apply_rope_fusion=True stays on without TransformerEngine, and loss and gradients are those without fusion."""
    expected = step(model("LayerNorm"))
    with served("rotary"), calling("rope", 4):  # query and key of two layers
        gpt = model("LayerNorm", apply_rope_fusion=True)
        found = step(gpt)
    assert gpt.config.apply_rope_fusion is True
    agree(found[0], expected[0], torch.float32)
    agree(found[1], expected[1], torch.float32)


def test_interleaved_rope_fusion_is_turned_off_and_still_served() -> None:
    """Megatron asks for TransformerEngine's version there; the unfused function is served and computes the same."""
    expected = step(model("LayerNorm", rotary_interleaved=True))
    with served("rotary"), calling("rope", 4):
        gpt = model("LayerNorm", rotary_interleaved=True, apply_rope_fusion=True)
        found = step(gpt)
    assert gpt.config.apply_rope_fusion is False
    agree(found[1], expected[1], torch.float32)


def test_without_the_table_rope_fusion_is_turned_off() -> None:
    """With ops="off" nothing serves the fused names, and the config is changed as before."""
    assert model("LayerNorm", apply_rope_fusion=True).config.apply_rope_fusion is False


def test_the_compiler_traces_through() -> None:
    """torch.compile takes both functions in one graph."""
    t, freqs, cu_seqlens = draw(1, 9, 2, 8), angles(9, 8, False), torch.tensor([0, 4, 9], dtype=torch.int32)
    cp_group = group()
    with served("rotary"):
        dense, thd = rope_utils()._apply_rotary_pos_emb_bshd, rope_utils()._apply_rotary_pos_emb_thd

        def call(t: torch.Tensor) -> torch.Tensor:
            return dense(thd(t, cu_seqlens, freqs, cp_group=cp_group).unsqueeze(1), freqs)  # type: ignore[no-any-return]

        compiled = torch.compile(call, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(t), call(t))
