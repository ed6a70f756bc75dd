"""Process groups on gloo: one real group per set of ranks.

Each gloo group keeps threads and a full mesh of connections. Megatron asks for some twenty groups a rank, most of
them with members that another group already has: at 8 ranks its tensor-parallel tests took 110 s and 3 600
threads with a group for each request, and 7 s with one group per set.

Sharing keeps the meaning of a program whose ranks issue the collectives of a rank set in one order. That is
what gloo needs within a group anyway, and what Megatron does.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch.distributed as dist

__all__ = ["GroupCache"]


class GroupCache:
    """Wraps new_group and destroy_process_group; a shared group is destroyed with its last user.

    Args:
        new_group: torch's own function.
        destroy: torch's own destroy_process_group.
    """

    def __init__(self, new_group: Callable[..., Any], destroy: Callable[..., None]) -> None:
        self._new_group, self._destroy = new_group, destroy
        self._signature = inspect.signature(new_group)
        self._groups: dict[Hashable, Any] = {}
        self._users: dict[int, int] = {}
        self._lock = threading.Lock()

    def new_group(self, *args: Any, **kwargs: Any) -> Any:
        """A group of these ranks: the one that exists, or a new one. Same arguments as torch's."""
        call = self._signature.bind(*args, **kwargs)
        call.apply_defaults()
        key = self._key(call.arguments)
        with self._lock:
            if key in self._groups:
                group = self._groups[key]
                self._users[id(group)] += 1
                return group
        group = self._new_group(*call.args, **call.kwargs)
        with self._lock:
            self._groups[key] = group
            self._users[id(group)] = self._users.get(id(group), 0) + 1
        return group

    def destroy(self, group: Any = None) -> None:
        """Destroy a group when its last user asks; None destroys everything, as in torch."""
        with self._lock:
            if group is None or group is dist.group.WORLD:
                self._groups.clear()
                self._users.clear()
            elif self._users.get(id(group), 1) > 1:
                self._users[id(group)] -= 1
                return
            else:
                self._users.pop(id(group), None)
                self._groups = {key: kept for key, kept in self._groups.items() if kept is not group}
        self._destroy(group)

    @staticmethod
    def _key(asked: dict[str, Any]) -> Hashable:
        """What two requests must agree on to share; every rank computes the same key for the same request."""
        ranks = asked["ranks"]
        ranks = list(range(dist.get_world_size())) if ranks is None else list(ranks)
        if asked.get("sort_ranks", True):
            ranks.sort()
        # Whether non-members take part in the creation must match, or one side would wait for the other.
        return tuple(ranks), asked["backend"], asked["timeout"], asked.get("use_local_synchronization", False)
