"""ImportHook: around every kind of import, and without a trace."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import pickle
import sys
import threading
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llm_adapt.errors import PatchError
from llm_adapt.patching import Plan
from llm_adapt.patching.import_hook import ImportHook, wait_for_import
from tests.patching.toys import ToyFinder, applied, load, restless, toys, wrap

LOUD = ("loud", ("norm", 1))
SOURCE = "def norm(x): return ('norm', x)\n"


# -- kinds of imports --------------------------------------------------------------------------------------


def test_a_submodule_of_a_namespace_package(on_disk: Path) -> None:
    """A package without __init__, as megatron is, has its modules patched like any other."""
    (on_disk / "spacious").mkdir()
    (on_disk / "spacious" / "core.py").write_text(SOURCE)
    plan = applied(wrap("spacious.core:norm"))
    assert load("spacious.core").norm(1) == LOUD
    plan.undo()


def test_a_module_in_a_zip_file(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """zipimport's loader is wrapped as well."""
    with zipfile.ZipFile(on_disk / "kit.zip", "w") as archive:
        archive.writestr("zipped.py", SOURCE)
    monkeypatch.syspath_prepend(on_disk / "kit.zip")
    plan = applied(wrap("zipped:norm"))
    assert load("zipped").norm(1) == LOUD
    plan.undo()
    assert load("zipped").norm(1) == ("norm", 1)


def test_a_module_that_puts_another_in_its_place() -> None:
    """A module that replaces itself in sys.modules while it is executed is patched as what it has become."""
    source = """
        import sys, types
        me = types.ModuleType(__name__)
        me.norm = lambda x: ('norm', x)
        sys.modules[__name__] = me
    """
    with toys({"chameleon": source}):
        plan = applied(wrap("chameleon:norm"))
        assert load("chameleon").norm(1) == LOUD
        plan.undo()


def test_circular_imports_that_copy_too_early() -> None:
    """A module that copies a name from a half-executed one is rebound when that one is complete."""
    sources = {"a": "def norm(x): return ('norm', x)\nimport b", "b": "from a import norm\nbox = [norm]"}
    with toys(sources):
        plan = applied(wrap("a:norm"))
        load("a")
        assert (load("b").norm(1), load("b").box[0](1)) == (LOUD, LOUD)
        plan.undo()
        assert (load("b").norm(1), load("b").box[0](1)) == (("norm", 1), ("norm", 1))


def test_a_module_that_fails_half_way_gets_nothing() -> None:
    """No row is written for an import that raises; a second, successful import gets them."""
    with toys({"shaky": SOURCE + "raise OSError('half-way')"}) as finder:
        plan = applied(wrap("shaky:norm"))
        with pytest.raises(OSError, match="half-way"):
            load("shaky")
        assert (len(plan._journal), plan.outcomes()[0].status) == (0, "waiting")
        finder.sources["shaky"] = SOURCE
        assert load("shaky").norm(1) == LOUD
        plan.undo()


def test_a_module_that_does_not_exist_stays_an_ordinary_error() -> None:
    """Watching a name does not change what its failing import says."""
    plan = applied(wrap("nowhere_to_be_found:f"))
    with pytest.raises(ModuleNotFoundError, match="No module named 'nowhere_to_be_found'"):
        load("nowhere_to_be_found")
    plan.undo()


# -- no trace ----------------------------------------------------------------------------------------------


def test_the_module_shows_its_own_loader() -> None:
    """__loader__ and __spec__.loader of a patched module are those of an unpatched one, also inside it."""
    with toys({"kit": SOURCE + "mine = (__loader__, __spec__.loader)"}) as finder:
        plan = applied(wrap("kit:norm"))
        kit = load("kit")
        assert (kit.__loader__, kit.__spec__.loader, kit.mine) == (finder, finder, (finder, finder))
        plan.undo()


def test_asking_for_a_spec_is_not_importing() -> None:
    """importlib.util.find_spec executes nothing, refuses nothing, and shows a loader that answers as the real one."""

    def refuse(name: str) -> None:
        raise PatchError(f"{name} refused")

    with toys({"rival": SOURCE}) as finder:
        finder.get_source = lambda name: finder.sources[name]  # type: ignore[attr-defined]
        plan = Plan([], before_import={"rival": refuse})
        plan.apply()
        spec = importlib.util.find_spec("rival")
        assert spec is not None
        assert spec.loader.get_source("rival") == SOURCE  # type: ignore[union-attr]
        assert finder.executed == []
        with pytest.raises(PatchError, match="rival refused"):
            load("rival")
        assert (finder.executed, "rival" in sys.modules) == ([], False)
        plan.undo()
        load("rival")


def test_a_private_copy_of_a_module_is_nobodys_business() -> None:
    """A second module made from the spec by hand is executed, and the imported one is not patched twice."""
    with toys({"kit": SOURCE}):
        plan = applied(wrap("kit:norm"))
        kit = load("kit")
        spec = importlib.util.spec_from_loader("kit", ToyFinder({"kit": SOURCE}))
        found = importlib.util.find_spec("kit")
        assert spec is not None
        assert found is not None
        sys.modules.pop("kit")
        hooked = importlib.util.find_spec("kit")
        sys.modules["kit"] = kit
        assert hooked is not None
        assert hooked.loader is not None
        copy = importlib.util.module_from_spec(hooked)
        hooked.loader.exec_module(copy)
        assert (kit.norm(1), copy.norm(1)) == (LOUD, ("norm", 1))
        plan.undo()


