"""The policy in force, for the whole process, and who is told when it changes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Protocol

from llm_adapt.ops.dispatch.policy import Policy

__all__ = ["listeners", "lock", "policy_in_force", "start_over", "use_policy", "using"]


class Listener(Protocol):
    """Who decides by the policy: the dispatcher of an op."""

    def forget(self) -> None:
        """The policy has changed."""

    def start_over(self) -> None:
        """A session begins or ends."""


lock = threading.RLock()
listeners: dict[str, Listener] = {}  # op -> its dispatcher, for the ops imported so far
_policy = Policy()  # nothing is preferred: every op is its reference until patch() or the user says otherwise


def policy_in_force() -> Policy:
    """The policy that decides now."""
    return _policy


def use_policy(policy: Policy) -> Policy:
    """Put a policy in force for the whole process.

    Returns:
        the policy that was in force before.
    """
    global _policy
    with lock:
        before, _policy = _policy, policy
        for listener in listeners.values():
            listener.forget()
    return before


def start_over(policy: Policy) -> None:
    """Put a policy in force and forget calls, proofs and quarantines: a session begins or ends."""
    with lock:
        use_policy(policy)
        for listener in listeners.values():
            listener.start_over()


@contextlib.contextmanager
def using(policy: Policy) -> Iterator[Policy]:
    """`with using(policy):` that policy inside the block, in all threads."""
    before = use_policy(policy)
    try:
        yield policy
    finally:
        use_policy(before)
