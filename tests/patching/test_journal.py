"""Journal: writes and their reverses."""

from __future__ import annotations

from collections import OrderedDict, deque
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_adapt.patching.journal import ABSENT, Journal, Slot, attribute, key, key_itself, member

OLD, NEW, OTHER = (SimpleNamespace(name=name) for name in ("old", "new", "other"))


def test_reverse_puts_the_same_object_back() -> None:
    """What was there before comes back as the same object, under the same name."""
    module, journal = ModuleType("toy"), Journal()
    module.thing = OLD  # type: ignore[attr-defined]
    journal.write(attribute(module, "thing"), OLD, NEW)
    assert module.thing is NEW
    assert journal.reverse() == []
    assert module.thing is OLD


def test_what_was_absent_is_absent_again() -> None:
    """A name, a key and a list item that a write created are gone after it is reversed."""
    module, box, items, journal = ModuleType("toy"), {"a": 1}, [OTHER], Journal()
    before = set(vars(module))
    journal.write(attribute(module, "thing"), ABSENT, NEW)
    journal.write(key(box, "b"), ABSENT, NEW)
    journal.write(member(items, ABSENT, insert=items.append), ABSENT, NEW)
    assert (module.thing, box["b"], items) == (NEW, NEW, [OTHER, NEW])
    journal.reverse()
    assert (set(vars(module)), box, items) == (before, {"a": 1}, [OTHER])


def test_writes_are_reversed_backwards() -> None:
    """Two writes to one slot end with what was there before the first."""
    box, journal = {"a": OLD}, Journal()
    journal.write(key(box, "a"), OLD, NEW)
    journal.write(key(box, "a"), NEW, OTHER)
    journal.reverse()
    assert box == {"a": OLD}


def test_reverse_stops_where_it_is_told() -> None:
    """`down_to` keeps the writes before it: that is how a failed batch is taken back alone."""
    box, journal = {"a": OLD, "b": OLD}, Journal()
    journal.write(key(box, "a"), OLD, NEW)
    mark = len(journal)
    journal.write(key(box, "b"), OLD, NEW)
    journal.reverse(down_to=mark)
    assert (box, len(journal)) == ({"a": NEW, "b": OLD}, 1)


def test_what_another_put_there_since_is_left_alone_and_told() -> None:
    """A named slot that no longer holds what was written belongs to somebody else, and a line says so."""
    box, journal = {"a": OLD, "b": OLD}, Journal()
    journal.write(key(box, "a"), OLD, NEW, name="toy:a")
    journal.write(key(box, "b"), OLD, NEW)  # without a name: a copy, whose owner may do with it what he likes
    box["a"] = box["b"] = OTHER
    lines = journal.reverse()
    assert box == {"a": OTHER, "b": OTHER}
    assert lines == ["toy:a was replaced by another after the patch (namespace(name='other')) and is left as it is"]


def test_a_slot_that_was_put_back_by_hand_needs_nothing() -> None:
    """A slot that holds the old value again is not worth a line."""
    box, journal = {"a": OLD}, Journal()
    journal.write(key(box, "a"), OLD, NEW, name="toy:a")
    box["a"] = OLD
    assert journal.reverse() == []


def test_one_slot_that_fails_does_not_keep_the_others() -> None:
    """A slot that raises is told, and every other slot is restored all the same."""
    box, journal = {"a": OLD, "b": OLD}, Journal()
    state = [OLD]

    def put(value: Any) -> None:
        if value is OLD:
            raise RuntimeError("no")
        state[0] = value

    journal.write(key(box, "a"), OLD, NEW)
    journal.write(Slot(lambda: state[0], put), OLD, NEW, name="toy:stubborn")
    journal.write(key(box, "b"), OLD, NEW)
    assert journal.reverse() == ["toy:stubborn could not be put back: RuntimeError: no"]
    assert box == {"a": OLD, "b": OLD}


