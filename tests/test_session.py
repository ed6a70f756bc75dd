"""patch, unpatch, patched, report: one session per process, and everything put back behind it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import llm_adapt
from llm_adapt import session
from llm_adapt.errors import DeviceError, PatchError, SettingsError
from llm_adapt.frameworks.context import Context
from llm_adapt.patching import Patch, Plan, Row
from tests.patching.toys import load, toys, wrap


class Table(ModuleType):
    """A table of rows for toy modules, in the place of the real ones."""

    def __init__(self) -> None:
        super().__init__("llm_adapt.frameworks.toy_table")
        self.found: list[Row] = [wrap("kit:norm"), wrap("later:norm")]
        self.contexts: list[Context] = []

    def rows(self, context: Context) -> list[Row]:
        """All rows."""
        self.contexts.append(context)
        return self.found


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Table]:
    """The only table there is, with two modules to patch; no LLM_ADAPT_* variable is set."""
    for name in [name for name in os.environ if name.startswith("LLM_ADAPT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(session, "_TABLES", ("toy_table",))
    toy = Table()
    monkeypatch.setitem(sys.modules, toy.__name__, toy)
    with toys({"kit": "def norm(x): return ('norm', x)", "later": "def norm(x): return ('norm', x)"}):
        load("kit")
        yield toy
        llm_adapt.unpatch()


def is_loud() -> bool:
    """Whether the toy module is patched."""
    return bool(load("kit").norm(1) == ("loud", ("norm", 1)))


# -- patch and unpatch -------------------------------------------------------------------------------------


def test_patch_and_unpatch(table: Table) -> None:
    """patch() applies the rows of every table for the chosen device; unpatch() takes them back."""
    found = llm_adapt.patch(device="cpu")
    assert (is_loud(), found.device, llm_adapt.is_patched()) == (True, "cpu", True)
    assert table.contexts[0].adapter is llm_adapt.current_adapter()
    llm_adapt.unpatch()
    assert (is_loud(), llm_adapt.is_patched()) == (False, False)
    llm_adapt.unpatch()  # a second time: nothing


def test_patch_twice_is_patch_once(table: Table) -> None:
    """A second call, with the same arguments or none, returns the same report and applies nothing."""
    first = llm_adapt.patch(device="cpu", cpu_devices=2)
    for arguments in ({}, {"device": "cpu"}, {"cpu_devices": 2}, {"strict": False}):
        assert llm_adapt.patch(**arguments) is first
    assert (len(table.contexts), load("kit").norm(1)) == (1, ("loud", ("norm", 1)))


def test_the_detected_device_may_be_named_later(table: Table) -> None:
    """After patch() has found a device, asking for that very device is no other request."""
    found = llm_adapt.patch()
    assert llm_adapt.patch(device=found.device) is found


@pytest.mark.parametrize("arguments", [{"device": "npu"}, {"strict": True}, {"cpu_devices": 3}, {"out": "other"}])
def test_patch_with_other_arguments_is_refused(table: Table, arguments: dict[str, Any]) -> None:
    """A second call that asks for something else raises, names both, and changes nothing."""
    llm_adapt.patch(device="cpu", cpu_devices=2)
    (name,) = arguments
    with pytest.raises(PatchError, match=rf"patch\({name}=.*was asked; this process is patched with Settings\("):
        llm_adapt.patch(**arguments)
    assert is_loud()


def test_wrong_arguments_are_told_before_anything_happens(table: Table) -> None:
    """An unknown device, a wrong value and an unknown variable raise their own errors."""
    with pytest.raises(DeviceError, match="asked for 'npo'"):
        llm_adapt.patch(device="npo")
    with pytest.raises(SettingsError, match="cpu_devices=0"):
        llm_adapt.patch(cpu_devices=0)
    assert (is_loud(), table.contexts) == (False, [])


@pytest.mark.parametrize("error", [PatchError("no"), RuntimeError("no"), KeyboardInterrupt()])
def test_a_patch_that_fails_leaves_nothing(table: Table, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an exception in the middle the process is unpatched, its environment as before, and patch() works."""

    def fail(original: Any) -> Any:
        os.environ["SET_ON_THE_WAY"] = "1"
        raise error

    before = (dict(os.environ), list(sys.meta_path), gc.isenabled())
    table.found.append(Patch("kit:norm.__doc__", None, "unreachable", optional=True))
    table.found[:] = [wrap("kit:norm"), wrap("later:norm"), wrap("kit:__doc__", fail)]
    with pytest.raises(type(error)):
        llm_adapt.patch(device="cpu")
    assert (dict(os.environ), list(sys.meta_path), gc.isenabled()) == before
    assert (is_loud(), llm_adapt.is_patched()) == (False, False)
    table.found.pop()
    llm_adapt.patch(device="cpu")
    assert is_loud()


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_is_as_it_was(table: Table, was_enabled: bool) -> None:
    """patch() holds the garbage collector off while it works, and leaves it on or off as it found it."""
    (gc.enable if was_enabled else gc.disable)()
    try:
        llm_adapt.patch(device="cpu")
        assert gc.isenabled() is was_enabled
    finally:
        gc.enable()


