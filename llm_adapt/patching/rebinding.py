"""Rebinding: the copies of a replaced object that other modules took before the patch.

`from torch import zeros` keeps the original under a name of its own. So do aliases, default arguments,
functools.partial objects, class attributes and module-level containers. All of these are found by
identity and replaced; what is found but cannot be replaced (base classes) is reported.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["rebind"]

Undo = Callable[[], None]
Swap = tuple[Any, Any, str]  # original, new, target text

# Modules of these packages keep their own copies: they implement the originals (torch), or never take one.
_SKIPPED_PACKAGES = frozenset({"llm_adapt", "torch", "numpy", "sympy", "builtins"}) | frozenset(sys.stdlib_module_names)
_MAX_CONTAINER = 10_000


def rebind(swaps: Iterable[Swap], undo: list[Undo]) -> tuple[int, list[str]]:
    """Replace every reachable copy of each original; append the reverse of each act to `undo`.

    Returns:
        The number of copies replaced, and one line per copy that cannot be.
    """
    table = {id(original): (original, new) for original, new, _ in swaps if _has_identity(original)}
    if not table:
        return 0, []
    before = len(undo)
    stale = [line for original, _, target in swaps for line in _subclasses(original, target)]
    for name, module in list(sys.modules.items()):
        if isinstance(module, types.ModuleType) and _in_scope(name):
            _Walker(table, undo, name).walk(vars(module))
    return len(undo) - before, stale


def _in_scope(module_name: str) -> bool:
    package = module_name.partition(".")[0]
    return package == "__main__" or package not in _SKIPPED_PACKAGES


def _has_identity(original: Any) -> bool:
    """Only functions and classes are told by identity; True, None and small numbers are everybody's."""
    return callable(original) or isinstance(original, (property, types.ModuleType))


def _subclasses(original: Any, target: str) -> list[str]:
    if not isinstance(original, type) or original.__module__.partition(".")[0] == "torch":
        return []
    return [
        f"{child.__module__}.{child.__qualname__} was derived from {target} before the patch and keeps it as base"
        for child in original.__subclasses__()
    ]


class _Walker:
    """Walks what one module owns: its names, its classes, defaults, partials and containers."""

    def __init__(self, table: dict[int, tuple[Any, Any]], undo: list[Undo], module: str) -> None:
        self.table, self.undo, self.module = table, undo, module
        self.seen: set[int] = set()

    def new_for(self, value: Any) -> Any | None:
        """The replacement of `value` (for a tuple: a tuple with its members replaced), or None."""
        if type(value) is tuple and len(value) <= _MAX_CONTAINER:
            return self.members(value) if any(id(item) in self.table for item in value) else None
        hit = self.table.get(id(value))
        return hit[1] if hit is not None and hit[0] is value else None

    def members(self, items: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same tuple with every original replaced."""
        return tuple(item if (new := self.new_for(item)) is None else new for item in items)

    def walk(self, namespace: dict[str, Any]) -> None:
        """Replace originals in a module's namespace and in everything the module itself defines."""
        for name, value in list(namespace.items()):
            new = self.new_for(value)
            if new is not None:
                namespace[name] = new
                self.undo.append(functools.partial(namespace.__setitem__, name, value))
            else:
                self.inside(value)

    def inside(self, value: Any) -> None:
        """Look into one value, once."""
        kind = type(value)
        if kind is types.FunctionType:
            if value.__module__ == self.module:
                self.defaults(value)
        elif kind in (dict, list, set):
            if len(value) <= _MAX_CONTAINER:
                self.container(value)
        elif kind is functools.partial:
            self.partial(value)
        elif isinstance(value, type) and value.__module__ == self.module and id(value) not in self.seen:
            self.seen.add(id(value))
            self.class_body(value)

    def class_body(self, owner: type) -> None:
        for name, value in list(vars(owner).items()):
            held = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
            new = self.new_for(held)
            if new is not None:
                setattr(owner, name, new if held is value else type(value)(new))
                self.undo.append(functools.partial(setattr, owner, name, value))
            else:
                self.inside(held)

    def defaults(self, function: types.FunctionType) -> None:
        old, old_kw = function.__defaults__, function.__kwdefaults__
        if old and any(self.new_for(item) is not None for item in old):
            function.__defaults__ = self.members(old)
            self.undo.append(functools.partial(setattr, function, "__defaults__", old))
        for name, item in list((old_kw or {}).items()):
            new = self.new_for(item)
            if new is not None and old_kw is not None:
                old_kw[name] = new
                self.undo.append(functools.partial(old_kw.__setitem__, name, item))

    def partial(self, call: functools.partial[Any]) -> None:
        new = self.new_for(call.func)
        args = self.members(call.args)
        if new is None and all(a is b for a, b in zip(args, call.args, strict=True)):
            return
        state = call.__reduce__()[2]
        call.__setstate__((call.func if new is None else new, args, call.keywords, vars(call)))  # type: ignore[attr-defined]
        self.undo.append(functools.partial(call.__setstate__, state))  # type: ignore[attr-defined]

    def container(self, box: Any) -> None:
        """Replace direct members of a dict, list or set, and look into the partials they hold."""
        if isinstance(box, dict):
            for key, value in list(box.items()):
                if (new := self.new_for(value)) is not None:
                    box[key] = new
                    self.undo.append(functools.partial(box.__setitem__, key, value))
                elif type(value) is functools.partial:
                    self.partial(value)
        elif isinstance(box, list):
            for index, value in enumerate(box):
                if (new := self.new_for(value)) is not None:
                    box[index] = new
                    self.undo.append(functools.partial(_put_back, box, new, value))
                elif type(value) is functools.partial:
                    self.partial(value)
        elif isinstance(box, set):
            for value in [item for item in box if self.new_for(item) is not None]:
                new = self.new_for(value)
                box.symmetric_difference_update({value, new})
                self.undo.append(functools.partial(box.symmetric_difference_update, {value, new}))


def _put_back(box: list[Any], new: Any, value: Any) -> None:
    """Undo for lists, by identity: the list may have grown or shrunk since."""
    for index, item in enumerate(box):
        if item is new:
            box[index] = value
            return
