"""The llm-adapt command: its help, its errors, and what it would start, without starting it."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llm_adapt
from llm_adapt.cli import agent, run, worker
from llm_adapt.cli.main import main
from llm_adapt.errors import DeviceError, KernelError

ROOT = Path(llm_adapt.__file__).parents[1]
STARTUP = str(ROOT / "llm_adapt" / "cli" / "startup")
FOREIGN = re.compile("LLM_ADAPT_|SLURM_|OMPI_|MASTER_|OMP_NUM|PYTHONPATH|(LOCAL_)?(RANK|WORLD_SIZE)$")
Started = list[tuple[Any, ...]]


class Became(BaseException):
    """Raised where this process would have become another."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Started:
    """Instead of starting anything, keep what would be: by exec (command, environment), by the agent (..., nproc)."""
    calls: Started = []

    def execve(path: str, command: list[str], environ: dict[str, str]) -> None:
        calls.append((command, environ))
        raise Became

    def launch(args: argparse.Namespace, nproc: int, command: list[str], variables: dict[str, str]) -> int:
        calls.append((command, variables, nproc))
        return 0

    for name in list(os.environ):
        if FOREIGN.match(name):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    monkeypatch.setattr(run.os, "execve", execve)
    monkeypatch.setattr(run, "launch", launch)
    return calls


def only(started: Started) -> tuple[Any, ...]:
    """What was started, once."""
    (call,) = started
    return call


# -- what would be started -----------------------------------------------------------------------------------


def test_one_process_becomes_the_script(started: Started, capsys: pytest.CaptureFixture[str]) -> None:
    """One process is Python with the script, as rank 0 of 1; nothing in it names llm_adapt but the way to patch."""
    before = dict(os.environ)
    with pytest.raises(Became):
        main(["run", "--device", "cpu", "train.py", "--lr", "1", "--", "-m"])
    command, environ = only(started)
    assert command == [sys.executable, "train.py", "--lr", "1", "--", "-m"]
    added = {name: value for name, value in environ.items() if before.get(name) != value}
    assert int(added.pop("MASTER_PORT")) > 0
    assert added.pop("PYTHONPATH").split(os.pathsep)[0] == STARTUP
    assert added == {
        "LLM_ADAPT_DEVICE": "cpu",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "RANK": "0",
        "WORLD_SIZE": "1",
    }
    assert dict(os.environ) == before
    assert capsys.readouterr().err == "llm-adapt: CPU (asked for by --device; always available); 1 process\n"


def test_options_end_at_the_script(started: Started, capsys: pytest.CaptureFixture[str]) -> None:
    """What follows the script is the script's, also when it looks like an option of llm-adapt."""
    assert main(["run", "--nproc", "2", "--device", "cpu", "-m", "pytest", "--nproc", "3", "--help", "-m"]) == 0
    command, _, nproc = only(started)
    assert (command, nproc) == ([sys.executable, "-m", "pytest", "--nproc", "3", "--help", "-m"], 2)
    assert capsys.readouterr().err.endswith("; 2 processes\n")


