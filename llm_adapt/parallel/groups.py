"""Process groups on gloo: one real group per set of ranks.

Each gloo group keeps threads and a full mesh of connections. Megatron asks for some twenty groups a rank, most of
them with members that another group already has: at 8 ranks its tensor-parallel tests took 110 s and 3 600
threads with a group for each request, and 7 s with one group per set.

Sharing keeps the meaning of a program whose ranks issue the collectives of a rank set in one order. That is
what gloo needs within a group anyway, and what Megatron does.

A shared group lives as long as the default group. Every rank must decide alike whether a request makes a group,
members or not, and only requests are seen by all of them: who destroys which handle, and when, is seen by the
members at most, each at its own time. A group that its last user destroyed would be made anew by some ranks and
not by others, and torch would count the following groups differently on them, until one waits for ever.

Workaround: gloo-group-per-rank-set
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch.distributed as dist

__all__ = ["GroupCache"]

# What all is gloo for tensors of the CPU. undefined: torch chooses, and chooses gloo.
_GLOO = ("gloo", "cpu:gloo", "undefined")


class GroupCache:
    """Wraps new_group and destroy_process_group.

    Args:
        new_group: torch's own function.
        destroy: torch's own destroy_process_group.
    """

    def __init__(self, new_group: Callable[..., Any], destroy: Callable[..., None]) -> None:
        self._new_group, self._destroy = new_group, destroy
        self._signature = inspect.signature(new_group)
        self._groups: dict[Hashable, Any] = {}
        self._lock = threading.Lock()

    def new_group(self, *args: Any, **kwargs: Any) -> Any:
        """A group of these ranks: the one that exists, or a new one. Same arguments as torch's."""
        call = self._signature.bind(*args, **kwargs)
        call.apply_defaults()
        key = self._key(call.arguments)
        with self._lock:
            if key is not None and key in self._groups:
                return self._groups[key]
        group = self._new_group(*call.args, **call.kwargs)
        if key is not None:
            with self._lock:
                self._groups[key] = group
        return group

    def destroy(self, group: Any = None) -> bool:
        """Destroy everything (None or the default group) or a group that is not shared, as torch does.

        Returns:
            False for a shared group: it stays for its other users, and for the next who asks for its ranks.
        """
        with self._lock:
            if group is None or group is dist.group.WORLD:
                self._groups.clear()
            elif any(shared is group for shared in self._groups.values()):
                return False
        self._destroy(group)
        return True

    @staticmethod
    def _key(asked: dict[str, Any]) -> Hashable:
        """What two requests must agree on to share, alike on every rank; None for a group that is not shared."""
        if (asked["backend"] or dist.get_backend()) not in _GLOO or asked["pg_options"] is not None:
            return None
        ranks = asked["ranks"]
        ranks = list(range(dist.get_world_size())) if ranks is None else list(ranks)
        if asked.get("sort_ranks", True):
            ranks.sort()
        # Whether non-members take part in the creation must match, or one side would wait for the other.
        return tuple(ranks), asked["timeout"], asked.get("use_local_synchronization", False)
