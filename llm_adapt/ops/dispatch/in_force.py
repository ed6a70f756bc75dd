"""The policy in force, for the whole process, and who is told when it changes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from llm_adapt.ops.dispatch.policy import Policy

__all__ = ["Moment", "listeners", "lock", "moment", "policy_in_force", "start_over", "use_policy", "using"]


class Listener(Protocol):
    """Who decides by the policy: the dispatcher of an op."""

    def forget(self) -> None:
        """The policy has changed."""

    def start_over(self) -> None:
        """A session begins or ends."""


lock = threading.RLock()
listeners: dict[str, Listener] = {}  # op -> its dispatcher, for the ops imported so far


class Moment(NamedTuple):
    """A policy, and how often it had been changed when it was put in force: the same one may leave and come back."""

    policy: Policy
    changes: int


_now = Moment(Policy(), 0)  # nothing is preferred: every op is its reference until patch() or the user says otherwise


def moment() -> Moment:
    """The policy that decides now, and since which change."""
    return _now


def policy_in_force() -> Policy:
    """The policy that decides now."""
    return _now.policy


def use_policy(policy: Policy) -> Policy:
    """Put a policy in force for the whole process.

    Returns:
        the policy that was in force before.
    """
    global _now
    with lock:
        before = _now.policy
        _now = Moment(policy, _now.changes + 1)
        for listener in list(listeners.values()):  # another thread may import an op
            listener.forget()
    return before


def start_over(policy: Policy) -> None:
    """Put a policy in force and forget calls, proofs and quarantines: a session begins or ends."""
    with lock:
        use_policy(policy)
        for listener in list(listeners.values()):
            listener.start_over()


@contextlib.contextmanager
def using(policy: Policy) -> Iterator[Policy]:
    """`with using(policy):` that policy inside the block, in all threads."""
    before = use_policy(policy)
    try:
        yield policy
    finally:
        use_policy(before)