def test_a_write_that_was_interrupted_is_reversed_too() -> None:
    """An exception out of the write itself loses nothing: the write is known before it is done."""
    box, journal = {"a": OLD}, Journal()

    def put(value: Any) -> None:
        box["a"] = value
        if value is NEW:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        journal.write(Slot(lambda: box["a"], put), OLD, NEW)
    journal.reverse()
    assert box == {"a": OLD}


@pytest.mark.parametrize("make", [list, deque, set])
def test_members_are_found_by_identity_wherever_they_are_now(make: Any) -> None:
    """Items that others added or removed since stay added or removed; only the exchanged one is exchanged back."""
    first, last, old, new, late = object(), object(), object(), object(), object()
    box, journal = make([first, old, last]), Journal()
    journal.write(member(box, old), old, new)
    assert (new in box, old in box) == (True, False)
    box.remove(first)
    (box.add if make is set else box.append)(late)
    journal.reverse()
    assert box == make([old, last, late])


def test_the_same_member_twice_is_exchanged_twice() -> None:
    """A list that holds an object at two places gets it back at both."""
    box, journal = [OLD, OTHER, OLD], Journal()
    for _ in range(2):
        journal.write(member(box, OLD), OLD, NEW)
    assert box == [NEW, OTHER, NEW]
    journal.reverse()
    assert box == [OLD, OTHER, OLD]


def test_keys_are_written_past_what_a_subclass_does() -> None:
    """A dict that does something on access does nothing here, and keeps its order."""

    class Loud(OrderedDict):  # type: ignore[type-arg]
        def __getitem__(self, name: str) -> Any:
            raise AssertionError("woken")

        __setitem__ = get = pop = __getitem__  # type: ignore[assignment]

    box, journal = Loud(), Journal()
    for name in "abc":
        dict.__setitem__(box, name, OLD)
    journal.write(key(box, "b"), OLD, NEW)
    assert [*dict.items(box)] == [("a", OLD), ("b", NEW), ("c", OLD)]
    journal.reverse()
    assert [*dict.items(box)] == [("a", OLD), ("b", OLD), ("c", OLD)]


@pytest.mark.parametrize("make", [dict, OrderedDict])
def test_a_key_is_exchanged_where_it_stands(make: Any) -> None:
    """A dict keyed by the object keeps its order and values, forth and back, also where others were added."""
    box, journal = make([(1, "a"), (test_a_key_is_exchanged_where_it_stands, "b"), (3, "c")]), Journal()
    journal.write(
        key_itself(box, test_a_key_is_exchanged_where_it_stands), test_a_key_is_exchanged_where_it_stands, int
    )
    assert [*box.items()] == [(1, "a"), (int, "b"), (3, "c")]
    box[4] = "d"
    journal.reverse()
    assert [*box.items()] == [(1, "a"), (test_a_key_is_exchanged_where_it_stands, "b"), (3, "c"), (4, "d")]


@given(st.lists(st.tuples(st.sampled_from(["module", "class", "dict", "list"]), st.sampled_from("abcd"))))
def test_any_sequence_of_writes_is_undone(writes: list[tuple[str, str]]) -> None:
    """Whatever is written where and how often, the end is the beginning, object by object and in order."""
    module, owner, box, items = ModuleType("toy"), type("Toy", (), {"a": 1, "b": 2}), {"a": 1, "c": 2}, [1.5, 2.5]
    vars(module).update(a=1, d=2)

    def state() -> list[Any]:
        boxes = (vars(module), vars(owner), box, dict(enumerate(items)))
        return [[(name, id(value)) for name, value in names.items()] for names in boxes]

    before, journal = state(), Journal()
    for kind, name in writes:
        slot = {
            "module": lambda name: attribute(module, name),
            "class": lambda name: attribute(owner, name),
            "dict": lambda name: key(box, name),
            "list": lambda name: member(items, ABSENT, insert=items.append),
        }[kind](name)
        journal.write(slot, slot.read(), object())
    journal.reverse()
    assert state() == before
