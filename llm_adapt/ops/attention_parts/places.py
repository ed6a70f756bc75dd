"""Places: where each query stands among the keys, and which keys it may see.

All that depends on places follows from two numbers of a pair: whether query and key are of one sequence, and the
distance p(i) - j. Causal: distance >= 0. Window: -right <= distance <= left. ALiBi: -slope * |distance|.
B batch, N sequences packed in one batch entry, Sq and Sk lengths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Places", "dense_places", "packed_places"]

# Of tokens outside every sequence. Two numbers, so that such a query and such a key are not of one sequence.
_NO_QUERY, _NO_KEY = -1, -2


class Places(NamedTuple):
    """Places on the axis of keys.

    Attributes:
        query: p(i) [B or 1, Sq], int64.
        key: j [B or 1, Sk], int64.
        query_of: the sequence of each query [B or 1, Sq]; None = there is one, and all are in it.
        key_of: the sequence of each key [B or 1, Sk].
    """

    query: torch.Tensor
    key: torch.Tensor
    query_of: torch.Tensor | None = None
    key_of: torch.Tensor | None = None

    def part(self, rows: slice, columns: slice) -> Places:
        """The places of some queries and some keys."""
        query_of = None if self.query_of is None else self.query_of[:, rows]
        key_of = None if self.key_of is None else self.key_of[:, columns]
        return Places(self.query[:, rows], self.key[:, columns], query_of, key_of)

    def distance(self) -> torch.Tensor:
        """p(i) - j as [B or 1, 1, Sq, Sk]."""
        return (self.query[:, :, None] - self.key[:, None, :])[:, None]

    def visible(self, is_causal: bool, left: int, right: int) -> torch.Tensor | None:
        """Which keys each query may see [B or 1, 1, Sq, Sk]; None = all. left, right: -1 = unlimited."""
        parts = []
        if self.query_of is not None and self.key_of is not None:
            parts.append((self.query_of[:, :, None] == self.key_of[:, None, :])[:, None])
        if is_causal or left >= 0 or right >= 0:
            distance = self.distance()
            if is_causal:
                parts.append(distance >= 0)
            if left >= 0:
                parts.append(distance <= left)
            if right >= 0:
                parts.append(distance >= -right)
        seen = None
        for part in parts:
            seen = part if seen is None else seen & part
        return seen


def dense_places(
    rows: int,
    columns: int,
    is_top_left: bool,
    device: torch.device,
    used_q: torch.Tensor | None = None,
    used_k: torch.Tensor | None = None,
    first_k: torch.Tensor | None = None,
) -> Places:
    """Places when each batch entry is one sequence.

    Args:
        is_top_left: p(i) = i. Otherwise the last query stands at the last key: p(i) = i + Sk - Sq.
        used_q, used_k: lengths without padding at the end [B]; they are Sq and Sk then.
        first_k: keys before it are padding [B].
    """
    i = torch.arange(rows, device=device)[None]
    j = torch.arange(columns, device=device)[None]
    if used_q is None and used_k is None and first_k is None:
        return Places(i if is_top_left else i + (columns - rows), j)
    length_q: torch.Tensor | int = rows if used_q is None else used_q.to(i.dtype)[:, None]
    length_k: torch.Tensor | int = columns if used_k is None else used_k.to(i.dtype)[:, None]
    place = i if is_top_left else i + (length_k - length_q)
    is_key = j < length_k
    if first_k is not None:
        is_key = is_key & (j >= first_k[:, None])
    zero = torch.zeros_like(i)
    return Places(
        place, j, torch.where(i < length_q, zero, _NO_QUERY), torch.where(is_key, torch.zeros_like(j), _NO_KEY)
    )


def packed_places(
    rows: int,
    columns: int,
    is_top_left: bool,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    used_q: torch.Tensor | None = None,
    used_k: torch.Tensor | None = None,
) -> Places:
    """Places when sequences stand one behind the other: within its own sequence each has those of dense_places.

    Args:
        ends_q, ends_k: cumulative lengths with a leading 0 [N + 1]. Tokens after the last are in no sequence.
        used_q, used_k: tokens used of each sequence [N]; the others are padding.
    """
    i, query_of, length_q = _within(rows, ends_q, used_q, _NO_QUERY)
    j, key_of, length_k = _within(columns, ends_k, used_k, _NO_KEY)
    place = i if is_top_left else i + (length_k - length_q)[query_of.clamp(min=0)]
    return Places(place[None], j[None], query_of[None], key_of[None])


def _within(
    tokens: int, ends: torch.Tensor, used: torch.Tensor | None, outside: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Place of each token in its sequence [T], its sequence [T], and the lengths of the sequences [N]."""
    ends = ends.to(torch.int64).contiguous()
    t = torch.arange(tokens, device=ends.device)
    sequence = torch.searchsorted(ends[1:].contiguous(), t, right=True)  # empty sequences are passed over
    is_inside = sequence < ends.shape[0] - 1
    sequence = torch.where(is_inside, sequence, 0)
    place = t - ends[sequence]
    length = ends.diff() if used is None else used.to(torch.int64)
    is_inside = is_inside & (place < length[sequence])
    return place, torch.where(is_inside, sequence, outside), length
