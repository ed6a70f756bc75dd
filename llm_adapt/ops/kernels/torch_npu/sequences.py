"""Packed sequences as the kernels of torch_npu take them: lists on the host, cumulative, without the leading zero.

The kernels take no query that sees no key (their result is undefined), so such queries, and padding behind the last
sequence, are left out before the call and are zeros after it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from llm_adapt.ops.attention_parts.host_lists import host_list

__all__ = ["Packing", "packing"]


@dataclass(frozen=True)
class Packing:
    """Which tokens are given to the kernel, and where their sequences end.

    Attributes:
        ends_q, ends_k: cumulative, without leading zero.
        chosen: the queries given, None = the first `rows` ones.
        rows: how many queries are given.
        tokens: how many queries there are.
    """

    ends_q: list[int]
    ends_k: list[int]
    chosen: list[int] | None
    rows: int
    tokens: int

    def pack(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tokens of sequences, without those that see nothing."""
        query = query[: self.rows] if self.chosen is None else query[self._index(query.device)]
        last = self.ends_k[-1]
        return query, key[:last], value[:last]

    def unpack(self, rows: torch.Tensor, empty: float) -> torch.Tensor:
        """Results [rows, ...] at the places of their tokens [tokens, ...], `empty` elsewhere."""
        if self.rows == self.tokens:
            return rows
        whole = rows.new_full((self.tokens, *rows.shape[1:]), empty)
        index = torch.arange(self.rows, device=rows.device) if self.chosen is None else self._index(rows.device)
        return whole.index_copy(0, index, rows)

    def _index(self, device: torch.device) -> torch.Tensor:
        return torch.tensor(self.chosen, dtype=torch.int64, device=device)


def packing(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, tokens: int, right: int, is_top_left: bool
) -> Packing:
    """What to give to the kernel.

    Args:
        tokens: length of the packed queries.
        right: keys right of its own place that a query may see, -1 = all.
        is_top_left: query i stands at key i, and sees one wherever there is one.
    """
    starts_q, starts_k = host_list(cu_seqlens_q), host_list(cu_seqlens_k)
    sequences = list(zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False))
    counts = []
    for first, end, first_key, end_key in sequences:
        seen = end_key - first_key
        if right >= 0 and not is_top_left and seen:
            counts.append(min(end - first, seen + right))
        else:
            counts.append(end - first if seen else 0)
    # A sequence without queries and keys is left out: first in the list it would look like a leading zero.
    given = [
        (count, keys) for count, (_, _, first, keys) in zip(counts, sequences, strict=True) if count or keys > first
    ]
    ends_q = list(itertools.accumulate(count for count, _ in given)) or [0]
    ends_k = [end for _, end in given]
    if ends_q[-1] == starts_q[-1]:
        return Packing(ends_q, ends_k, None, ends_q[-1], tokens)
    chosen: list[int] = []
    for (_, end, _, _), count in zip(sequences, counts, strict=True):
        chosen += range(end - count, end)  # those that see nothing stand first
    return Packing(ends_q, ends_k, chosen, ends_q[-1], tokens)
