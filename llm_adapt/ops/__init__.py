"""Fused operators: each file here is one; dispatch/ says which kernel of kernels/ serves it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

__all__ = ["using"]


@contextmanager
def using(ops: str | PathLike[str] | Mapping[str, Any] = "", proof: str | None = None) -> Iterator[None]:
    """`with using("rms_norm=liger"):` changes who serves which op inside the block, in all threads.

    Args:
        ops: parts of a policy as text, as a mapping, or as the path of a TOML file (docs/ops.md). They are put over
            the policy in force: choices of the same op are replaced, an order replaces the order.
        proof: "off", "first", "strict" or "sample:N"; default: as before.

    Raises:
        SettingsError: an unknown op, library or part, or a proof that is none of these.
    """
    from llm_adapt.ops.dispatch.in_force import policy_in_force
    from llm_adapt.ops.dispatch.in_force import using as in_force
    from llm_adapt.ops.dispatch.policy import amended

    with in_force(amended(policy_in_force(), ops, proof)):
        yield