# -- environment -------------------------------------------------------------------------------------------


def test_variables_that_patch_sets_are_put_back(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever patch() set in the environment is gone after unpatch(), also what no adapter declares."""
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setenv("CHANGED_ON_THE_WAY", "old")

    def change(original: Any) -> Any:
        os.environ["SET_ON_THE_WAY"], os.environ["CHANGED_ON_THE_WAY"] = "1", "new"
        return original

    table.found.append(wrap("kit:__doc__", change))
    before = dict(os.environ)
    llm_adapt.patch(device="cpu")
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == os.environ["SET_ON_THE_WAY"] == "1"
    llm_adapt.unpatch()
    assert dict(os.environ) == before


def test_variables_that_the_user_changed_since_stay_his(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """unpatch() does not touch a variable that somebody has set again, nor those it never set."""
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    llm_adapt.patch(device="cpu")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    monkeypatch.setenv("SET_BY_THE_USER", "1")
    llm_adapt.unpatch()
    assert (os.environ["CUDA_DEVICE_MAX_CONNECTIONS"], os.environ["SET_BY_THE_USER"]) == ("8", "1")


# -- with patched() ----------------------------------------------------------------------------------------


def test_patched_ends_with_its_block(table: Table) -> None:
    """The block is patched inside and not behind, whatever way it ends."""
    with llm_adapt.patched(device="cpu") as found:
        assert (is_loud(), found.device) == (True, "cpu")
    assert not is_loud()
    with pytest.raises(ZeroDivisionError):
        with llm_adapt.patched(device="cpu"):
            raise ZeroDivisionError
    assert (is_loud(), llm_adapt.is_patched()) == (False, False)


def test_patched_inside_patched_changes_nothing(table: Table) -> None:
    """The outermost block, or patch() before it, decides when the process is unpatched."""
    with llm_adapt.patched(device="cpu"):
        with llm_adapt.patched():
            llm_adapt.patch()
        assert is_loud()
    assert not is_loud()
    llm_adapt.patch(device="cpu")
    with llm_adapt.patched():
        pass
    assert is_loud()


def test_unpatch_inside_a_block_ends_it_early(table: Table) -> None:
    """After unpatch() in a block its end does nothing, also not to a session that was opened since."""
    with llm_adapt.patched(device="cpu"):
        llm_adapt.unpatch()
        assert not is_loud()
        llm_adapt.patch(device="cpu")
    assert is_loud()


def test_blocks_of_several_threads_may_overlap(table: Table) -> None:
    """A block stays patched until it ends, though the one that opened the session ended before."""
    inside, leave = threading.Event(), threading.Event()
    seen: list[bool] = []

    def second() -> None:
        with llm_adapt.patched():
            inside.set()
            leave.wait(30)
            seen.append(is_loud())

    with llm_adapt.patched(device="cpu"):
        thread = threading.Thread(target=second)
        thread.start()
        inside.wait(30)
    leave.set()
    thread.join(30)
    assert (seen, is_loud(), llm_adapt.is_patched()) == ([True], False, False)


def test_patched_with_other_arguments_is_refused(table: Table) -> None:
    """A block that asks for something else inside a patched process raises and leaves it patched."""
    with llm_adapt.patched(device="cpu", cpu_devices=2):
        with pytest.raises(PatchError, match="cpu_devices=3"):
            with llm_adapt.patched(cpu_devices=3):
                raise AssertionError
        assert is_loud()
    assert not is_loud()


# -- report ------------------------------------------------------------------------------------------------


def test_the_report_grows_as_modules_are_imported(table: Table) -> None:
    """Rows that waited are applied in the same report object; what tables have added stays in it."""
    table.found.append(Patch("kit:gone", None, "why", optional=True))
    found = llm_adapt.patch(device="cpu")
    table.contexts[0].report.add("patch", "torch.cuda", "left alone", "why")

    def statuses() -> dict[str, str]:
        return {line.subject: line.choice for line in llm_adapt.report().lines if line.section == "patch"}

    assert statuses() == {
        "torch.cuda": "left alone", "kit:norm": "applied", "later:norm": "waiting", "kit:gone": "skipped",
    }  # fmt: skip
    load("later")
    assert (statuses()["later:norm"], llm_adapt.report() is found) == ("applied", True)
    llm_adapt.unpatch()
    assert "later:norm" in found.to_json()


def test_the_report_says_why_this_device_and_which_versions(table: Table) -> None:
    """Device, reason, what was activated, and the versions of the device's distributions are in it."""
    found = llm_adapt.patch(device="cpu")
    lines = [line for line in found.lines if line.section == "device"]
    assert lines[0][1:4] == ("cpu", "CPU", "asked for by patch(device=...); always available")
    assert found.versions.keys() >= {"torch", "numpy"}


def test_who_asks_an_unpatched_process_is_told(table: Table) -> None:
    """report() and current_adapter() raise where nothing is patched, and say what to call."""
    for ask in (llm_adapt.report, llm_adapt.current_adapter):
        with pytest.raises(PatchError, match=r"this process is not patched. Call llm_adapt.patch\(\) first"):
            ask()


def test_out_receives_the_report(table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """unpatch() writes report.json into the folder as it was when patch() was called, one file per rank."""
    monkeypatch.chdir(tmp_path)
    for rank, name in (("", "report.json"), ("0", "report.json"), ("3", "report.rank3.json")):
        monkeypatch.setenv("RANK", rank)
        llm_adapt.patch(device="cpu", out="runs")
        assert llm_adapt.patch(out="runs") is llm_adapt.report()
        os.chdir("/")
        llm_adapt.unpatch()
        os.chdir(tmp_path)
        assert json.loads((tmp_path / "runs" / name).read_text())["device"] == "cpu"
        (tmp_path / "runs" / name).unlink()


def test_a_report_that_cannot_be_written_still_unpatches(table: Table, tmp_path: Path) -> None:
    """The error comes through after everything has been put back."""
    (tmp_path / "file").write_text("")
    llm_adapt.patch(device="cpu", out=tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        llm_adapt.unpatch()
    assert (is_loud(), llm_adapt.is_patched()) == (False, False)


# -- processes ---------------------------------------------------------------------------------------------


def run(code: str, **environ: str) -> str:
    """Standard output of a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_report_is_written_at_exit_by_the_process_that_patched(tmp_path: Path) -> None:
    """A forked child, and a spawned one, end without touching their parent's report."""
    code = """
        import os, sys, llm_adapt
        from llm_adapt.session import patch_child, is_patched
        llm_adapt.patch(device="cpu", out=sys.argv[0] and os.environ["FOLDER"])
        if os.fork() == 0:
            assert is_patched()
            os.environ["RANK"] = "7"
            sys.exit(0)  # runs the exit functions
        assert os.wait()[1] == 0
    """
    run(code, FOLDER=str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    run("from llm_adapt.session import patch_child\nassert patch_child({'device': 'cpu'}) == 'cpu'",
        LLM_ADAPT_OUT=str(tmp_path / "child"))  # fmt: skip
    assert not (tmp_path / "child").exists()


def test_a_forked_child_unpatches_itself_alone(table: Table) -> None:
    """A child inherits the patch; what it undoes, it undoes for itself."""
    llm_adapt.patch(device="cpu")
    child = os.fork()
    if child == 0:
        llm_adapt.unpatch()
        os._exit(0 if not is_loud() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert is_loud()


def test_a_child_that_is_patched_already_stays_so(table: Table) -> None:
    """patch_child in a process that patched itself on its way keeps that patch."""
    found = llm_adapt.patch(device="cpu", cpu_devices=4)
    assert session.patch_child({"device": "cpu", "strict": False, "cpu_devices": None}) == "cpu"
    assert llm_adapt.report() is found


def test_importing_llm_adapt_is_not_acting() -> None:
    """`import llm_adapt` and its session import no torch, register no exit function and change no registry."""
    code = """
        import os, sys, warnings, atexit, builtins, logging
        before = (dict(os.environ), list(sys.meta_path), list(warnings.filters), builtins.__import__, list(sys.path))
        count = atexit._ncallbacks()
        import llm_adapt, llm_adapt.session
        assert "torch" not in sys.modules
        assert not llm_adapt.is_patched()
        after = (dict(os.environ), list(sys.meta_path), list(warnings.filters), builtins.__import__, list(sys.path))
        assert (before, count) == (after, atexit._ncallbacks())
    """
    run(code)


def test_the_module_has_what_it_says() -> None:
    """The names in __all__ and dir() are there; another one is an error that lists them."""
    assert sorted(llm_adapt.__all__) == dir(llm_adapt)
    assert all(callable(getattr(llm_adapt, name)) for name in llm_adapt.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="has no attribute 'ptach'; it has"):
        llm_adapt.ptach  # noqa: B018


def test_an_undo_that_fails_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables and the policy are put back whatever becomes of the replaced names."""
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    llm_adapt.patch(device="cpu")
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    undo = Plan.undo

    def failing(plan: Plan) -> list[str]:
        undo(plan)
        raise ZeroDivisionError

    monkeypatch.setattr(Plan, "undo", failing)
    with pytest.raises(ZeroDivisionError):
        llm_adapt.unpatch()
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ
    assert not llm_adapt.is_patched()


def test_ops_off_leaves_frameworks_their_own_code() -> None:
    """No row of an operator is planned, and the report says so."""
    from llm_adapt.frameworks import transformers

    with llm_adapt.patched(device="cpu", ops="off") as report:
        context = session._active("a test").context
        assert not context.serves_operators
        assert transformers.rows(context) == []
        assert [line.choice for line in report.lines if line.section == "ops"] == ["off"]
    with llm_adapt.patched(device="cpu") as report:
        assert session._active("a test").context.serves_operators
        assert [line.choice for line in report.lines if line.section == "ops"] != ["off"]
