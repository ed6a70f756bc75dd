"""Holders: who keeps a replaced object where rebinding cannot reach: instances, bases, cells of local functions.

The garbage collector knows every reference. It is asked only about originals that a framework had handed out
before the patch, in one pass: a pass over all objects takes tens of milliseconds.
"""

from __future__ import annotations

import functools
import gc
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

from llm_adapt.patching.journal import Act
from llm_adapt.patching.places import Place, namespace
from llm_adapt.patching.rebinding import Stuck, Swap, has_identity, in_scope
from llm_adapt.patching.writes import Write

__all__ = ["holders"]

_MOST = 8  # holders told; each may cost another pass, to find out whose it is
_DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType, types.WrapperDescriptorType)
# Ours, or parts of the original itself: its descriptors, and the wrapper object that its place held.
_PASSED_OVER = (Act, Place, Swap, Stuck, Write, types.FrameType, staticmethod, classmethod, *_DESCRIPTORS)


def holders(swaps: Iterable[Swap], own: Iterable[Any]) -> list[Stuck]:
    """The holders left after rebinding of every original that is told by identity and belongs to a framework.

    Args:
        own: what rightly holds originals: their replacements, and what is kept to undo the patch.
    """
    asked = {id(swap.original): swap for swap in swaps if _is_asked(swap)}
    if not asked:
        return []
    spaces = {id(namespace(m)) for m in list(sys.modules.values()) if issubclass(type(m), types.ModuleType)}
    passed = spaces.union(*(_parts(thing) for thing in own))
    if _search(asked, set(passed)):
        gc.collect()  # rows of an earlier patch are garbage in a circle, and hold nothing any more
        return _search(asked, passed)
    return []


def _search(asked: dict[int, Swap], passed: set[int]) -> list[Stuck]:
    found: dict[Stuck, None] = {}
    for swap in asked.values():
        if isinstance(swap.original, type):
            passed.update(_parts(swap.original))
            found.update(dict.fromkeys(_derived(swap, passed)))
    for holder in gc.get_referrers(*[swap.original for swap in asked.values()]):
        if id(holder) in passed or issubclass(type(holder), _PASSED_OVER):
            continue
        for item in gc.get_referents(holder):
            if id(item) in asked and len(found) < _MOST:
                found[Stuck(asked[id(item)].row, _describe(holder, item))] = None
    return list(found)


def _is_asked(swap: Swap) -> bool:
    return has_identity(swap.original) and not swap.alias and in_scope(swap.row.module)


def _derived(swap: Swap, passed: set[int]) -> Iterator[Stuck]:
    """Classes derived from a replaced class; their bases are then passed over."""
    for child in type.__subclasses__(swap.original):
        if id(child) not in passed:
            passed.update((id(child), id(child.__bases__), id(child.__mro__)))
            yield Stuck(swap.row, f"{child.__module__}.{child.__qualname__} is derived from it")


def _parts(thing: Any, depth: int = 0) -> Iterator[int]:
    """Ids of the objects that a function, class or partial is made of, as far as they may hold an original."""
    yield id(thing)
    inner: list[Any] = []
    if isinstance(thing, types.FunctionType):
        cells = thing.__closure__ or ()
        yield from map(id, (thing.__dict__, thing.__defaults__, thing.__kwdefaults__, *cells))
        inner = [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        inner += [item for cell in cells for item in gc.get_referents(cell)]
    elif isinstance(thing, functools.partial):
        yield from map(id, (thing.args, thing.keywords, thing.__dict__))
        inner = [thing.func, *thing.args, *thing.keywords.values()]
    elif isinstance(thing, type):
        yield from map(id, (thing.__bases__, thing.__mro__, *gc.get_referents(vars(thing))))
        inner = [item for item in vars(thing).copy().values() if isinstance(item, types.FunctionType)]
    elif isinstance(thing, property):
        inner = [thing.fget, thing.fset, thing.fdel]
    elif isinstance(thing, (tuple, frozenset)):
        inner = list(thing)
    if depth < 3:
        for item in inner:
            if type(item) in (types.FunctionType, functools.partial, tuple, frozenset):
                yield from _parts(item, depth + 1)


def _describe(holder: Any, original: Any) -> str:
    """One line that says what holds the original, and whose it is where that can be found out."""
    kind = type(holder)
    if kind is original:
        return "instances of it were made before the patch"
    if kind is types.CellType:
        functions = (f for box in gc.get_referrers(holder) if type(box) is tuple for f in gc.get_referrers(box))
        names = [f"{f.__module__}.{f.__qualname__}" for f in functions if type(f) is types.FunctionType]
        return f"{names[0] if names else 'a function'} closes over it"
    if issubclass(kind, dict):
        name = next((repr(name) for name, value in dict.items(holder) if value is original), "a key")
        owner = next((user for user in gc.get_referrers(holder) if _names(user) is holder), None)
        if owner is not None:
            return f"{name} of an object of type {type(owner).__module__}.{type(owner).__qualname__} is it"
        return f"{name} of a dict is it"
    return f"an object of type {kind.__module__}.{kind.__qualname__} holds it"


def _names(thing: Any) -> Any:
    """The instance dict of an object, past what its class makes of attribute access."""
    try:
        return object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return None
