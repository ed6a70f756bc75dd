"""Plan: resolve, refuse, write, undo."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from llm_adapt.errors import PatchError
from llm_adapt.patching import Entry, Patch, Plan
from tests.patching.toys import ToyFinder, applied, load, louder, statuses, toys, wrap

# -- kinds of rows -----------------------------------------------------------------------------------------


def test_replace_wrap_and_add(toy: ToyFinder) -> None:
    """A row replaces its target, wraps it, or adds it; undo brings back each object and removes the added."""
    ops = load("toy.ops")
    before = dict(vars(ops))
    replaced = lambda x: "mine"  # noqa: E731
    added = Patch("toy.ops:extra", 7, "why", "add")
    plan = applied(Patch("toy.ops:norm", replaced, "why"), wrap("toy.ops:scale"), added)
    assert (ops.norm(1), ops.scale(1), ops.extra) == ("mine", ("loud", ("scale", 1)), 7)
    assert plan.undo() == []
    assert vars(ops) == before


def test_rows_of_a_module_that_is_imported_later_wait_for_it(toy: ToyFinder) -> None:
    """Patching before the import gives what patching after it gives, and nothing is imported for it."""
    plan = applied(wrap("toy.ops:norm"))
    assert (statuses(plan), toy.executed) == ([("toy.ops:norm", "waiting")], [])
    assert load("toy.late").use() == ("loud", ("norm", 1))
    assert statuses(plan) == [("toy.ops:norm", "applied")]
    plan.undo()
    assert load("toy.late").use() == ("norm", 1)


def test_an_entry_sets_a_key_or_takes_its_place_in_a_list(toy: ToyFinder) -> None:
    """Entries of dicts and lists are set and taken back; what others added since stays."""
    ops = load("toy.ops")
    rows = [
        Entry("toy.ops:table", 2, "why", key="a"),
        Entry("toy.ops:table", 3, "why", key="b"),
        Entry("toy.ops:order", 20, "why", sort_key=lambda item: item),
        Entry("toy.ops:order", 5, "why"),
    ]
    plan = applied(*rows)
    assert (ops.table, ops.order) == ({"a": 2, "b": 3}, [10, 20, 30, 5])
    ops.table["c"], ops.order[:] = 4, [1, *ops.order]
    plan.undo()
    assert (ops.table, ops.order) == ({"a": 1, "c": 4}, [1, 10, 30])


@pytest.mark.parametrize(("target", "key"), [("toy.ops:table", None), ("toy.ops:order", "a"), ("toy.ops:norm", "a")])
def test_an_entry_of_something_else_is_refused(toy: ToyFinder, target: str, key: Any) -> None:
    """A dict without a key, a list with one, and anything else are errors that say what was found."""
    load("toy.ops")
    with pytest.raises(PatchError, match=r"was asked as a (dict|list); found (dict|list|function)"):
        applied(Entry(target, 1, "why", key=key))


# -- descriptors -------------------------------------------------------------------------------------------


def test_methods_static_methods_and_class_methods_stay_what_they_are(toy: ToyFinder) -> None:
    """Each kind of method is called as before, and the very descriptor comes back."""
    layer = load("toy.ops").Layer
    before = dict(vars(layer))
    plan = applied(*(wrap(f"toy.ops:Layer.{name}") for name in ("forward", "kernel", "build")))
    assert layer().forward() == ("loud", ("forward", 4))
    assert (layer.kernel(1), layer().kernel(1)) == (("loud", ("kernel", 1)),) * 2
    assert (layer.build(), layer().build()) == (("loud", "Layer"),) * 2
    plan.undo()
    assert vars(layer) == before


def test_a_property_is_replaced_by_a_property(toy: ToyFinder) -> None:
    """A property can be wrapped as one; a plain function in its place is refused before anything is written."""
    layer = load("toy.ops").Layer
    original = vars(layer)["width"]
    plan = applied(wrap("toy.ops:Layer.width", lambda old: property(lambda self: old.fget(self) + 1)))
    assert layer().width == 11
    plan.undo()
    assert vars(layer)["width"] is original
    with pytest.raises(PatchError, match=r"toy.ops:Layer.width is a property; replace it by a property"):
        applied(wrap("toy.ops:scale"), Patch("toy.ops:Layer.width", lambda self: 11, "why"))
    assert load("toy.ops").scale(1) == ("scale", 1)


def test_an_inherited_method_is_patched_on_the_class_alone(toy: ToyFinder) -> None:
    """The base class and its other heirs keep theirs; undo leaves the class inheriting again."""
    ops = load("toy.ops")
    base = dict(vars(ops.Layer))
    plan = applied(wrap("toy.ops:Deep.forward"))
    assert (ops.Deep().forward(), ops.Layer().forward()) == (("loud", ("forward", 4)), ("forward", 4))
    assert vars(ops.Layer) == base
    plan.undo()
    assert "forward" not in vars(ops.Deep)


def test_an_inherited_new_is_refused(toy: ToyFinder) -> None:
    """Python cannot take a __new__ away from a class again, so a row may not put one there."""
    load("toy.ops")
    with pytest.raises(PatchError, match="inherits __new__"):
        applied(Patch("toy.ops:Layer.__new__", lambda cls: None, "why"))


# -- refusals, all before the first write ------------------------------------------------------------------


def test_a_misspelt_target_names_target_version_and_nearest_names(toy: ToyFinder) -> None:
    """The error says what was asked, what is there, in which version, and what was probably meant."""
    ops = load("toy.ops")
    before = dict(vars(ops))
    with pytest.raises(PatchError) as error:
        applied(wrap("toy.ops:scale"), wrap("toy.ops:nrom", versions="toy 1 to 2"))
    assert str(error.value) == (
        "toy.ops:nrom does not exist: toy.ops (toy 3.1) has no 'nrom'; nearest names: norm (written for toy 1 to 2). "
        "Correct the target, or use a version that has it."
    )
    assert vars(ops) == before


def test_a_misspelt_class_is_named_and_not_its_attribute(toy: ToyFinder) -> None:
    """What is missing on the way to the last name is what the error is about."""
    load("toy.ops")
    with pytest.raises(PatchError, match=r"toy.ops \(toy 3.1\) has no 'Laier'; nearest names: Layer"):
        applied(wrap("toy.ops:Laier.forward"))


def test_a_name_that_a_module_makes_on_demand_is_not_woken() -> None:
    """A module's __getattr__ is never called; the error says that the module makes names."""
    with toys({"lazy": "def __getattr__(name): raise RuntimeError('woken')"}):
        load("lazy")
        with pytest.raises(PatchError, match="the module makes names when they are asked for"):
            applied(wrap("lazy:anything"))


