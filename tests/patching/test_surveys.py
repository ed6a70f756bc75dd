"""Surveys: families of modules, looked at once each, whatever the order of imports."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest

from llm_adapt.errors import PatchError
from llm_adapt.patching import Entry, Patch, Plan, Survey
from tests.patching.toys import ToyFinder, applied, load, louder, statuses, toys, wrap

MODEL = "class Norm:\n    def forward(self): return 'norm'\ndef rotate(x): return x\ntable = {}"
ZOO = {"zoo.a.model_a": MODEL, "zoo.b.model_b": MODEL, "zoo.b.other": MODEL, "zoo": "", "zoo.a": "", "zoo.b": ""}
PATTERN = "zoo.*.model_*"


def find(module: ModuleType) -> list[Patch | Entry]:
    """Its norm, its rotation and an entry of its table."""
    name = module.__name__
    return [
        Patch(f"{name}:Norm.forward", lambda self: "ours", "a norm", rebind=False),
        wrap(f"{name}:rotate"),
        Entry(f"{name}:table", 1, "an entry", key="ours"),
    ]


def survey(**changes: Any) -> Survey:
    """A survey of the models of the zoo."""
    return Survey(**{"modules": (PATTERN,), "find": find, "reason": "for the test"} | changes)


def state(module: Any) -> tuple[Any, ...]:
    """What a module's norm, rotation and table show."""
    return module.Norm().forward(), module.rotate(1), module.table


@pytest.mark.parametrize("is_first", [True, False], ids=["patch, import", "import, patch"])
def test_modules_of_the_family_are_patched_in_either_order(toy: ToyFinder, is_first: bool) -> None:
    """What the survey finds is written, whether the module was imported before or after; the others are left alone."""
    with toys(ZOO):
        early = None if is_first else load("zoo.a.model_a")
        plan = applied(survey())
        model, other = load("zoo.a.model_a"), load("zoo.b.other")
        assert early in (None, model)
        assert state(model) == ("ours", ("loud", 1), {"ours": 1})
        assert state(other) == ("norm", 1, {})
        assert plan.undo() == []
        assert state(model) == ("norm", 1, {})
        assert state(load("zoo.b.model_b")) == ("norm", 1, {})


def test_a_copy_taken_before_the_patch_is_replaced(toy: ToyFinder) -> None:
    """`from zoo.a.model_a import rotate`, done before, finds the replacement, and the original after undo."""
    with toys({**ZOO, "user": "from zoo.a.model_a import rotate"}):
        user = load("user")
        plan = applied(survey())
        assert user.rotate(1) == ("loud", 1)
        plan.undo()
        assert user.rotate(1) == 1


def test_rows_and_survey_stand_among_the_outcomes(toy: ToyFinder) -> None:
    """Each row that was found is a line of the report, and the survey says in how many modules it found how many."""
    with toys(ZOO):
        plan = applied(survey())
        assert statuses(plan) == [(PATTERN, "waiting")]
        load("zoo.a.model_a")
        load("zoo.b.model_b")
        *rows, (status, detail) = [(outcome.status, outcome.detail) for outcome in plan.outcomes()]
        assert rows == [("applied", "")] * 6
        assert (status, detail) == ("applied", "6 names recognised in 2 modules: for the test")
        plan.undo()


def test_a_module_is_looked_at_once(toy: ToyFinder) -> None:
    """A second import statement, a second plan.apply of other rows and a spec lookup ask nothing again."""
    looks: list[str] = []
    with toys(ZOO):
        load("zoo.b.model_b")
        plan = applied(survey(find=lambda module: looks.append(module.__name__) or []))
        importlib.import_module("zoo.b.model_b")
        importlib.util.find_spec("zoo.a.model_a")
        assert looks == ["zoo.b.model_b"]
        load("zoo.a.model_a")
        load("zoo.a.model_a")
        assert looks == ["zoo.b.model_b", "zoo.a.model_a"]
        plan.undo()


