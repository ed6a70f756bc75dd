"""Journal: every write with its reverse, so that undo is exact, runs backwards, and takes nothing from others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

__all__ = ["ABSENT", "Act", "Journal", "Slot", "attribute", "key", "key_itself", "member"]

ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "absent"})()  # what a slot holds when it holds nothing


class Slot(NamedTuple):
    """Something that holds one value: how to read it, and how to put another value there (ABSENT = remove it)."""

    read: Callable[[], Any]
    put: Callable[[Any], None]


class Act(NamedTuple):
    """One write."""

    slot: Slot
    old: Any
    new: Any
    name: str


class Journal:
    """The writes of one patch, in order."""

    def __init__(self) -> None:
        self.acts: list[Act] = []

    def __len__(self) -> int:
        return len(self.acts)

    def write(self, slot: Slot, old: Any, new: Any, name: str = "") -> None:
        """Put `new` where `old` is; `name` is given where it must be told if somebody replaces `new` later."""
        self.acts.append(Act(slot, old, new, name))  # before the write: an interrupt between the two loses nothing
        slot.put(new)

    def forget(self, slot: Slot) -> None:
        """Drop the writes to a slot that something else has taken over with everybody's consent."""
        self.acts = [act for act in self.acts if act.slot is not slot]

    def reverse(self, down_to: int = 0) -> list[str]:
        """Undo the writes after the first `down_to`, the last one first, whatever goes wrong with one of them.

        A slot that no longer holds what was put there belongs to somebody else by now and is left alone.

        Returns:
            One line per named slot that could not be restored.
        """
        lines: list[str] = []
        while len(self.acts) > down_to:
            lines.extend(_restore(*self.acts.pop()))
        return lines


def _restore(slot: Slot, old: Any, new: Any, name: str) -> Iterator[str]:
    try:
        found = slot.read()
        if found is new:
            slot.put(old)
        elif found is not old and name:
            yield f"{name} was replaced by another after the patch ({found!r:.80}) and is left as it is"
    except Exception as error:  # noqa: BLE001 - told to the caller, and the other slots still want their turn
        yield f"{name or repr(old)} could not be put back: {type(error).__name__}: {error}"


def attribute(owner: Any, name: str) -> Slot:
    """What `owner` itself, a module or class, has under a name: stored descriptors, nothing inherited."""

    def read() -> Any:
        return vars(owner).get(name, ABSENT)

    def put(value: Any) -> None:
        if value is ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, value)

    return Slot(read, put)


def key(box: dict[Any, Any], name: Any) -> Slot:
    """One key of a dict, past what a subclass makes of reading and writing."""

    def read() -> Any:
        return dict.get(box, name, ABSENT)

    def put(value: Any) -> None:
        if value is ABSENT:
            dict.pop(box, name, None)
        else:
            dict.__setitem__(box, name, value)

    return Slot(read, put)


def key_itself(box: dict[Any, Any], name: Any) -> Slot:
    """The key under which a dict keeps a value, at its place in the order."""
    held = name

    def read() -> Any:
        return held if any(item is held for item in list(box)) else ABSENT

    def put(new: Any) -> None:
        nonlocal held
        items = [(new if item is held else item, value) for item, value in list(dict.items(box))]
        box.clear()
        box.update(items)
        held = new

    return Slot(read, put)


def member(box: Any, value: Any, insert: Callable[[Any], None] | None = None) -> Slot:
    """The place that a value has in a list, deque or set, found by identity: others come and go.

    Args:
        insert: puts the first value into a list that does not hold it yet (value = ABSENT).
    """
    held = value

    def read() -> Any:
        return held if any(item is held for item in box) else ABSENT

    def put(new: Any) -> None:
        nonlocal held
        if isinstance(box, set):
            box.discard(held)
            box.add(new)
        elif held is ABSENT and insert is not None:
            insert(new)
        else:
            index = next(index for index, item in enumerate(box) if item is held)
            if new is ABSENT:
                del box[index]
            else:
                box[index] = new
        held = new

    return Slot(read, put)