@pytest.mark.parametrize("kind", ["wrap", "replace", "add"])
@pytest.mark.parametrize("target", ["toy.ops:Laier.forward", "toy.ops:nrom"])
def test_an_optional_row_without_its_target_is_a_reported_skip(
    toy: ToyFinder, kind: Any, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is skipped with the same words as the error has, logged as a warning, and nothing is invented."""
    ops = load("toy.ops")
    before = dict(vars(ops))
    row = Patch(target, louder, "why", kind=kind, optional=True)
    plan = applied(row)
    if kind == "add" and target.endswith("nrom"):
        assert ops.nrom is louder
    else:
        assert plan.outcomes()[0].status == "skipped"
        assert "has no" in plan.outcomes()[0].detail
        assert "has no" in caplog.text
        assert vars(ops) == before
    plan.undo()
    assert vars(ops) == before


def test_strict_makes_a_skip_an_error(toy: ToyFinder) -> None:
    """With strict=True an optional row that does not resolve raises, and nothing stays written."""
    load("toy.ops")
    with pytest.raises(PatchError, match="strict mode"):
        applied(wrap("toy.ops:scale"), wrap("toy.ops:nrom", optional=True), strict=True)
    assert load("toy.ops").scale(1) == ("scale", 1)


def test_only_attributes_of_modules_and_classes_can_be_patched(toy: ToyFinder) -> None:
    """A target inside an instance is refused, since a method set there would not be bound."""
    load("toy.ops")
    with pytest.raises(PatchError, match="table is a dict, and only attributes of modules and classes"):
        applied(wrap("toy.ops:table.get"))


def test_a_class_that_takes_no_attributes_is_refused_with_its_target() -> None:
    """Python's own TypeError becomes an error that names the target; earlier writes are taken back."""
    with toys({"toy": "from builtins import dict as Box\ndef f(): return 1"}):
        toy = load("toy")
        with pytest.raises(PatchError, match=r"toy:Box.get was asked; it cannot be set"):
            applied(wrap("toy:f"), wrap("toy:Box.get"))
        assert toy.f() == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (wrap("toy.ops:norm"), wrap("toy.ops:norm")),
        (wrap("toy.ops:Layer"), wrap("toy.ops:Layer.forward")),
        (Entry("toy.ops:table", 1, "why", key="a"), Entry("toy.ops:table", 2, "why", key="a")),
        (wrap("toy.ops:table"), Entry("toy.ops:table", 1, "why", key="a")),
    ],
)
def test_two_claims_on_one_target_are_refused(toy: ToyFinder, first: Any, second: Any) -> None:
    """The same target, a part of a target, and an entry of a replaced dict are refused when the plan is made."""
    for rows in ([first, second], [second, first]):
        with pytest.raises(PatchError, match=r"Two rows claim toy\.ops:\w+.*Remove one of them"):
            Plan(rows)


