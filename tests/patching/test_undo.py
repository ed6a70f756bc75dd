"""Undo: what comes back, what is left alone, and modules that come more than once."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest

from llm_adapt.patching import Entry, Patch
from tests.patching.toys import ToyFinder, applied, load, statuses, toys, wrap


def test_a_later_patch_of_somebody_else_is_left_alone_and_told(
    toy: ToyFinder, caplog: pytest.LogCaptureFixture
) -> None:
    """Undo takes back what the plan wrote, not what the user has put over it; what that used is the original."""
    ops = load("toy.ops")
    plan = applied(wrap("toy.ops:norm"), wrap("toy.ops:scale"))
    ours, ops.norm = ops.norm, lambda x: ("user", ours(x))
    (line,) = plan.undo()
    assert line.startswith("toy.ops:norm was replaced by another after the patch")
    assert line in caplog.text
    assert (ops.norm(1), ops.scale(1)) == (("user", ("norm", 1)), ("scale", 1))


def test_a_replacement_that_somebody_still_has_is_no_copy_of_the_original(toy: ToyFinder) -> None:
    """Compiled code keeps what it was compiled with: after undo, the next plan does not take that for a stale copy."""
    ops = load("toy.ops")
    first = applied(wrap("toy.ops:norm"))
    kept = [lambda: ops.norm, ops.norm]
    first.undo()
    second = applied(wrap("toy.ops:norm"))
    assert statuses(second) == [("toy.ops:norm", "applied")]
    assert kept[1](1) == ("loud", ("norm", 1))
    assert second.undo() == []


def test_undo_twice_is_undo_once(toy: ToyFinder) -> None:
    """A second undo does nothing; a plan that was undone ignores imports."""
    plan = applied(wrap("toy.ops:norm"))
    plan.undo()
    assert plan.undo() == []
    assert load("toy.ops").norm(1) == ("norm", 1)


def test_copies_taken_while_patched_are_put_back(toy: ToyFinder) -> None:
    """`from module import name` after the patch holds a replacement, and the original after undo."""
    plan = applied(wrap("toy.ops:norm"), wrap("toy.ops:Layer.kernel"))
    with toys({"user": "from toy.ops import norm, Layer\nclass Mine: impl = norm\ntable = {'k': Layer.kernel}"}):
        user, ops = load("user"), load("toy.ops")
        assert user.norm is ops.norm
        assert user.norm(1) == ("loud", ("norm", 1))
        plan.undo()
        assert (user.norm, user.Mine.impl, user.table["k"]) == (ops.norm, ops.norm, ops.Layer.kernel)
        assert user.norm(1) == ("norm", 1)


def test_a_replacement_that_is_everybodys_is_not_taken_for_a_copy(toy: ToyFinder) -> None:
    """A user's own reference to a public function survives, though that function stood in for another."""
    with toys({"public": "def f(x): return x", "user": "from public import f"}):
        f, user, ops = load("public").f, load("user"), load("toy.ops")
        plan = applied(Patch("toy.ops:norm", f, "why"))
        assert ops.norm is f
        plan.undo()
        assert (ops.norm is f, user.f is f) == (False, True)


@pytest.mark.parametrize("kind", ["staticmethod", "classmethod"])
def test_a_replacement_that_is_a_method_of_a_class_stays_there(toy: ToyFinder, kind: str) -> None:
    """A vendor's namespace that is a class (torch.npu.mstx) keeps its functions at undo."""
    with toys({"vendor": f"class Ranges:\n    @{kind}\n    def start(*args): return args"}):
        ranges, ops = load("vendor").Ranges, load("toy.ops")
        method = vars(ranges)["start"]
        plan = applied(Patch("toy.ops:norm", method.__func__, "why"))
        assert ops.norm is method.__func__
        plan.undo()
        assert vars(ranges)["start"] is method


def test_one_replacement_for_two_originals_does_not_mix_them_up(toy: ToyFinder) -> None:
    """Each target gets its own original back."""
    ops = load("toy.ops")
    norm, scale, nothing = ops.norm, ops.scale, lambda x: None
    plan = applied(Patch("toy.ops:norm", nothing, "why"), Patch("toy.ops:scale", nothing, "why"))
    plan.undo()
    assert (ops.norm, ops.scale) == (norm, scale)


def test_one_replacement_for_targets_that_come_at_different_times(toy: ToyFinder) -> None:
    """A copy of a replacement that stands for two originals is left alone, not given the wrong one."""
    nothing = lambda x: None  # noqa: E731
    with toys({"kit": "def late(x): return ('late', x)", "user": "from kit import late"}):
        load("toy.ops")
        plan = applied(Patch("toy.ops:norm", nothing, "why"), Patch("kit:late", nothing, "why"))
        user = load("user")
        plan.undo()
        assert (user.late is nothing, load("kit").late(1)) == (True, ("late", 1))


def test_our_own_modules_keep_what_they_define(toy: ToyFinder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of llm_adapt that is imported while patched, and holds a replacement, is not searched for copies."""
    ops, mine = load("toy.ops"), ModuleType("llm_adapt.toy_extra")
    mine.norm = lambda x: "mine"  # type: ignore[attr-defined]
    plan = applied(Patch("toy.ops:norm", mine.norm, "why"))
    monkeypatch.setitem(sys.modules, mine.__name__, mine)
    plan.undo()
    assert (mine.norm(1), ops.norm(1)) == ("mine", ("norm", 1))


# -- modules that come more than once ----------------------------------------------------------------------


def test_a_reloaded_module_is_patched_anew_and_restored_to_its_new_self(toy: ToyFinder) -> None:
    """After importlib.reload the new function is wrapped, once, and undo brings that one back, without a word."""
    ops = load("toy.ops")
    plan = applied(wrap("toy.ops:norm"), Entry("toy.ops:table", 2, "why", key="a"))
    importlib.reload(ops)
    assert (ops.norm(1), ops.table) == (("loud", ("norm", 1)), {"a": 2})
    assert plan.undo() == []
    assert (ops.norm(1), ops.table) == (("norm", 1), {"a": 1})


def test_a_module_that_is_imported_again_is_patched_again(toy: ToyFinder) -> None:
    """A module that was dropped from sys.modules gets its rows as a new one; both are restored."""
    first, plan = load("toy.ops"), applied(wrap("toy.ops:norm"))
    del sys.modules["toy.ops"]
    second = load("toy.ops")
    assert first is not second
    assert (first.norm(1), second.norm(1)) == (("loud", ("norm", 1)),) * 2
    plan.undo()
    assert (first.norm(1), second.norm(1)) == (("norm", 1),) * 2


@pytest.mark.parametrize("early", [True, False])
def test_a_row_on_a_copy_wraps_the_original_once(toy: ToyFinder, early: bool) -> None:
    """A target that its module copies from another target is wrapped once, whichever was there first."""
    if early:
        load("toy.late")
    plan = applied(wrap("toy.ops:norm"), wrap("toy.late:norm"))
    late, ops = load("toy.late"), load("toy.ops")
    assert (late.norm(1), ops.norm(1)) == (("loud", ("norm", 1)),) * 2
    plan.undo()
    assert (late.norm is ops.norm, late.norm(1)) == (True, ("norm", 1))