def test_finders_that_ask_for_each_other_end() -> None:
    """A finder that looks for a second watched module while it looks for the first, and back, ends."""

    asked: list[str] = []

    class Curious(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
            other = {"first_one": "second_one", "second_one": "first_one"}.get(fullname)
            asked.append(fullname)
            if other is not None:
                assert hook.find_spec(other) is None
            return None

    hook = ImportHook(["first_one", "second_one"], after=lambda name: None)
    hook.install()
    sys.meta_path.append(Curious)
    try:
        assert hook.find_spec("first_one") is None
    finally:
        sys.meta_path.remove(Curious)
        hook.remove()
        hook.remove()  # a second time: nothing
    assert asked == ["first_one", "second_one"]


def test_two_plans_work_side_by_side() -> None:
    """Two hooks in one process find through each other, and each restores its own part."""
    with toys({"kit": SOURCE + "def scale(x): return ('scale', x)"}):
        first, second = applied(wrap("kit:norm")), applied(wrap("kit:scale"))
        kit = load("kit")
        assert (kit.norm(1), kit.scale(1)) == (LOUD, ("loud", ("scale", 1)))
        first.undo()
        assert (kit.norm(1), kit.scale(1)) == (("norm", 1), ("loud", ("scale", 1)))
        second.undo()
        assert kit.scale(1) == ("scale", 1)


def test_a_replacement_is_pickled_as_what_it_replaces() -> None:
    """A local function gets the name of its target, so that a pickle of it opens with and without the patch."""
    with toys({"kit": SOURCE + "class Layer:\n def forward(self): return 1"}):
        kit = load("kit")
        plan = applied(wrap("kit:norm", lambda old: lambda x: ("other", x)), wrap("kit:Layer.forward"))
        text = pickle.dumps((kit.norm, kit.Layer.forward))
        assert pickle.loads(text) == (kit.norm, kit.Layer.forward)
        assert kit.norm.__qualname__ == "norm"
        plan.undo()
        assert pickle.loads(text) == (kit.norm, kit.Layer.forward)


# -- threads -----------------------------------------------------------------------------------------------


def test_patch_waits_for_an_import_in_another_thread() -> None:
    """A module that another thread is executing is patched when it is complete, not when it is half there."""
    gate = threading.Event()
    with toys({"slow": "import sys\nsys.slow_gate.wait(30)\n" + SOURCE}):
        sys.slow_gate = gate  # type: ignore[attr-defined]
        importer = threading.Thread(target=load, args=["slow"])
        importer.start()
        while "slow" not in sys.modules:
            pass
        plan = Plan([wrap("slow:norm")])
        patcher = threading.Thread(target=plan.apply)
        patcher.start()
        gate.set()
        importer.join(30)
        patcher.join(30)
        assert load("slow").norm(1) == LOUD
        plan.undo()
        del sys.slow_gate  # type: ignore[attr-defined]


def test_patch_inside_the_import_of_its_own_target_is_refused() -> None:
    """A module that calls patch() while it is itself imported, and is a target, gets an error that says when."""
    module = ModuleType("own")
    module.__spec__ = importlib.machinery.ModuleSpec("own", None)
    module.__spec__._initializing = True  # type: ignore[attr-defined]
    module.wait = wait_for_import  # type: ignore[attr-defined]
    sys.modules["own"] = module
    try:
        with pytest.raises(PatchError, match=r"called while own is being imported.*before that import, or after"):
            exec(compile("wait('own')", "<own>", "exec"), vars(module))
        with pytest.raises(PatchError, match="called while own is being imported"):
            wait_for_import("own", timeout_s=0.01)  # as if another thread never finished
    finally:
        del sys.modules["own"]


@pytest.mark.parametrize("rounds", range(3))
def test_threads_that_import_while_the_plan_is_applied(rounds: int) -> None:
    """However imports and apply() interleave, every module is patched once and restored."""
    names = [f"kit{number}" for number in range(12)]
    with toys(dict.fromkeys(names, SOURCE)), restless():
        plan = Plan([wrap(f"{name}:norm") for name in names])
        start = threading.Barrier(5)
        failures: list[Exception] = []

        def work(mine: list[str]) -> None:
            try:
                start.wait(30)
                for name in mine:
                    load(name)
            except Exception as error:  # noqa: BLE001 - of a thread: shown by the test
                failures.append(error)

        threads = [threading.Thread(target=work, args=[names[number::4]]) for number in range(4)]
        for thread in threads:
            thread.start()
        start.wait(30)
        plan.apply()
        for thread in threads:
            thread.join(30)
        assert failures == []
        assert [load(name).norm(1) for name in names] == [LOUD] * 12
        assert {outcome.status for outcome in plan.outcomes()} == {"applied"}
        plan.undo()
        assert [load(name).norm(1) for name in names] == [("norm", 1)] * 12


def test_an_import_that_ends_after_undo_is_not_patched() -> None:
    """A thread that found a module while the plan was active, and executes it afterwards, gets it as it is."""
    with toys({"kit": SOURCE}):
        plan = applied(wrap("kit:norm"))
        spec = importlib.util.find_spec("kit")
        assert spec is not None
        assert spec.loader is not None
        plan.undo()
        module = sys.modules["kit"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.norm(1) == ("norm", 1)
