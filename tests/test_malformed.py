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
from llm_adapt.patching import Entry, Loan, Patch, Plan
from llm_adapt.settings import resolve
from tests.adapters.fake_host import FakeHost

pytestmark = pytest.mark.timeout(120)
SCREEN_LINES, SCREEN_CHARACTERS = 24, 2000
ORIGINALS = (torch.zeros, torch.device, torch.Tensor.to, torch.cuda.is_available)
USAGE = 2  # exit code of argparse
REFUSED = 78
FOREIGN = re.compile("LLM_ADAPT_|SLURM_|OMPI_|MASTER_|(LOCAL_)?(RANK|WORLD_SIZE)$")
absent = [name for name, adapter in adapters().items() if not adapter.probe().found and not adapter.probe().loadable]
TRAIN = "train.py"  # a script that is there and must never be started


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

ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"device": "gpu"}, r"patch\(device=\.\.\.\) asked for 'gpu', which is no device"),
    ({"device": "CUDA"}, "'CUDA', which is no device. Did you mean 'cuda'?"),
    ({"device": "nup"}, "Did you mean 'npu'?"),
    ({"device": "ascend"}, "'ascend', which is no device"),
    ({"device": "cuda:0"}, "'cuda:0', which is no device. Did you mean 'cuda'?"),
    ({"device": "cpu,cuda"}, "'cpu,cuda', which is no device"),
    ({"device": "../cpu"}, "'../cpu', which is no device"),
    ({"device": "цпу"}, "'цпу', which is no device"),
    ({"device": "[bold]cpu"}, "bold]cpu', which is no device"),
    ({"device": "cpu\ncpu"}, r"'cpu\\ncpu', which is no device"),
    ({"device": ""}, r"patch\(device=''\) was asked; accepted: cuda, npu, mlu, dcu, cpu"),
    ({"device": " "}, r"patch\(device=' '\)"),
    ({"device": " cpu "}, r"patch\(device=' cpu '\)"),
    ({"device": 0}, r"patch\(device=0\) was asked"),
    ({"device": True}, r"patch\(device=True\)"),
    ({"device": b"cpu"}, r"patch\(device=b'cpu'\)"),
    ({"device": ["cpu"]}, r"patch\(device=\['cpu'\]\)"),
    ({"device": torch.device("cpu")}, r"patch\(device=device\(type='cpu'\)\)"),
    ({"strict": "yes"}, r"patch\(strict='yes'\) was asked; accepted: 1 or 0"),
    ({"strict": 2}, r"patch\(strict=2\)"),
    ({"strict": 1}, r"patch\(strict=1\)"),
    ({"strict": []}, r"patch\(strict=\[\]\)"),
    ({"cpu_devices": 0}, r"patch\(cpu_devices=0\) was asked; accepted: 1 to 1024"),
    ({"cpu_devices": -1}, r"patch\(cpu_devices=-1\)"),
    ({"cpu_devices": 1025}, r"patch\(cpu_devices=1025\)"),
    ({"cpu_devices": 10**30}, r"patch\(cpu_devices=10000"),
    ({"cpu_devices": 2.0}, r"patch\(cpu_devices=2\.0\)"),
    ({"cpu_devices": "2"}, r"patch\(cpu_devices='2'\)"),
    ({"cpu_devices": True}, r"patch\(cpu_devices=True\)"),
    ({"cpu_devices": float("nan")}, r"patch\(cpu_devices=nan\)"),
    ({"out": ""}, r"patch\(out=''\) was asked; accepted: a folder"),
    ({"out": 3}, r"patch\(out=3\)"),
    ({"out": b"runs"}, r"patch\(out=b'runs'\)"),
    *(({"device": name}, f"'{name}', which is not here: .*") for name in absent),
]


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

