"""Malformed calls: each is a one-screen error that says what was asked and what to do, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import os
import re
import string
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llm_adapt
from llm_adapt.adapters import adapters, detect
from llm_adapt.cli import run
from llm_adapt.cli.main import main
from llm_adapt.errors import DeviceError, LlmAdaptError, PatchError, SettingsError
from llm_adapt.patching import Plan
from llm_adapt.settings import resolve
from tests.adapters.fake_host import FakeHost
from tests.malformed_calls import ARGUMENTS, CALLS, OTHERS, PLANS, REFUSALS, TARGETS, TRAIN, USAGES, VARIABLES, row

pytestmark = pytest.mark.timeout(120)
SCREEN_LINES, SCREEN_CHARACTERS = 24, 2000
ORIGINALS = (torch.zeros, torch.device, torch.Tensor.to, torch.cuda.is_available)
USAGE = 2  # exit code of argparse
REFUSED = 78
FOREIGN = re.compile("LLM_ADAPT_|SLURM_|OMPI_|MASTER_|(LOCAL_)?(RANK|WORLD_SIZE)$")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process that nobody has configured, in an empty folder; afterwards it must be as before."""
    for name in list(os.environ):
        if FOREIGN.match(name):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    Path(TRAIN).touch()
    for starter in ("os.execve", "llm_adapt.cli.run.launch"):
        monkeypatch.setattr(starter, lambda *args: pytest.fail("a malformed call started a process"))
    before = state()
    yield
    assert not llm_adapt.is_patched()
    assert state() == before


def state() -> tuple[Any, ...]:
    """What patch() would change."""
    now = (torch.zeros, torch.device, torch.Tensor.to, torch.cuda.is_available)
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return now == ORIGINALS, environ, list(sys.meta_path), list(sys.path), os.getcwd()


def label(value: object) -> str:
    """A short name of a case: its words, its variables or the start of its text."""
    words = value if isinstance(value, (list, dict)) else [value]
    return " ".join(str(word).replace("\0", "NUL") for word in words)[:40]


def check_screen(text: str) -> None:
    """Fail when an error does not fit on one screen, or shows how llm_adapt is made."""
    assert text.strip()
    assert len(text.splitlines()) <= SCREEN_LINES
    assert len(text) <= SCREEN_CHARACTERS
    assert "Traceback" not in text


def told(call: Callable[[], object], error: type[BaseException] = LlmAdaptError) -> str:
    """The message of the error that a call must raise."""
    with pytest.raises(error) as raised:
        call()
    check_screen(str(raised.value))
    return str(raised.value)


# -- patch(): arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "expected"), ARGUMENTS, ids=label)
def test_patch_argument(arguments: dict[str, Any], expected: str) -> None:
    """patch() refuses a value of the wrong kind, and a device that does not exist or is not here."""
    assert re.search(expected, told(lambda: llm_adapt.patch(**arguments)))


@pytest.mark.parametrize("name", ["devcie", "nproc", "Device", "devices", "verbose"])
def test_unknown_argument(name: str) -> None:
    """An argument that patch() does not have is refused, by resolve() with the nearest that it has."""
    assert name in told(lambda: llm_adapt.patch(**{name: "cpu"}), TypeError)
    message = told(lambda: resolve(**{name: "cpu"}), SettingsError)
    assert message.startswith(f"Unknown patch() argument {name!r}.")
    assert ("Did you mean device?" in message) is (name in ("devcie", "Device", "devices"))


