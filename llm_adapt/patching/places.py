"""Places: where a target is today, found without running descriptors or a module's lazy __getattr__."""

from __future__ import annotations

import difflib
import inspect
import sys
from types import ModuleType
from typing import Any, NamedTuple

from llm_adapt.errors import PatchError
from llm_adapt.patching.journal import ABSENT
from llm_adapt.patching.rows import Patch, Row

__all__ = ["MissingTarget", "Place", "find", "like", "missing", "namespace", "plain"]


class MissingTarget(PatchError):
    """The target, or a name before its last, does not exist."""


class Place(NamedTuple):
    """Where a row writes: an attribute of a module or class, with what is there now."""

    owner: Any
    name: str
    original: Any  # as stored: staticmethod, classmethod, property and slots stay what they are
    is_own: bool  # False when a class inherits it


def namespace(module: ModuleType) -> dict[str, Any]:
    """A module's names; does not wake a module that importlib.util.LazyLoader has put to sleep."""
    names: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return names


def plain(value: Any) -> Any:
    """The function inside a staticmethod or classmethod."""
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def like(stored: Any, function: Any) -> Any:
    """`function` in the wrapper, staticmethod or classmethod, that `stored` has."""
    is_wrapped = isinstance(stored, (staticmethod, classmethod)) and not isinstance(
        function, (staticmethod, classmethod)
    )
    return type(stored)(function) if is_wrapped else function


def find(row: Row) -> Place:
    """Look a target up; its last name may be absent, the names before it may not.

    Raises:
        MissingTarget: a name before the last does not exist.
        PatchError: a name before the last is no class or module.
    """
    owner: Any = sys.modules[row.module]
    *parents, name = row.name.split(".")
    for parent in parents:
        step = _static(owner, parent)
        if step is ABSENT:
            raise missing(row, owner, parent)
        if not isinstance(step, (type, ModuleType)):
            raise PatchError(
                f"{row.target} was asked; {parent} is a {type(step).__name__}, and only attributes of modules and "
                f"classes can be patched. Name the class that has {name!r}."
            )
        owner = step
    return Place(owner, name, _static(owner, name), name in vars(owner))


def _static(owner: Any, name: str) -> Any:
    if isinstance(owner, ModuleType):
        return vars(owner).get(name, ABSENT)
    return inspect.getattr_static(owner, name, ABSENT)


def missing(row: Row, owner: Any, name: str) -> MissingTarget:
    """The error for a name that is not there: target, version and nearest names."""
    where = vars(owner)["__name__"] if isinstance(owner, ModuleType) else owner.__qualname__
    near = difflib.get_close_matches(name, list(vars(owner)), n=3, cutoff=0.6)
    if near:
        hint = f"; nearest names: {', '.join(near)}"
    elif "__getattr__" in vars(owner) and isinstance(owner, ModuleType):
        hint = "; the module makes names when they are asked for: name the module that defines it"
    else:
        hint = ""
    written = f" (written for {row.versions})" if isinstance(row, Patch) and row.versions else ""
    return MissingTarget(
        f"{row.target} does not exist: {where} ({_version(row.module)}) has no {name!r}{hint}{written}. "
        "Correct the target, or use a version that has it."
    )


def _version(module: str) -> str:
    """Version of the nearest package that tells one: `megatron` is a namespace, `megatron.core` has a version."""
    while module:
        found = sys.modules.get(module)
        version = namespace(found).get("__version__") if isinstance(found, ModuleType) else None
        if version is not None:
            return f"{module} {version}"
        module = module.rpartition(".")[0]
    return "of unknown version"
