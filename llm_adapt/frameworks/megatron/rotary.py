"""Megatron's rotary embedding by the operator rope.

Letters: S positions, B batch, H heads, D head size, T tokens of all sequences packed, N sequences, R rotated features,
P rows of freqs. t [S, B, H, D], or packed [T, H, D]; freqs [S, B or 1, 1, R] or [P, 1, 1, R] = angles.

Megatron takes cosine and sine in float32 and rounds them to the dtype of t, and so does this, whether fused or not.
Its fused names come from TransformerEngine. Where that is not installed they are bound to the operator here, so that
apply_rope_fusion need not be turned off: it makes no difference then. The fused rope of multi-latent attention is
Triton code and not touched.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron.seams import seam, telling
from llm_adapt.patching import Row

__all__ = ["fused", "fused_packed", "kept_arguments", "rotated", "rotated_packed", "rows"]

Function = Callable[..., torch.Tensor]

_ROPE = "megatron.core.models.common.embeddings.rope_utils"
_DENSE = {"0.12 to 0.18": "3f57d266073f", "0.19": "c54f4f9d0c72"}
_PACKED = {
    "0.12": "da3b017ca65f",
    "0.13 and 0.14": "d8770fc42064",
    "0.15 to 0.18": "8317cfcf2c7b",
    "0.19": "49cb9d777759",
}


def rows(context: Context) -> list[Row]:
    """Both unfused functions, and without TransformerEngine the fused names; none with ops="off"."""
    if not context.serves_operators:
        return []
    dense, thd = f"{_ROPE}:_apply_rotary_pos_emb_bshd", f"{_ROPE}:_apply_rotary_pos_emb_thd"
    packed = "operator rope, without the host reading cu_seqlens; context parallel ranks keep Megatron's own"
    found: list[Row] = [
        seam(dense, telling(context, dense, rotated), "operator rope", bodies=_DENSE),
        seam(thd, telling(context, thd, rotated_packed), packed, bodies=_PACKED),
    ]
    if importlib.util.find_spec("transformer_engine") is None:
        lent = "apply_rope_fusion without TransformerEngine: operator rope"
        found += [
            seam(f"{_ROPE}:fused_apply_rotary_pos_emb", fused, lent),
            seam(f"{_ROPE}:fused_apply_rotary_pos_emb_thd", fused_packed, lent),
            seam(
                f"{_ROPE}:apply_rotary_pos_emb",
                kept_arguments,
                "rope fusion without TransformerEngine: the unfused functions, which are served and have all arguments",
            ),
        ]
    return found


def rotated(original: Function, told: Callable[[], None]) -> Function:
    """`_apply_rotary_pos_emb_bshd`. In 0.19 the fourth argument is called mla_rotary_interleaved."""
    turn = _turn()

    @functools.wraps(original)
    def _apply_rotary_pos_emb_bshd(
        t: torch.Tensor,
        freqs: torch.Tensor,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
        mla_rotary_interleaved: bool | None = None,
    ) -> torch.Tensor:
        is_mla = multi_latent_attention if mla_rotary_interleaved is None else mla_rotary_interleaved
        if not _fits(t, freqs) or (is_mla and rotary_interleaved):
            told()
            return original(t, freqs, rotary_interleaved, is_mla, mscale)
        return turn(t, _table(freqs), rotary_interleaved, is_mla, mscale, "sbhd", None)

    return _apply_rotary_pos_emb_bshd


def rotated_packed(original: Function, told: Callable[[], None]) -> Function:
    """`_apply_rotary_pos_emb_thd`.

    Tokens behind the last sequence, at which the original ends with an error, turn as those at position 0: finding
    them would need the host to wait for cu_seqlens.
    """
    turn = _turn()
    has_group = "cp_group" in inspect.signature(original).parameters
    has_exact_rows = _has_exact_rows(original)

    @functools.wraps(original)
    def _apply_rotary_pos_emb_thd(
        t: torch.Tensor,
        cu_seqlens: torch.Tensor,
        freqs: torch.Tensor,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
        cp_group: Any = None,
        mla_rotary_interleaved: bool | None = None,
    ) -> torch.Tensor:
        is_mla = multi_latent_attention if mla_rotary_interleaved is None else mla_rotary_interleaved
        is_served = _fits_packed(t, freqs) and not (is_mla and rotary_interleaved)
        if not is_served or not _is_alone(cp_group, has_group):
            told()
            group = (cp_group,) if has_group else ()
            return original(t, cu_seqlens, freqs, rotary_interleaved, is_mla, mscale, *group)
        positions = _positions(t, cu_seqlens, freqs.shape[0], has_exact_rows)
        return turn(t, freqs[:, 0, 0], rotary_interleaved, is_mla, mscale, "thd", positions)

    return _apply_rotary_pos_emb_thd


def fused(original: Function | None) -> Function:
    """`fused_apply_rotary_pos_emb`, where Megatron has none.

    Raises: ValueError from the operator for shapes that do not fit, among them freqs with another number of positions.
    """
    if original is not None:
        return original
    turn = _turn()

    def fused_apply_rotary_pos_emb(
        t: torch.Tensor, freqs: torch.Tensor, transpose_output_memory: bool = False, interleaved: bool = False
    ) -> torch.Tensor:
        # transpose_output_memory chooses strides, which a caller must not rely on; TransformerEngine ignores it too.
        if not _fits(t, freqs):
            raise ValueError(
                f"fused rope was asked for t {tuple(t.shape)} and freqs {tuple(freqs.shape)}; pass t [S, B, H, D] and "
                "freqs [S, B or 1, 1, R], or set apply_rope_fusion=False."
            )
        return turn(t, _table(freqs), interleaved, False, 1.0, "sbhd", None)

    return fused_apply_rotary_pos_emb


def fused_packed(original: Function | None) -> Function:
    """`fused_apply_rotary_pos_emb_thd`, where Megatron has none; the rows of freqs count from each sequence's start.

    Raises: ValueError for context parallel ranks, or shapes that do not fit.
    """
    if original is not None:
        return original
    turn = _turn()

    def fused_apply_rotary_pos_emb_thd(
        t: torch.Tensor,
        cu_seqlens: torch.Tensor,
        freqs: torch.Tensor,
        cp_size: int = 1,
        cp_rank: int = 0,
        interleaved: bool = False,
    ) -> torch.Tensor:
        if cp_size != 1 or not _fits_packed(t, freqs):
            raise ValueError(
                f"fused rope of packed sequences was asked on rank {cp_rank} of {cp_size} context parallel ranks for t "
                f"{tuple(t.shape)} and freqs {tuple(freqs.shape)}; one rank, [T, H, D] and [P, 1, 1, R] are served. "
                "Set apply_rope_fusion=False for others."
            )
        positions = _positions(t, cu_seqlens, freqs.shape[0], has_exact_rows=False)
        return turn(t, freqs[:, 0, 0], interleaved, False, 1.0, "thd", positions)

    return fused_apply_rotary_pos_emb_thd


def kept_arguments(original: Function) -> Function:
    """`apply_rotary_pos_emb` that answers rope fusion by the unfused functions, which are served and take everything.

    The fused names have no mscale, in 0.16 and before no interleaved pairs of packed sequences, and of those here no
    context parallel ranks and no freqs for each token of the batch.
    """
    names = original.__globals__  # type: ignore[attr-defined]  # looked up at each call: they are patched too
    last = inspect.signature(original).parameters.get("mla_rotary_interleaved")
    usual = None if last is None else last.default

    @functools.wraps(original)
    def apply_rotary_pos_emb(
        t: torch.Tensor, freqs: torch.Tensor, config: Any, cu_seqlens: torch.Tensor | None = None, *args: Any, **kw: Any
    ) -> torch.Tensor:
        if not config.apply_rope_fusion:
            return original(t, freqs, config, cu_seqlens, *args, **kw)
        mscale, group, is_mla = _rest(usual, *args, **kw)
        options = (config.rotary_interleaved, config.multi_latent_attention if is_mla is None else is_mla, mscale)
        if cu_seqlens is None:
            return names["_apply_rotary_pos_emb_bshd"](t, freqs, *options)  # type: ignore[no-any-return]
        if group is None:
            group = names["parallel_state"].get_context_parallel_group()
        return names["_apply_rotary_pos_emb_thd"](t, cu_seqlens, freqs, *options, group)  # type: ignore[no-any-return]

    return apply_rotary_pos_emb


def _rest(
    usual: bool | None, mscale: float = 1.0, cp_group: Any = None, mla_rotary_interleaved: Any = ...
) -> tuple[float, Any, bool | None]:
    """The arguments of apply_rotary_pos_emb behind cu_seqlens, in their order; the last one is of 0.19."""
    return mscale, cp_group, usual if mla_rotary_interleaved is ... else mla_rotary_interleaved


def _turn() -> Callable[..., torch.Tensor]:
    """Rotation of t by a table of angles [..., R]."""
    from llm_adapt.ops.rope import rope

    def turn(
        t: torch.Tensor,
        angles: torch.Tensor,
        interleaved: bool,
        is_mla: bool,
        mscale: float,
        layout: Literal["sbhd", "thd"],
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        cos, sin = ((function(angles) * mscale).to(t.dtype) for function in (torch.cos, torch.sin))
        pairs: Literal["half", "interleaved", "interleaved_to_half"] = "half"
        if is_mla:
            pairs = "interleaved_to_half"
        elif interleaved:
            pairs = "interleaved"
        return rope(t, cos, sin, positions, layout=layout, pairs=pairs, compute="x")

    return turn


def _fits(t: torch.Tensor, freqs: torch.Tensor) -> bool:
    """Whether there is one row of angles for each position, the same for all heads."""
    if t.ndim != 4 or freqs.ndim != 4 or freqs.shape[2] != 1 or freqs.shape[1] not in (1, t.shape[1]):
        return False
    return freqs.shape[0] == t.shape[0] and freqs.shape[3] <= t.shape[3]


def _fits_packed(t: torch.Tensor, freqs: torch.Tensor) -> bool:
    return t.ndim == 3 and freqs.ndim == 4 and freqs.shape[1:3] == (1, 1) and freqs.shape[3] <= t.shape[2]


def _table(freqs: torch.Tensor) -> torch.Tensor:
    """[S, B or 1, 1, R] as the operator takes it: [S, R], or [B, S, R]."""
    return freqs[:, 0, 0] if freqs.shape[1] == 1 else freqs[:, :, 0].transpose(0, 1)


def _positions(t: torch.Tensor, cu_seqlens: torch.Tensor, num_rows: int, has_exact_rows: bool) -> torch.Tensor:
    """The row of freqs for each token: counted from the start of its sequence, or of the batch.

    Of the batch where freqs has as many rows as there are tokens in it (has_exact_rows: since 0.15), as positions of
    several axes need. Nothing is read on the host.
    """
    tokens = torch.arange(t.shape[0], device=t.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
    is_inside = (tokens >= cu_seqlens[0]) & (tokens < cu_seqlens[-1])
    start = torch.where(is_inside, cu_seqlens[sequence], tokens)
    if has_exact_rows:
        start = torch.where(is_inside & (cu_seqlens[-1] == num_rows), 0, start)
    return tokens - start


def _is_alone(group: Any, has_group: bool) -> bool:
    """Whether there is one context parallel rank, as far as the arguments say; the original looks where they do not."""
    if has_group:
        return group is not None and group.size() == 1
    from megatron.core import parallel_state  # 0.12

    return bool(parallel_state.get_context_parallel_world_size() == 1)


def _has_exact_rows(original: Function) -> bool:
    """Whether this version knows freqs with a row for each token of the batch: its slices take an offset."""
    names = inspect.unwrap(original).__globals__  # type: ignore[attr-defined]
    return "offset" in inspect.signature(names["_get_thd_freqs_on_this_cp_rank"]).parameters
