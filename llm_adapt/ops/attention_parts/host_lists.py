"""Cumulative lengths on the host, for kernels that take lists: read once for each version of a tensor."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["host_list"]

_lists = WeakIdKeyDictionary()  # tensor -> (its version, its values)


def host_list(lengths: torch.Tensor) -> list[int]:
    """The values of a tensor of lengths.

    Reading waits for the device; the list is kept for as long as the tensor lives and is not written to. A tensor
    made inside torch.inference_mode() has no version, so a change of it would not be seen: it is read each time.
    """
    if lengths.is_inference():
        return [int(value) for value in lengths.tolist()]
    known = _lists.get(lengths)
    if known is None or known[0] != lengths._version:
        known = _lists[lengths] = (lengths._version, [int(value) for value in lengths.tolist()])
    found: list[int] = known[1]
    return found
