"""The policy in force, for the whole process, and the ops that it decides for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llm_adapt.ops.dispatch.policy import Policy

if TYPE_CHECKING:
    from llm_adapt.ops.dispatch.dispatcher import Dispatcher

__all__ = ["dispatchers", "lock", "policy_in_force", "start_over", "use_policy", "using"]

lock = threading.RLock()
dispatchers: dict[str, Dispatcher] = {}  # op -> its dispatcher, for the ops imported so far
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
        for dispatcher in dispatchers.values():
            dispatcher.forget()
    return before


def start_over(policy: Policy) -> None:
    """Put a policy in force and forget calls, proofs and quarantines: a session begins or ends."""
    with lock:
        use_policy(policy)
        for dispatcher in dispatchers.values():
            dispatcher.start_over()


@contextlib.contextmanager
def using(policy: Policy) -> Iterator[Policy]:
    """`with using(policy):` that policy inside the block, in all threads."""
    before = use_policy(policy)
    try:
        yield policy
    finally:
        use_policy(before)
