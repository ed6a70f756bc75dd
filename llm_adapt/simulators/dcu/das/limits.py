"""How a simulated package refuses: what the real one would not take, what it lacks, what is not public of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from llm_adapt.simulators.base import SimulatorError

__all__ = ["demand", "demand_torch", "missing", "not_public"]


def demand(condition: bool, message: str) -> None:
    """Raise RuntimeError, as the compiled part of a package does, unless the condition holds."""
    if not condition:
        raise RuntimeError(message)


def demand_torch(name: str) -> None:
    """Refuse to be loaded before torch, as a compiled part of apex that is linked with libc10.so."""
    if "torch" not in sys.modules:
        raise ImportError(
            f"libc10.so: cannot open shared object file: No such file or directory (import torch before {name})"
        )


def missing(package: str) -> Callable[[str], NoReturn]:
    """A module's __getattr__ for names that no public source shows in it."""

    def refuse(name: str) -> NoReturn:
        raise AttributeError(
            f"module {package!r} of the DCU simulator has no {name!r}: it has what public sources show of DTK's build."
        )

    return refuse


def not_public(name: str) -> Callable[..., NoReturn]:
    """A function whose existence is recorded and whose arguments are not."""

    def refuse(*arguments: Any, **keywords: Any) -> NoReturn:
        raise SimulatorError(f"{name} was called; that it exists is public, what it takes is not.")

    refuse.__name__ = refuse.__qualname__ = name.rpartition(".")[2]
    return refuse
