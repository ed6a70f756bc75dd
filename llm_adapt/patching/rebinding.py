"""Rebinding: the copies of a replaced object that other modules took before the patch.

`from torch import zeros` keeps the original under a name of its own. So do aliases, default arguments,
functools.partial objects, closures, class attributes and containers. All of these are found by identity and
replaced, in every module that is not torch's or Python's own; nothing is called and no lazy name is woken.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import Field
from typing import Any, NamedTuple

from llm_adapt.patching.journal import Journal, Slot, attribute, key, key_itself, member
from llm_adapt.patching.places import namespace
from llm_adapt.patching.rows import Row

__all__ = ["Stuck", "Swap", "has_identity", "in_scope", "rebind"]

# Modules of these packages keep their own copies: they implement the originals, or come with torch and take none.
_SKIPPED_PACKAGES = sys.stdlib_module_names | {
    *("llm_adapt", "torch", "torchgen", "functorch", "numpy", "sympy", "mpmath", "networkx"),
    *("tqdm", "typing_extensions", "_distutils_hack"),
}
_MAX_MEMBERS = 10_000  # a larger container is data
_MAX_DEPTH = 5
_KEEP: Any = object()

_CACHED = functools._lru_cache_wrapper
_BOXES = (dict, list, set, frozenset, tuple, deque, functools.partial, functools.partialmethod)
_WALKED_INTO = (types.FunctionType, type, Field, _CACHED, *_BOXES)
_class_names = type.__dict__["__dict__"].__get__  # past a metaclass's __getattribute__


class Swap(NamedTuple):
    """Put `new` where `original` is: everywhere, or (alias) only under the name that the target gave it."""

    original: Any
    new: Any
    row: Row
    alias: str = ""


class Stuck(NamedTuple):
    """A copy that keeps the original."""

    row: Row
    where: str


def rebind(
    swaps: Iterable[Swap],
    journal: Journal,
    ours: Container[int] = (),
    roots: Iterable[Any] = (),
    also: Container[str] = (),
    within: Container[str] | None = None,
) -> list[Stuck]:
    """Replace every copy of each original that is found, as acts of the journal.

    Args:
        ours: ids of replacements, which use the originals and must keep them.
        roots: objects that are searched besides what modules hold: originals, which only replacements hold now.
        also: names of modules that are searched although they are torch's or Python's own.
        within: the only modules that are searched; None = all.

    Returns:
        The copies found that cannot be replaced.
    """
    walker = _Walker({id(swap.original): swap for swap in swaps}, journal, ours, also)
    for name, module in entries(sys.modules) if walker.table else ():
        if name.partition(".")[0] in _SKIPPED_PACKAGES and name not in also:  # as in_scope, without a call
            continue
        if within is not None and name not in within:
            continue
        if issubclass(type(module), types.ModuleType):
            walker.module = name
            walker.mapping(namespace(module), depth=0)
    walker.module = "an original"
    for root in roots if walker.table else ():
        walker.look(root, depth=0)
    return walker.stuck


def in_scope(module_name: str) -> bool:
    """Whether the copies that a module holds are replaced."""
    return module_name.partition(".")[0] not in _SKIPPED_PACKAGES


def has_identity(original: Any) -> bool:
    """Only functions, classes and the like are told by identity; True, None and small numbers are everybody's."""
    return callable(original) or isinstance(original, (property, types.ModuleType))


