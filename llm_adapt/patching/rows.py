"""Patch, Entry, Loan and Survey: one row = what is replaced, by what, why, and what it must look like today.

Targets are written "package.module:Class.attribute". The colon separates what is imported from what is
looked up, so that a misspelt name cannot be mistaken for a module.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

from llm_adapt.errors import PatchError

__all__ = ["Entry", "Loan", "Patch", "PlanItem", "Row", "Survey", "split_target"]

Kind = Literal["replace", "wrap", "add"]


class _Targeted:
    """The two halves of a target."""

    target: str

    @property
    def module(self) -> str:
        """Module that must be imported before the row can be applied."""
        return split_target(self.target)[0]

    @property
    def name(self) -> str:
        """Qualified name inside the module."""
        return split_target(self.target)[1]


@dataclass(frozen=True, eq=False)  # rows are told apart by identity
class Patch(_Targeted):
    """Replace one attribute of a module or class.

    Attributes:
        target: "package.module:qualified.name".
        new: the object to install ("replace", "add"), or a function original -> object ("wrap"). That function
            must not import: it may run inside the import of the target.
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


@dataclass(frozen=True, eq=False)
class Entry(_Targeted):
    """Set one key of a mapping (or add one item to a list, with `key=None`) that a module keeps.

    Attributes:
        target: "package.module:name" of the dict or list.
        value: what is stored.
        reason: one line for the report.
        key: key of the dict; None for a list.
        sort_key: order of the list, in which the value takes its place; None = at the end.
        label: what the key stands for, where the key itself says nothing to a reader (an id).
    """

    target: str
    value: Any
    reason: str
    key: Any = None
    sort_key: Callable[[Any], Any] | None = None
    label: str = ""


@dataclass(frozen=True, eq=False)
class Loan(_Targeted):
    """Lend a package that is not installed, or does not work, to one module, for the time of its import only.

    Some modules import a package that they use on one path only. Their own import statements get a stand-in;
    nobody else sees it, sys.modules never holds it, and a real package that works always wins.

    Attributes:
        target: "package.module:" + the name of the lent top-level package, "megatron.core.x:triton".
        make: builds the stand-ins: module name -> module, the package and its submodules.
        reason: one line for the report.
    """

    target: str
    make: Callable[[], Mapping[str, ModuleType]]
    reason: str


Row = Patch | Entry | Loan


@dataclass(frozen=True, eq=False)
class Survey:
    """Look at each module of a family, once its body has run, and patch what is recognised there.

    For what no list of names can keep up with: a hundred classes that compute one formula.

    Attributes:
        modules: patterns of module names, such as "transformers.models.*.modeling_*"; a * goes past dots.
        find: module -> rows of that very module. It may import llm_adapt, never the family that it looks at. What it
            raises is a reported skip of the module, an error in strict mode.
        reason: one line for the report.
    """

    modules: tuple[str, ...]
    find: Callable[[ModuleType], Iterable[Patch | Entry]]
    reason: str

    @property
    def target(self) -> str:
        """What the report calls it."""
        return ", ".join(self.modules)

    def covers(self, module: str) -> bool:
        """Whether a module belongs to the family."""
        return any(fnmatch.fnmatchcase(module, pattern) for pattern in self.modules)


PlanItem = Row | Survey


@functools.cache
def split_target(target: str) -> tuple[str, str]:
    """Split "module:qualified.name".

    Raises:
        PatchError: the text has not exactly one colon with something on both sides.
    """
    module, _, name = target.partition(":")
    if not module or not name or ":" in name:
        raise PatchError(f"Patch target {target!r} was asked; a target is written 'package.module:Class.attribute'.")
    return module, name
