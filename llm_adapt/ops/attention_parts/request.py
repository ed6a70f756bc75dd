"""Request: the arguments of one attention call, checked, and brought to the form in which it is computed.

Letters as in llm_adapt/ops/attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from llm_adapt.ops.attention_parts.layouts import LAYOUTS, from_heads_first, lengths, to_heads_first
from llm_adapt.ops.attention_parts.places import Places, dense_places, packed_places
from llm_adapt.ops.attention_parts.softmax import Weighting

__all__ = ["CAUSAL", "Biases", "Options", "Request", "Sequences", "check_numbers", "check_slopes"]

CAUSAL = ("none", "top_left", "bottom_right")


class Sequences(NamedTuple):
    """The arguments that say which tokens are a sequence, under their names in `attention`."""

    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    seqused_q: torch.Tensor | None
    seqused_k: torch.Tensor | None


class Biases(NamedTuple):
    """The arguments that are added to scores, or stand beside them."""

    mask: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None


class Options(NamedTuple):
    """The other arguments that change the result."""

    layout: str
    causal: str
    window_left: int
    window_right: int
    scale: float | None
    softcap: float
    dropout_p: float
    seed: int | None


@dataclass(frozen=True)
class Request:
    """The arguments of one call of attention; query, key and value are q, k and v there."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    sequences: Sequences
    biases: Biases
    options: Options

    def __post_init__(self) -> None:
        if self.options.layout not in LAYOUTS:
            raise ValueError(
                f"attention: layout={self.options.layout!r} was given; choose one of {', '.join(LAYOUTS)}."
            )
        check_numbers(
            "attention", self.options.causal, self.options.window_left, self.options.window_right, self.options.softcap
        )
        if not 0 <= self.options.dropout_p < 1:
            raise ValueError(
                f"attention: dropout_p={self.options.dropout_p} was given; it must be at least 0 and below 1."
            )
        self._check_seed()
        self._check_tensors()
        self._check_sequences()
        self._check_biases()

    def _check_seed(self) -> None:
        seed, dropout_p = self.options.seed, self.options.dropout_p
        if seed is None and dropout_p:
            raise ValueError(
                f"attention: dropout_p={dropout_p} was given without a seed; pass one that differs in each layer and "
                "step. The same seed drops the same weights."
            )
        if seed is not None and not -(2**63) <= seed < 2**63:
            raise ValueError(f"attention: seed={seed} was given; it must fit in 64 bits.")

    @property
    def is_packed(self) -> bool:
        """Sequences stand one behind the other."""
        return self.options.layout == "thd"

    @property
    def wide(self) -> torch.dtype:
        """The dtype that it is computed in."""
        return torch.promote_types(self.query.dtype, torch.float32)

    def heads_first(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value as [B, H, S, D] in the wide dtype."""
        query, key, value = (
            to_heads_first(x, self.options.layout).to(self.wide) for x in (self.query, self.key, self.value)
        )
        return query, key, value

    def added(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Mask and sinks; those that are added to scores in the wide dtype."""
        mask = self.biases.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(self.wide)
        if mask is not None:
            mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        return mask, None if self.biases.sinks is None else self.biases.sinks.to(self.wide)

    def weighting(self) -> Weighting:
        """How scores become weights."""
        places = self._places()
        scale = self.query.shape[-1] ** -0.5 if self.options.scale is None else self.options.scale
        return Weighting(
            places,
            scale,
            self.options.softcap,
            self.options.causal != "none",
            self.options.window_left,
            self.options.window_right,
            self._slopes(places),
            self.options.dropout_p,
            self.options.seed or 0,
        )

    def finished(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The results in the layout and dtype of the call."""
        out = from_heads_first(out.to(self.query.dtype), self.options.layout)
        return out, lse.squeeze(0) if self.is_packed else lse

    def _places(self) -> Places:
        rows, columns = lengths(self.query, self.options.layout), lengths(self.key, self.options.layout)
        is_top_left = self.options.causal == "top_left"
        if self.sequences.cu_seqlens_q is not None and self.sequences.cu_seqlens_k is not None:
            return packed_places(
                rows,
                columns,
                is_top_left,
                self.sequences.cu_seqlens_q,
                self.sequences.cu_seqlens_k,
                self.sequences.seqused_q,
                self.sequences.seqused_k,
            )
        return dense_places(
            rows, columns, is_top_left, self.query.device, self.sequences.seqused_q, self.sequences.seqused_k
        )

    def _slopes(self, places: Places) -> torch.Tensor | None:
        """ALiBi's slopes, broadcast to [B, H, Sq, 1]."""
        if self.biases.alibi_slopes is None:
            return None
        slopes = self.biases.alibi_slopes.to(self.wide)
        if slopes.ndim == 1:
            return slopes[None, :, None, None]
        if not self.is_packed or places.query_of is None:
            return slopes[:, :, None, None]
        return slopes[places.query_of[0].clamp(min=0)].transpose(0, 1)[None, :, :, None]

    def _check_tensors(self) -> None:
        query, key, value = self.query, self.key, self.value
        axes = 3 if self.is_packed else 4
        if any(x.ndim != axes for x in (query, key, value)):
            raise ValueError(
                f"attention: layout={self.options.layout!r} takes q, k and v with {axes} axes; "
                f"found {query.ndim}, {key.ndim} and {value.ndim}."
            )
        if not query.dtype == key.dtype == value.dtype or not query.dtype.is_floating_point:
            raise TypeError(
                f"attention: q, k and v are {query.dtype}, {key.dtype} and {value.dtype}; "
                "give one floating-point dtype."
            )
        (batch, heads, _, size), (b_k, groups, columns, size_k), (b_v, groups_v, columns_v, _) = (
            to_heads_first(x, self.options.layout).shape for x in (query, key, value)
        )
        if not batch == b_k == b_v or columns != columns_v or groups != groups_v or size != size_k:
            raise ValueError(
                f"attention: q {tuple(query.shape)}, k {tuple(key.shape)} and v {tuple(value.shape)} in "
                f"layout {self.options.layout!r} do not fit: they need one batch, k and v one length and number of "
                "heads, q and k one head size."
            )
        if not groups or heads % groups:
            raise ValueError(
                f"attention: {heads} query heads and {groups} key heads were given; the first must be a multiple of "
                "the second."
            )

    def _check_sequences(self) -> None:
        ends = {"cu_seqlens_q": self.sequences.cu_seqlens_q, "cu_seqlens_k": self.sequences.cu_seqlens_k}
        given = [name for name, value in ends.items() if value is not None]
        if len(given) != 2 * self.is_packed:
            raise ValueError(
                f"attention: layout={self.options.layout!r} was given with {' and '.join(given) or 'no cu_seqlens'}; "
                "'thd' takes cu_seqlens_q and cu_seqlens_k, the other layouts take neither."
            )
        sizes = {value.shape[0] - 1 for value in ends.values() if value is not None and value.ndim == 1}
        if given and (len(sizes) != 1 or min(sizes) < 1):
            raise ValueError(
                "attention: cu_seqlens_q and cu_seqlens_k must be [N + 1] for the same N sequences, at least one; "
                f"found {[tuple(value.shape) for value in ends.values() if value is not None]}."
            )
        number = sizes.pop() if given else to_heads_first(self.query, self.options.layout).shape[0]
        for name, value in {
            **ends,
            "seqused_q": self.sequences.seqused_q,
            "seqused_k": self.sequences.seqused_k,
        }.items():
            if value is not None and value.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"attention: {name} is {value.dtype}; give int32.")
            if name not in ends and value is not None and value.shape != (number,):
                raise ValueError(f"attention: {name} is {tuple(value.shape)}; give one length for each of {number}.")

    def _check_biases(self) -> None:
        batch, heads, rows, _ = to_heads_first(self.query, self.options.layout).shape
        full = (batch, heads, rows, lengths(self.key, self.options.layout))
        mask, sinks = self.biases.mask, self.biases.sinks
        if mask is not None:
            if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
                raise TypeError(f"attention: mask is {mask.dtype}; give bool (True = keep) or a floating-point dtype.")
            pairs = zip(reversed(mask.shape), reversed(full), strict=False)
            if mask.ndim not in (2, 3, 4) or any(m not in (1, n) for m, n in pairs):
                raise ValueError(f"attention: mask {tuple(mask.shape)} does not broadcast to [B, H, Sq, Sk] = {full}.")
        if sinks is not None and sinks.shape != (heads,):
            raise ValueError(f"attention: sinks is {tuple(sinks.shape)}; give one number for each of {heads} heads.")
        number = batch if self.sequences.cu_seqlens_q is None else self.sequences.cu_seqlens_q.shape[0] - 1
        check_slopes("attention", self.biases.alibi_slopes, heads, number)


def check_numbers(op: str, causal: str, left: int, right: int, softcap: float) -> None:
    """Refuse unknown values of options. Raises ValueError."""
    if causal not in CAUSAL:
        raise ValueError(f"{op}: causal={causal!r} was given; choose one of {', '.join(CAUSAL)}.")
    if left < -1 or right < -1:
        raise ValueError(f"{op}: window ({left}, {right}) was given; sizes are -1 = unlimited, or at least 0.")
    if softcap < 0:
        raise ValueError(f"{op}: softcap={softcap} was given; 0 is none, else it must be positive.")


def check_slopes(op: str, slopes: torch.Tensor | None, heads: int, batch: int) -> None:
    """Refuse slopes of another shape, or that want a gradient. Raises ValueError."""
    if slopes is None:
        return
    if slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(f"{op}: alibi_slopes is {tuple(slopes.shape)}; give [{heads}] or [{batch}, {heads}].")
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: alibi_slopes requires a gradient; slopes are constants. Pass a learned bias as mask.")