def test_one_place_under_two_targets_is_refused_before_any_write(toy: ToyFinder) -> None:
    """A class that two modules share is one place, whether both are imported now or one comes later."""
    with toys({"alias": "from toy.ops import Layer, scale"}):
        ops = load("toy.ops")
        before = dict(vars(ops.Layer))
        rows = [wrap("toy.ops:Layer.forward"), wrap("alias:Layer.forward")]
        plan = applied(*rows)
        with pytest.raises(PatchError, match=r"Two rows claim toy\.ops:Layer\.forward and alias:Layer\.forward"):
            load("alias")
        plan.undo()
        load("alias")
        with pytest.raises(PatchError, match="one place"):
            applied(*rows)
        assert vars(ops.Layer) == before


# -- exceptions in the middle ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("factory"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_nothing_behind(toy: ToyFinder, error: BaseException) -> None:
    """When a replacement cannot be made, everything is as before, and the error comes through."""
    ops, before = load("toy.ops"), dict(vars(load("toy.ops")))

    def fail(original: Any) -> Any:
        raise error

    with pytest.raises(type(error)):
        applied(wrap("toy.ops:norm"), Entry("toy.ops:table", 2, "why", key="a"), wrap("toy.ops:scale", fail))
    assert (vars(ops), ops.table) == (before, {"a": 1})


def test_a_failure_at_an_import_fails_that_import_and_nothing_else(toy: ToyFinder) -> None:
    """The rows of the module are taken back, the import raises, and the rest of the patch stands."""
    with toys({"other": "from toy.ops import Layer, table\ndef gone(): pass"}):
        plan = applied(wrap("toy.ops:norm"), Entry("other:table", 2, "why", key="a"), wrap("other:missing"))
        with pytest.raises(PatchError, match="other:missing does not exist"):
            load("other")
        ops = load("toy.ops")
        assert (ops.norm(1), ops.table) == (("loud", ("norm", 1)), {"a": 1})
        plan.undo()
        assert ops.norm(1) == ("norm", 1)


# -- what is reported --------------------------------------------------------------------------------------


def test_a_module_that_the_version_does_not_have_is_told(toy: ToyFinder) -> None:
    """A row whose module cannot come any more is reported as skipped, not as waiting."""
    load("toy.ops")
    plan = applied(wrap("toy.gone.deep:f"), wrap("toy.late:use"), wrap("toy.ops.inner:f"), wrap("elsewhere.x:f"))
    assert statuses(plan) == [
        ("toy.gone.deep:f", "skipped"),
        ("toy.late:use", "waiting"),
        ("toy.ops.inner:f", "skipped"),
        ("elsewhere.x:f", "waiting"),
    ]
    assert "does not exist in the installed version" in plan.outcomes()[0].detail
    plan.undo()


def test_outcomes_stay_readable_after_undo(toy: ToyFinder, caplog: pytest.LogCaptureFixture) -> None:
    """What became of each row can still be read when the patch is gone; applying logs nothing aloud."""
    caplog.set_level(logging.INFO)
    load("toy.ops")
    plan = applied(wrap("toy.ops:norm"))
    plan.undo()
    assert (statuses(plan), caplog.text) == ([("toy.ops:norm", "applied")], "")


def test_garbage_of_an_earlier_patch_holds_nothing(toy: ToyFinder) -> None:
    """Rows in a circle that nobody reaches any more are no stale copies, even before the collector comes by."""

    def leave_a_circle(norm: Any) -> None:
        circle: list[Any] = [lambda: norm]
        circle.append(circle)

    leave_a_circle(load("toy.ops").norm)
    plan = applied(wrap("toy.ops:norm"))
    assert statuses(plan) == [("toy.ops:norm", "applied")]
    plan.undo()