def test_options_win_over_variables(started: Started, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Options reach every process as variables, a relative folder as an absolute one that is there."""
    monkeypatch.setenv("LLM_ADAPT_OUT", "other")
    monkeypatch.setenv("LLM_ADAPT_CPU_DEVICES", "5")
    options = ["--device", "cpu", "--strict", "--cpu-devices", "3", "--out", "runs/a", "--nproc", "2"]
    assert main(["run", *options, "train.py"]) == 0
    variables = only(started)[1]
    assert {name: value for name, value in variables.items() if name != "PYTHONPATH"} == {
        "LLM_ADAPT_CPU_DEVICES": "3",
        "LLM_ADAPT_DEVICE": "cpu",
        "LLM_ADAPT_OUT": str(tmp_path / "runs" / "a"),
        "LLM_ADAPT_STRICT": "1",
    }
    assert (tmp_path / "runs" / "a").is_dir()


def test_refused_command_makes_no_folder(started: Started) -> None:
    """A command that is refused leaves no folder for its reports behind."""
    assert main(["run", "--device", "gpu", "--out", "runs", "train.py"]) == worker.REFUSED
    assert (started, Path("runs").exists()) == ([], False)


@pytest.mark.parametrize(("options", "expected"), [([], "a 7"), (["--master-addr", "b", "--master-port", "8"], "b 8")])
def test_outer_ranks_reach_the_script(
    options: list[str], expected: str, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of an outer launcher are passed on, options about the meeting point win over variables."""
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Became):
        main(["run", "--device", "cpu", *options, "train.py"])
    environ = only(started)[1]
    assert [environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["1", "2", "1"]
    assert f"{environ['MASTER_ADDR']} {environ['MASTER_PORT']}" == expected


def test_nproc_ignores_outer_ranks(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says how many processes to start gets them, whatever ranks this process has."""
    monkeypatch.setenv("RANK", "5")
    assert main(["run", "--device", "cpu", "--nproc", "2", "train.py"]) == 0
    assert only(started)[2] == 2


@pytest.mark.parametrize("inherited", ["", "/a", f"/a{os.pathsep}{os.pathsep}/b"])
def test_way_to_patch_keeps_the_search_path(inherited: str) -> None:
    """The folder that patches comes first on PYTHONPATH, before what was there, empty entries included."""
    found = worker.patched_start({"PYTHONPATH": inherited} if inherited else {})["PYTHONPATH"]
    assert found == (f"{STARTUP}{os.pathsep}{inherited}" if inherited else STARTUP)


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Several processes get threads for their part of the cores, unless the user has set a number; then it stays."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    before = dict(os.environ)
    for nproc, expected in ((1, cores), (2, max(1, cores // 2)), (4096, 1)):
        with agent._surroundings(nproc, {"LLM_ADAPT_DEVICE": "cpu"}, str(tmp_path)):
            assert (os.environ["OMP_NUM_THREADS"], os.environ["LLM_ADAPT_DEVICE"]) == (str(expected), "cpu")
        assert dict(os.environ) == before
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with agent._surroundings(2, {}, str(tmp_path)):
        assert os.environ["OMP_NUM_THREADS"] == "7"


def test_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a torch that works, several processes are refused with the way to a diagnosis."""
    monkeypatch.setitem(sys.modules, "torch.distributed.launcher.api", None)
    args = argparse.Namespace(nnodes=1, node_rank=0, master_addr=None, master_port=None)
    with pytest.raises(DeviceError, match=r"`import torch` failed: .*\nRun `llm-adapt doctor`"):
        agent.launch(args, 2, [sys.executable, "train.py"], {})


# -- what is said about failures -----------------------------------------------------------------------------


def failure(exitcode: int, timestamp: int = 0, **data: str) -> SimpleNamespace:
    """One failed rank as torch's agent describes it."""
    return SimpleNamespace(
        exitcode=exitcode, timestamp=timestamp, pid=9, error_file_data=data, message=data.get("message", "")
    )


FAILURES: list[tuple[Mapping[int, SimpleNamespace], int, str]] = [
    ({1: failure(3)}, 3, "rank 1 of 4 (pid 9) ended with exit code 3"),
    ({1: failure(78)}, 78, "rank 1 of 4 (pid 9) ended with exit code 78"),
    ({1: failure(-9)}, 137, "was killed by SIGKILL"),
    ({1: failure(-15), 0: failure(-15)}, 143, "rank 1 of 4 (pid 9) was killed by SIGTERM"),
    ({1: failure(-40)}, 168, "was killed by signal 40"),
    ({0: failure(1), 1: failure(-9), 2: failure(-15)}, 137, "rank 1 of 4"),
    ({1: failure(1), 0: failure(-15)}, 1, "rank 1 of 4"),
    ({1: failure(1, 10), 0: failure(-9, 40)}, 1, "rank 1 of 4"),
    ({2: failure(78, source="llm_adapt", message="DeviceError: no")}, 78, "llm-adapt: rank 2 of 4: DeviceError: no\n"),
    ({2: failure(78, source="torch", message="no")}, 78, "rank 2 of 4 (pid 9) ended with exit code 78"),
]


@pytest.mark.parametrize(("failures", "code", "expected"), FAILURES)
def test_first_failure_is_named(
    failures: Mapping[int, SimpleNamespace], code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rank that failed first is named, not those that died of its death or were stopped, and gives the code."""
    assert agent._explain(failures, 4) == code
    shown = capsys.readouterr().err
    assert expected in shown
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "llm-adapt: KernelError: one\ntwo\n"),
        ({"RANK": "4", "LOCAL_RANK": "0"}, "llm-adapt: KernelError: one\ntwo\n"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, "llm-adapt: local rank 1: KernelError: one\n"),
        ({"SLURM_PROCID": "9", "SLURM_LOCALID": "3"}, "llm-adapt: local rank 3: KernelError: one\n"),
    ],
)
def test_one_rank_of_a_machine_speaks(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under an outer launcher the first rank of a machine shows the whole error, the others its first line."""
    for name in list(os.environ):
        if FOREIGN.match(name):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    worker.show(KernelError("one\ntwo"))
    assert capsys.readouterr().err == expected


# -- the command itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"]])
def test_help_has_examples(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Every help text ends with examples, in lines that fit a terminal."""
    with pytest.raises(SystemExit) as raised:
        main(words)
    shown = capsys.readouterr().out
    assert raised.value.code == 0
    assert "\nexamples:\n  llm-adapt run " in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints the version of the package."""
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"llm-adapt {llm_adapt.__version__}\n"


def test_interrupt_before_the_start(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C before a process was started ends the command quietly with the shell's code for it."""

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "detect", interrupt)
    assert main(["run", "train.py"]) == 130
    assert started == []


def test_reader_that_goes_away() -> None:
    """`llm-adapt --help | true` is no error."""
    pipe = subprocess.PIPE
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-m", "llm_adapt.cli", "--help"], stdout=pipe, stderr=pipe, env=environ
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) in (0, 128 + signal.SIGPIPE)  # 0 where the help went out before the pipe was closed
