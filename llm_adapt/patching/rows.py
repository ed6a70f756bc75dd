"""Patch and Entry: one row = what is replaced, by what, why, and what it must look like today.

Targets are written "package.module:Class.attribute". The colon separates what is imported from what is
looked up, so that a misspelt name cannot be mistaken for a module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

from llm_adapt.errors import PatchError

__all__ = ["Entry", "Loan", "Patch", "Row", "split_target"]

Kind = Literal["replace", "wrap", "add"]


@dataclass(frozen=True)
class Patch:
    """Replace one attribute of a module or class.

    Attributes:
        target: "package.module:qualified.name".
        new: the object to install ("replace", "add"), or a function original -> object ("wrap").
        reason: one line for the report.
        kind: "replace" and "wrap" need the target to exist; "add" also serves where it does not.
        optional: a missing target is a reported skip instead of an error.
        versions: upstream versions the row was written for, e.g. "megatron-core 0.12 to 0.19".
        fingerprints: accepted fingerprints of the original (see fingerprint.py), version -> value; empty = unchecked.
        on_mismatch: what happens to an original whose fingerprint is none of these.
        rebind: also replace copies made by `from module import name` and the like.
    """

    target: str
    new: Any
    reason: str
    kind: Kind = "replace"
    optional: bool = False
    versions: str = ""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    on_mismatch: Literal["refuse", "skip"] = "skip"
    rebind: bool = True

    @property
    def module(self) -> str:
        """Module that must be imported before the row can be applied."""
        return split_target(self.target)[0]


@dataclass(frozen=True)
class Entry:
    """Set one key of a mapping (or add one item to a list, with `key=None`) that a module keeps.

    Attributes:
        target: "package.module:name" of the dict or list.
        key: key of the dict; None for a list, where `value` is appended and the list sorted by `sort_key`.
        value: what is stored.
        reason: one line for the report.
    """

    target: str
    value: Any
    reason: str
    key: Any = None
    sort_key: Callable[[Any], Any] | None = None

    @property
    def module(self) -> str:
        """Module that must be imported before the row can be applied."""
        return split_target(self.target)[0]


@dataclass(frozen=True)
class Loan:
    """Lend a package that is not installed to one module, for the time of its import only.

    Some modules import a package that they use on one path only. They get a stand-in for the names they need
    while they are imported; nobody else sees it, and a real package always wins.

    Attributes:
        target: "package.module:" + the name of the lent package, "megatron.core.x:triton".
        make: builds the stand-ins: module name -> module, the package and its submodules.
        reason: one line for the report.
    """

    target: str
    make: Callable[[], Mapping[str, ModuleType]]
    reason: str

    @property
    def module(self) -> str:
        """Module that receives the loan."""
        return split_target(self.target)[0]

    @property
    def package(self) -> str:
        """Package that is lent."""
        return split_target(self.target)[1]


Row = Patch | Entry | Loan


def split_target(target: str) -> tuple[str, str]:
    """Split "module:qualified.name".

    Raises:
        PatchError: the text has not exactly one colon with something on both sides.
    """
    module, _, name = target.partition(":")
    if not module or not name or ":" in name:
        raise PatchError(f"Patch target {target!r} was asked; a target is written 'package.module:Class.attribute'.")
    return module, name
