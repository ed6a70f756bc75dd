"""torch.backends.mlu and torch.backends.cnnl: the switches for TF32. They hold their values and change no numbers."""

from __future__ import annotations

import sys
from types import ModuleType

import torch

__all__ = ["register"]


class _Switch:
    """One group of switches: allow_tf32, a bool, and nothing else."""

    __slots__ = ("_allow_tf32", "_name")

    def __init__(self, name: str, allow_tf32: bool) -> None:
        self._name, self._allow_tf32 = name, allow_tf32

    @property
    def allow_tf32(self) -> bool:
        """Whether TF32 may be used."""
        return self._allow_tf32

    @allow_tf32.setter
    def allow_tf32(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise RuntimeError(f"{self._name}.allow_tf32 takes a bool, not {value!r}.")
        self._allow_tf32 = value


class _Cnnl(ModuleType):
    """torch.backends.cnnl: allow_tf32, for convolutions."""

    allow_tf32 = _Switch.allow_tf32
    _name = "torch.backends.cnnl"
    _allow_tf32 = True


def register() -> None:
    """Make torch.backends.mlu and torch.backends.cnnl."""
    mlu = ModuleType("torch.backends.mlu")
    mlu.matmul = _Switch("torch.backends.mlu.matmul", False)  # type: ignore[attr-defined]
    mlu.custom = _Switch("torch.backends.mlu.custom", True)  # type: ignore[attr-defined]
    for module in (mlu, _Cnnl("torch.backends.cnnl")):
        sys.modules[module.__name__] = module
        setattr(torch.backends, module.__name__.rpartition(".")[2], module)