# -- LLM_ADAPT_* variables -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value", "expected"), VARIABLES, ids=label)
def test_variable(
    name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """patch() and `llm-adapt run` refuse a misspelt or malformed LLM_ADAPT_* variable in the same words."""
    with monkeypatch.context() as environment:
        environment.setenv(f"LLM_ADAPT_{name}", value)
        message = told(llm_adapt.patch)
        assert main(["run", TRAIN]) == REFUSED
    assert re.search(expected, message)
    shown = capsys.readouterr().err
    check_screen(shown)
    assert message in shown


# -- llm-adapt run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "expected"), USAGES, ids=label)
def test_usage(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A command line that makes no sense is a usage error with exit code 2."""
    with pytest.raises(SystemExit) as raised:
        main(words)
    shown = capsys.readouterr().err
    assert raised.value.code == USAGE
    check_screen(shown)
    assert shown.startswith("usage: llm-adapt")
    assert re.search(expected, shown)


@pytest.mark.parametrize(("words", "variables", "expected"), REFUSALS, ids=label)
def test_run_refuses(
    words: list[str],
    variables: Mapping[str, str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`llm-adapt run` refuses what cannot be started before it starts anything, with exit code 78."""
    Path("link.py").symlink_to("nowhere")
    with monkeypatch.context() as environment:
        for name, value in variables.items():
            environment.setenv(name, value)
        assert main(["run", *words]) == REFUSED
    shown = capsys.readouterr().err
    check_screen(shown)
    assert shown.startswith("llm-adapt: ")
    assert re.search(expected, shown)


def test_unreadable_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A script or report folder that this user may not read or write is refused before anything is started."""
    with monkeypatch.context() as rights:  # the superuser may read everything
        rights.setattr(run.os, "access", lambda path, mode: False)
        assert main(["run", TRAIN]) == REFUSED
        rights.setattr(run.os, "access", lambda path, mode: mode == os.R_OK)
        assert main(["run", "--out", "runs", TRAIN]) == REFUSED
    first, second = capsys.readouterr().err.splitlines()
    assert "Script 'train.py' was asked; this user may not read it" in first
    assert "reports in 'runs', which cannot be: this user may not write there" in second


# -- the wrong moment ----------------------------------------------------------------------------------------


def test_questions_to_a_process_that_is_not_patched() -> None:
    """report() and current_adapter() need a patched process, and say how to get one."""
    for asked in ("report", "current_adapter"):
        message = told(getattr(llm_adapt, asked), PatchError)
        assert message.startswith(f"llm_adapt.{asked}() was asked; this process is not patched.")
        assert "Call llm_adapt.patch() first" in message
    llm_adapt.unpatch()  # and undoing nothing does nothing


def test_patching_twice_with_other_options() -> None:
    """A patched process cannot be patched otherwise: not by an argument, not by a block."""
    with llm_adapt.patched(device="cpu", cpu_devices=2):
        for other in OTHERS:
            for call in (llm_adapt.patch, lambda **arguments: llm_adapt.patched(**arguments).__enter__()):
                message = told(lambda call=call, other=other: call(**other), PatchError)
                assert f"patch({next(iter(other))}=" in message
                assert "Call llm_adapt.unpatch() first" in message
        assert llm_adapt.patch(device="cpu") is llm_adapt.report()
        assert torch.cuda.device_count() == 2


def test_two_devices_and_no_choice(tmp_path: Path) -> None:
    """Where two devices are here, none is taken silently."""
    host = FakeHost(tmp_path).torch("2.7.1+cpu").mlu().npu(torch="2.7.1+cpu", plugin="2.7.1").host
    message = told(lambda: detect(host=host), DeviceError)
    assert "No device was asked for, and 2 are here" in message
    assert "Choose one: LLM_ADAPT_DEVICE=" in message


# -- device arguments of a patched script --------------------------------------------------------------------


def test_ordinal_that_does_not_exist() -> None:
    """A CUDA ordinal beyond the devices that are here is refused wherever a script can name it."""
    with llm_adapt.patched(device="cpu", cpu_devices=2):
        for call in CALLS:
            assert "Device ordinal 9 was asked; 2 exist(s) on cpu (0 to 1)." in told(call, DeviceError)


# -- rows ----------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module to patch, that must stay as it is."""
    module = types.ModuleType("toy")
    exec("def work(): return 1\nclass Thing:\n    def method(self): return 2\ntable = {}", vars(module))
    before = {**vars(module)}
    with monkeypatch.context() as modules:
        modules.setitem(sys.modules, "toy", module)
        yield module
    assert vars(module) == before
    assert module.table == {}


@pytest.mark.parametrize("target", TARGETS)
def test_row_target(target: str) -> None:
    """A row whose target is not written "module:name" is refused."""
    assert "'package.module:Class.attribute'" in told(lambda: Plan([row(target)]), PatchError)


@pytest.mark.parametrize(("rows", "expected"), PLANS, ids=label)
def test_rows(rows: list[Any], expected: str, toy: types.ModuleType) -> None:
    """Rows without a target, with one target, or of another version are refused before anything is written."""
    assert re.search(expected, told(lambda: Plan(rows).apply(), PatchError))


def test_skip_in_strict_mode(toy: types.ModuleType) -> None:
    """In strict mode a row that would be skipped is an error, and nothing of its plan is written."""
    rows = [row("toy:work"), row("toy:absent", optional=True)]
    assert "strict" in told(lambda: Plan(rows, strict=True).apply(), PatchError)


# -- data ----------------------------------------------------------------------------------------------------

EXAMPLES = Path(llm_adapt.__file__).parents[1] / "examples"


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="examples are in the repository, not in the package")
@pytest.mark.parametrize(
    ("name", "expected"), [("absent.txt", "no such file"), (".", "a folder"), ("empty.txt", "has 0 bytes|has 1 bytes")]
)
def test_unreadable_data(name: str, expected: str) -> None:
    """The example names the data that it cannot read, and what to do."""
    Path("empty.txt").touch()
    spec = importlib.util.spec_from_file_location("text_data_of_examples", EXAMPLES / "text_data.py")
    assert spec is not None
    assert spec.loader is not None
    text_data = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = text_data  # its dataclasses look themselves up
    spec.loader.exec_module(text_data)
    assert re.search(expected, told(lambda: text_data.load_text([name], 64), text_data.TextError))
    del sys.modules[spec.name]


# -- anything ------------------------------------------------------------------------------------------------

BUSY = settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
TEXT = st.text(string.printable + "é漢\0", max_size=60)
ANYTHING = st.one_of(TEXT, st.integers(), st.floats(), st.booleans(), st.binary(max_size=9), st.lists(TEXT, max_size=3))


@BUSY
@given(st.dictionaries(st.sampled_from(["device", "strict", "cpu_devices", "out"]), ANYTHING, min_size=1))
def test_any_argument(arguments: dict[str, Any]) -> None:
    """Whatever patch() is given, resolve() returns settings of the right types or a SettingsError on one screen."""
    try:
        found = resolve({}, **arguments)
    except SettingsError as error:
        message = str(error)
    else:
        message = "accepted"
        assert isinstance(found.strict, bool)
        assert found.cpu_devices is None or 1 <= found.cpu_devices <= 1024
        assert all(getattr(found, name) == value for name, value in arguments.items())
    check_screen(message)


@BUSY
@given(st.dictionaries(TEXT.map("LLM_ADAPT_".__add__), TEXT, min_size=1, max_size=3))
def test_any_variable(environ: dict[str, str]) -> None:
    """Whatever LLM_ADAPT_* variables there are, they are known and right or a SettingsError on one screen."""
    check_screen(told(lambda: resolve(environ), SettingsError))


@BUSY
@given(TEXT.filter(lambda name: name not in adapters()))
def test_any_device(name: str) -> None:
    """Whatever is asked for that is no device is refused in words that list the devices."""
    message = told(lambda: detect(name), DeviceError)
    assert repr(name) in message
    assert all(f"\n  {known}" in message for known in adapters())


def test_there_are_a_hundred() -> None:
    """At least one hundred malformed calls are listed, besides the generated ones."""
    kinds = (ARGUMENTS, VARIABLES, USAGES, REFUSALS, OTHERS, CALLS, TARGETS, PLANS)
    assert sum(map(len, kinds)) >= 100