VARIABLES = [
    ("DEVICE", "gpu", "LLM_ADAPT_DEVICE asked for 'gpu', which is no device"),
    ("DEVICE", "", "LLM_ADAPT_DEVICE='' was set; accepted: cuda, npu, mlu, dcu, cpu. Correct or unset it"),
    ("DEVICE", "auto", "'auto', which is no device"),
    ("DEVICE", "none", "'none', which is no device"),
    ("DEVICE", "NPU", "Did you mean 'npu'?"),
    ("STRICT", "maybe", "LLM_ADAPT_STRICT='maybe' was set; accepted: 1 or 0"),
    ("STRICT", "", "LLM_ADAPT_STRICT=''"),
    ("STRICT", "2", "LLM_ADAPT_STRICT='2'"),
    ("CPU_DEVICES", "0", "LLM_ADAPT_CPU_DEVICES='0' was set; accepted: 1 to 1024"),
    ("CPU_DEVICES", "-3", "LLM_ADAPT_CPU_DEVICES='-3'"),
    ("CPU_DEVICES", "two", "LLM_ADAPT_CPU_DEVICES='two'"),
    ("CPU_DEVICES", "1.5", "LLM_ADAPT_CPU_DEVICES='1.5'"),
    ("CPU_DEVICES", "0x10", "LLM_ADAPT_CPU_DEVICES='0x10'"),
    ("CPU_DEVICES", "", "LLM_ADAPT_CPU_DEVICES=''"),
    ("OUT", "", "LLM_ADAPT_OUT='' was set; accepted: a folder"),
    ("STRCT", "1", "Unknown environment variable LLM_ADAPT_STRCT. Did you mean LLM_ADAPT_STRICT?"),
    ("DEVICES", "1", "Did you mean LLM_ADAPT_(CPU_DEVICES|DEVICE)?"),
    ("CPU_DEVICE", "2", "Did you mean LLM_ADAPT_CPU_DEVICES?"),
    ("device", "cpu", "Unknown environment variable LLM_ADAPT_device"),
    ("", "1", "Unknown environment variable LLM_ADAPT_. "),
    ("WHATEVER", "1", r"Known: LLM_ADAPT_CPU_DEVICES, LLM_ADAPT_DEVICE, .*LLM_ADAPT_STRICT"),
]


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

USAGES = [
    ([], "the following arguments are required: command"),
    (["fly"], "invalid choice: 'fly'"),
    (["run"], "the following arguments are required: script"),
    (["run", "-m"], "the following arguments are required: script"),
    (["run", "--nproc"], "argument --nproc: expected one argument"),
    (["run", "--nproc", "0", TRAIN], "argument --nproc: '0' was given; a number from 1 to 1024 is needed"),
    (["run", "--nproc", "two", TRAIN], "'two' was given"),
    (["run", "--nproc", "1.5", TRAIN], r"'1\.5' was given"),
    (["run", "--nproc", "", TRAIN], "'' was given"),
    (["run", "--nproc", "²", TRAIN], "'²' was given"),
    (["run", "--nproc=-1", TRAIN], "'-1' was given"),
    (["run", "--nproc", "9" * 50, TRAIN], "9' was given"),
    (["run", "--nnodes", "0", TRAIN], "argument --nnodes: '0' was given"),
    (["run", "--nnodes", "1:4", TRAIN], "'1:4' was given"),
    (["run", "--node-rank=-1", TRAIN], "argument --node-rank: '-1' was given; a number from 0"),
    (["run", "--master-port", "0", TRAIN], "argument --master-port: '0' was given; a number from 1 to 65535"),
    (["run", "--master-port", "65536", TRAIN], "'65536' was given"),
    (["run", "--cpu-devices", "0", TRAIN], "argument --cpu-devices: '0' was given; a number from 1 to 1024"),
    (["run", "--devic", "cpu", TRAIN], "unrecognized arguments: --devic"),
    (["run", "--strict=maybe", TRAIN], "argument --strict: ignored explicit argument 'maybe'"),
    (["run", "--nproc-per-node", "2", TRAIN], "unrecognized arguments: --nproc-per-node"),
    (["doctor", "extra"], "unrecognized arguments: extra"),
]


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