def test_a_module_that_is_imported_anew_is_looked_at_anew(toy: ToyFinder) -> None:
    """Its new classes are patched as well, and undo gives back the originals of both."""
    with toys(ZOO):
        plan = applied(survey())
        model = load("zoo.a.model_a")
        old = model.Norm
        importlib.reload(model)
        assert old is not model.Norm
        assert (old().forward(), *state(model)) == ("ours", "ours", ("loud", 1), {"ours": 1})
        assert plan.undo() == []
        assert (old().forward(), *state(model)) == ("norm", "norm", 1, {})


def test_an_error_while_looking_leaves_the_module_alone(toy: ToyFinder, caplog: pytest.LogCaptureFixture) -> None:
    """The import goes on; the module, the error and its text are logged and stand among the outcomes."""

    def fail(module: ModuleType) -> list[Patch | Entry]:
        raise ValueError(f"cannot try {module.__name__}")

    with toys(ZOO):
        plan = applied(survey(find=fail), survey())
        model = load("zoo.a.model_a")
        assert state(model) == ("ours", ("loud", 1), {"ours": 1})  # the other survey's rows
        text = "zoo.a.model_a was left alone: ValueError: cannot try zoo.a.model_a"
        assert text in caplog.text
        assert ("skipped", text) in [(outcome.status, outcome.detail) for outcome in plan.outcomes()]
        plan.undo()


@pytest.mark.parametrize("is_first", [True, False], ids=["patch, import", "import, patch"])
def test_strict_mode_makes_it_an_error(toy: ToyFinder, is_first: bool) -> None:
    """The import, or the patch, fails with the reason, and nothing stays patched."""

    def fail(module: ModuleType) -> list[Patch | Entry]:
        raise ValueError("cannot try")

    with toys(ZOO):
        if not is_first:
            load("zoo.a.model_a")
        plan = Plan([survey(find=fail), wrap("toy.ops:norm")], strict=True)
        with pytest.raises(PatchError, match=r"zoo.a.model_a was left alone: ValueError: cannot try \(strict mode\)"):
            plan.apply()
            load("zoo.a.model_a")
        plan.undo()
        assert load("toy.ops").norm(1) == ("norm", 1)


def test_two_rows_for_one_name_are_refused(toy: ToyFinder) -> None:
    """A name that another row claims already cannot be claimed by what a survey finds."""
    with toys(ZOO):
        plan = applied(survey(), wrap("zoo.a.model_a:rotate"))
        with pytest.raises(PatchError, match="Two rows claim zoo.a.model_a:rotate"):
            load("zoo.a.model_a")
        plan.undo()
        assert "zoo.a.model_a" not in sys.modules


def test_only_whole_names_match(toy: ToyFinder) -> None:
    """A pattern is of the whole name of a module: none of its parts is enough."""
    assert survey().covers("zoo.a.model_a")
    for name in ("zoo.model_a", "xzoo.a.model_a", "zoo.a.model", "zoo.a"):
        assert not survey().covers(name)
    assert survey().target == PATTERN
    assert louder(lambda: 1)() == ("loud", 1)


def test_a_copy_taken_inside_the_import_is_replaced(toy: ToyFinder) -> None:
    """A name that the module gave away while it was imported, to itself or to a module that it imports, is found."""
    sources = {
        "zoo.a.model_a": MODEL + "\nclass Layer: turn = rotate\nimport zoo.taker",
        "zoo.taker": "from zoo.a.model_a import rotate",
    }
    with toys(ZOO | sources):
        plan = applied(survey())
        model, taker = load("zoo.a.model_a"), load("zoo.taker")
        assert (taker.rotate(1), model.Layer.turn(1)) == (("loud", 1), ("loud", 1))
        plan.undo()
        assert (taker.rotate(1), model.Layer.turn(1)) == (1, 1)
