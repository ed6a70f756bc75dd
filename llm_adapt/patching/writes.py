"""Writes: a row and its place turned into one write: the replacement is made, dressed and checked here."""

from __future__ import annotations

import sys
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

from llm_adapt.errors import PatchError
from llm_adapt.patching.journal import ABSENT, Slot, attribute, key, member
from llm_adapt.patching.places import Place, like, plain
from llm_adapt.patching.rebinding import Swap, has_identity
from llm_adapt.patching.rows import Entry, Patch

__all__ = ["Write", "prepare"]


class Write(NamedTuple):
    """One row, ready to be written."""

    row: Patch | Entry
    place: Place
    slot: Slot
    old: Any
    new: Any  # as stored
    swap: Swap  # the same without staticmethod and the like, as others may hold a copy
    has_copies: bool = False  # copies of the original are to be replaced as well
    is_new: bool = False  # nobody has had the replacement before: a copy of it must come from the patch

    def stands(self, place: Place) -> bool:
        """Whether this write is in force where the row leads today: the module may have been imported anew."""
        is_same_box = not isinstance(self.row, Entry) or self.place.original is place.original
        return self.place.owner is place.owner and is_same_box and self.slot.read() is self.new


def prepare(row: Patch | Entry, place: Place) -> Write:
    """Make the replacement; writes nothing.

    Raises:
        PatchError: the replacement does not fit the place.
    """
    return _entry(row, place) if isinstance(row, Entry) else _patch(row, place)


def _patch(row: Patch, place: Place) -> Write:
    original = place.original
    if place.name == "__new__" and not place.is_own:
        raise PatchError(
            f"{row.target} was asked; {place.owner.__name__} inherits __new__, and Python cannot take a __new__ away "
            "again without breaking the class. Patch the class that defines it."
        )
    bare = plain(original)
    new = row.new(None if original is ABSENT else bare) if row.kind == "wrap" else row.new
    if isinstance(place.owner, type) and hasattr(type(original), "__set__") and isinstance(new, FunctionType):
        raise PatchError(f"{row.target} is a {type(original).__name__}; replace it by a property, not by a function.")
    is_new = has_identity(new) and not _is_at_home(new)
    _name_after(row, new)
    # What a class inherits belongs to its base, whose copies are none of this row's business.
    old = original if place.is_own else ABSENT
    alias = _alias(row, bare)
    has_copies = row.rebind and alias is not None and old is not ABSENT and has_identity(bare)
    swap = Swap(bare, plain(new), row, alias or "")
    return Write(row, place, attribute(place.owner, place.name), old, like(original, new), swap, has_copies, is_new)


def _alias(row: Patch, original: Any) -> str | None:
    """How copies of an original are recognised: "" = by identity alone, None = not at all.

    An original of another package (`jit_fuser = torch.compile`) has copies that do not come from the target. Only
    those under the target's name do, if that is not the original's own name.
    """
    if not isinstance(original, (FunctionType, BuiltinFunctionType, type)) or not original.__module__:
        return ""
    if original.__module__.partition(".")[0] == row.module.partition(".")[0]:
        return ""
    name = row.name.rpartition(".")[2]
    return None if name == original.__name__ else name


def _is_at_home(new: Any) -> bool:
    """Whether anybody can import it from another package, and may hold it for reasons of his own."""
    module = getattr(new, "__module__", None)
    if not isinstance(module, str) or module.partition(".")[0] == "llm_adapt":
        return False
    found: Any = sys.modules.get(module)
    for part in getattr(new, "__qualname__", "").split("."):
        found = getattr(found, "__dict__", {}).get(part)
        found = found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
    return found is new


def _name_after(row: Patch, new: Any) -> None:
    """Give a local function the name of what it replaces: it is pickled, and shown, as that."""
    if isinstance(new, FunctionType) and "<" in new.__qualname__:
        new.__module__, new.__qualname__, new.__name__ = row.module, row.name, row.name.rpartition(".")[2]


def _entry(row: Entry, place: Place) -> Write:
    box = place.original
    if isinstance(box, dict) and row.key is not None:
        slot = key(box, row.key)
        return Write(row, place, slot, old := slot.read(), row.value, Swap(old, row.value, row))
    if isinstance(box, list) and row.key is None:
        slot = member(box, ABSENT, insert=lambda value: _insert(box, row))
        return Write(row, place, slot, ABSENT, row.value, Swap(ABSENT, row.value, row))
    raise PatchError(
        f"{row.target} was asked as a {'list' if row.key is None else 'dict'}; found {type(box).__name__}. "
        "Give a key for a dict, and none for a list."
    )


def _insert(box: list[Any], row: Entry) -> None:
    """Put the value where sorting would put it, and leave the others where they are."""
    order = row.sort_key
    after = None if order is None else [index for index, item in enumerate(box) if order(item) > order(row.value)]
    box.insert(after[0] if after else len(box), row.value)