class _Walker:
    """Walks what modules hold: their names, classes, functions, partials and containers, each object once."""

    def __init__(self, table: dict[int, Swap], journal: Journal, ours: Container[int], also: Container[str]) -> None:
        self.table, self.journal, self.ours, self.also = table, journal, ours, also
        self.module = ""  # the one that is walked now
        self.seen: set[int] = set()
        self.stuck: list[Stuck] = []

    def in_scope(self, module: Any) -> bool:
        return in_scope(str(module)) or module in self.also

    def new_for(self, value: Any, name: str, depth: int) -> Any:
        """The replacement of `value` found under a name; for a tuple or frozenset one with its members replaced."""
        swap = self.table.get(id(value))
        if swap is not None:
            return swap.new if swap.alias in ("", name) else _KEEP
        if type(value) in (tuple, frozenset) and 0 < len(value) <= _MAX_MEMBERS and depth < _MAX_DEPTH:
            found = [self.new_for(item, "", depth + 1) for item in value]
            if any(new is not _KEEP for new in found):
                return type(value)(old if new is _KEEP else new for old, new in zip(value, found, strict=True))
        return _KEEP

    def visit(self, value: Any, name: str, depth: int, place: Callable[..., Slot], *where: Any) -> None:
        """Replace one value in its place, which is `place(*where)`, or look into it."""
        new = self.new_for(value, name, depth)
        if new is _KEEP:
            self.look(value, depth)
        else:
            self.journal.write(place(*where), value, new)

    def look(self, value: Any, depth: int) -> None:
        """Look into a value that stays, once."""
        if self.is_open(value) and id(value) not in self.ours and depth < _MAX_DEPTH:
            self.seen.add(id(value))
            self.inside(value, depth + 1)

    def is_open(self, value: Any) -> bool:
        """Whether there is something to look into. For nearly every value in a process there is not."""
        kind = type(value)
        if kind is types.FunctionType:
            is_open = (value.__closure__ or value.__defaults__ or value.__kwdefaults__) is not None
        else:
            is_open = issubclass(kind, _WALKED_INTO)
        return is_open and id(value) not in self.seen

    def inside(self, value: Any, depth: int) -> None:
        """Look into one value. Its type is asked, never its __class__: lazy objects answer that by waking up."""
        kind = type(value)
        if kind is types.FunctionType:
            self.function(value, depth)
        elif kind is _CACHED:
            self.cached(value.__wrapped__, depth)
        elif issubclass(kind, type):
            self.class_body(value, depth)
        elif issubclass(kind, dict):
            self.mapping(value, depth)
        elif kind is functools.partial:
            self.partial(value, depth)
        elif kind is functools.partialmethod:
            self.mapping(vars(value), depth)
        elif kind is Field:
            self.visit(value.default, "", depth, _field, value, "default")
            self.visit(value.default_factory, "", depth, _field, value, "default_factory")
        elif kind in (list, set, deque, tuple):
            self.items(value, depth)

    def mapping(self, box: dict[Any, Any], depth: int) -> None:
        if depth and dict.__len__(box) > _MAX_MEMBERS:  # a module's own names (depth 0) are always looked at
            return
        names = []
        for name, value in entries(box):
            if id(value) in self.table or self.is_open(value):
                self.visit(value, name if type(name) is str else "", depth, key, box, name)
            if type(name) is not str and id(name) in self.table:
                names.append(name)
        for name in names:  # after the values, which are put back under the old names
            if type(box) in (dict, defaultdict, OrderedDict):
                self.visit(name, "", depth, key_itself, box, name)
            else:
                self.keep(name, f"{self.module} has it as a key of a {type(box).__qualname__}")

    def keep(self, original: Any, where: str) -> None:
        """Note a copy that cannot be replaced."""
        if not self.table[id(original)].alias:
            self.stuck.append(Stuck(self.table[id(original)].row, where))

    def items(self, box: Any, depth: int) -> None:
        for value in list(box) if len(box) <= _MAX_MEMBERS else ():
            # A tuple that holds an original has been replaced as a whole by whoever looked at it.
            if id(value) in self.table or self.is_open(value):
                self.visit(value, "", depth, member, box, value)

    def class_body(self, owner: type, depth: int) -> None:
        names = _class_names(owner)
        if not self.in_scope(names.get("__module__")):
            return
        for name, value in names.copy().items():
            kind = type(value)
            held = value.__func__ if kind in (staticmethod, classmethod) else value
            if id(held) not in self.table and not self.is_open(held):
                continue
            if held is value:
                self.visit(value, name, depth, attribute, owner, name)
            elif (new := self.new_for(held, name, depth)) is _KEEP:
                self.look(held, depth)
            else:
                self.journal.write(attribute(owner, name), value, kind(new))

    def function(self, function: types.FunctionType, depth: int) -> None:
        if not self.in_scope(function.__globals__.get("__name__")):
            for _, value in _cells(function):  # it may be a decorator's: through it to the decorated, not into it
                if type(value) is types.FunctionType and id(value) not in self.table:
                    self.look(value, depth)
            return
        if function.__defaults__:
            self.visit(function.__defaults__, "", depth, _field, function, "__defaults__")
        if function.__kwdefaults__:
            self.mapping(function.__kwdefaults__, depth)
        for cell, value in _cells(function):
            self.visit(value, "", depth, _field, cell, "cell_contents")

    def cached(self, function: Any, depth: int) -> None:
        if id(function) in self.table:
            self.stuck.append(
                Stuck(self.table[id(function)].row, f"{self.module} has it wrapped by functools.lru_cache")
            )
        else:
            self.look(function, depth)

    def partial(self, call: functools.partial[Any], depth: int) -> None:
        self.mapping(call.keywords, depth)
        self.visit(call.func, "", depth, _part, call, 0)
        self.visit(call.args, "", depth, _part, call, 1)


def entries(box: dict[Any, Any]) -> Iterable[tuple[Any, Any]]:
    """The keys and values of a dict at one moment, past what a subclass makes of looking them up.

    A plain dict, as modules have, is copied in one step: list(d.items()) makes tuples, which may start the garbage
    collector and let another thread in, whose import changes the dict.
    """
    return box.copy().items() if type(box) is dict else list(dict.items(box))


def _cells(function: types.FunctionType) -> Iterator[tuple[types.CellType, Any]]:
    """The variables that a function closes over, with their values."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name != "__class__":  # what super() looks at is the class that stands there in the source
            try:
                yield cell, cell.cell_contents
            except ValueError:  # not bound yet
                continue


def _field(owner: Any, name: str) -> Slot:
    return Slot(functools.partial(getattr, owner, name), functools.partial(setattr, owner, name))


def _part(call: functools.partial[Any], position: int) -> Slot:
    """The function (0) or the positional arguments (1) of a partial object, which keeps its identity."""

    def put(value: Any) -> None:
        state = [call.func, call.args, call.keywords, vars(call)]
        state[position] = value
        call.__setstate__(tuple(state))  # type: ignore[attr-defined]

    return Slot(lambda: (call.func, call.args)[position], put)