REFUSALS: list[tuple[list[str], dict[str, str], str]] = [
    (["absent.py"], {}, "ScriptError: Script 'absent.py' was asked; found nothing there"),
    (["absent/train.py"], {}, "'absent/train.py' was asked; found nothing there"),
    ([f"{TRAIN}/x.py"], {}, "found nothing there"),
    ([""], {}, "Script '' was asked; found nothing there"),
    (["a\0b.py"], {}, r"Script 'a\\x00b\.py' was asked; found nothing there"),
    (["x" * 300], {}, "found nothing there"),
    (["."], {}, r"Script '\.' was asked; it is a folder without a __main__\.py"),
    (["link.py"], {}, "Script 'link.py' was asked; found nothing there"),
    (["-m", "no_such_module"], {}, "Module 'no_such_module' was asked; it is not installed and not in"),
    (["-m", "no_such.module"], {}, "Module 'no_such.module' was asked"),
    (["-m", "absent.py"], {}, "Module 'absent.py' was asked; .* or drop -m to run a file"),
    (["-m", "./absent"], {}, "Module './absent' was asked"),
    (["-m", ""], {}, "Module '' was asked"),
    (["-m", ".relative"], {}, "Module '.relative' was asked"),
    (["--device", "gpu", TRAIN], {}, "DeviceError: --device asked for 'gpu', which is no device"),
    (["--device", "", TRAIN], {}, r"patch\(device=''\) was asked"),
    (["--device", absent[0], TRAIN], {}, f"--device asked for '{absent[0]}', which is not here"),
    (["--device", absent[0], "--nproc", "2", TRAIN], {}, f"'{absent[0]}', which is not here"),
    (["--out", "", TRAIN], {}, r"patch\(out=''\) was asked; accepted: a folder"),
    (["--out", TRAIN, TRAIN], {}, "SettingsError: --out or LLM_ADAPT_OUT asked for reports in 'train.py', which"),
    (["--out", f"{TRAIN}/out", TRAIN], {}, r"Not a directory"),
    (["--out", "a\0b", TRAIN], {}, r"reports in '.*a\\x00b', which cannot be: embedded null byte"),
    (["--nnodes", "2", TRAIN], {}, "CommError: --nnodes 2 was asked without --master-addr. Give the host of machine 0"),
    (["--node-rank", "1", TRAIN], {}, "--node-rank 1 was asked with --nnodes 1. Machines count from 0 to 0"),
    (["--nnodes", "2", "--node-rank", "2", "--master-addr", "a", TRAIN], {}, "Machines count from 0 to 1"),
    ([TRAIN], {"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2; a rank lies below the number of ranks"),
    ([TRAIN], {"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' was found; a rank or size is a number"),
    ([TRAIN], {"RANK": "zero", "WORLD_SIZE": "2"}, "RANK='zero' was found"),
    ([TRAIN], {"RANK": "0"}, "RANK=0 was found without WORLD_SIZE. Set both or none"),
    ([TRAIN], {"RANK": "0", "WORLD_SIZE": "2"}, "without LOCAL_RANK"),
    ([TRAIN], {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "3"}, "LOCAL_RANK=3 among 2 ranks here and 2 in all"),
    ([TRAIN], {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "99999"}, "MASTER_PORT=99999 was found; a port"),
    (
        [TRAIN],
        {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
        "4 ranks, 2 of them here, without MASTER_ADDR",
    ),
    ([TRAIN], {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, "Say `srun llm-adapt run ...`"),
    ([TRAIN], {"SLURM_PROCID": "x", "SLURM_NTASKS": "4"}, "SLURM_PROCID='x' was found"),
    ([TRAIN], {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, "without SLURM_LOCALID"),
    ([TRAIN], {"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK=1 was found without OMPI_COMM_WORLD_SIZE"),
    ([TRAIN], {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "two"}, "OMPI_COMM_WORLD_SIZE='two' was found"),
]


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


OTHERS: list[dict[str, Any]] = [{"device": absent[0]}, {"strict": True}, {"cpu_devices": 3}, {"out": "runs"}]


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

CALLS: list[Callable[[], object]] = [
    lambda: torch.zeros(1, device="cuda:9"),
    lambda: torch.zeros(1, device=9),
    lambda: torch.ones(1).cuda(9),
    lambda: torch.ones(1).to("cuda:9"),
    lambda: torch.nn.Linear(1, 1).cuda(9),
    lambda: torch.cuda.set_device(9),
    lambda: torch.cuda.get_device_properties(9),
    lambda: torch.cuda.memory_allocated("cuda:9"),
    lambda: torch.Generator(device="cuda:9"),
    lambda: torch.set_default_device("cuda:9"),
    lambda: torch.load("absent.pt", map_location="cuda:9"),
]


def test_ordinal_that_does_not_exist() -> None:
    """A CUDA ordinal beyond the devices that are here is refused wherever a script can name it."""
    with llm_adapt.patched(device="cpu", cpu_devices=2):
        for call in CALLS:
            assert "Device ordinal 9 was asked; 2 exist(s) on cpu (0 to 1)." in told(call, DeviceError)


# -- rows ----------------------------------------------------------------------------------------------------


def row(target: str, **fields: Any) -> Patch:
    """A row that would replace the target."""
    return Patch(target, lambda: None, "for the test", **fields)


TARGETS = ["", ":", "module", "module.name", "module:", ":name", "a:b:c", "a::b"]
PLANS: list[tuple[list[Any], str]] = [
    ([row("toy:absent")], "toy:absent does not exist"),
    ([row("toy:wrok")], "work"),
    ([row("toy:Absent.method")], "toy:Absent"),
    ([row("toy:Thing.absent.method")], "absent"),
    ([row("toy:work"), row("toy:work")], "Two rows claim toy:work"),
    ([row("toy:Thing"), row("toy:Thing.method")], "Two rows claim"),
    ([Entry("toy:work", 1, "for the test", key="k")], "toy:work was asked as a dict or list|work"),
    ([Entry("toy:table", 1, "a", key="k"), Entry("toy:table", 2, "b", key="k")], "Two rows claim toy:table"),
    ([Loan("toy:a.b", dict, "for the test")], "toy:a.b was asked as a loan; lend a top-level package"),
    ([row("toy:work", fingerprints={"1.0": "another"}, on_mismatch="refuse")], "toy:work"),
]


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
