"""Asking for a simulator: what is refused before anything is compiled, and what the report says afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import llm_adapt
from llm_adapt import simulators
from llm_adapt.cli.main import main
from llm_adapt.errors import SettingsError
from llm_adapt.report import Report
from llm_adapt.simulators import SimulatorError
from llm_adapt.simulators.base import Library, Simulator, Toolchain
from llm_adapt.simulators.build import build
from llm_adapt.simulators.toolchain import find_toolchain

NPU = simulators.parse("npu").simulator


def run_code(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("name", simulators.SIMULATORS)
def test_every_simulator_says_what_it_is(name: str) -> None:
    """Each has a title, chips with their meaning, and a list of what cannot be known."""
    simulator = simulators.parse(name).simulator
    assert simulator.name == name
    assert simulator.default_model in simulator.models
    assert all(simulator.models.values())
    assert simulator.unknown != ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("npuu", "there are npu, mlu, dcu. Did you mean npu?"),
        ("cuda", "there are npu, mlu, dcu"),
        ("npu:Ascend910B", "Did you mean Ascend910B3?"),
        ("npu:H100", "it has Ascend910B3"),
    ],
)
def test_a_name_that_is_not_there_is_refused(text: str, words: str) -> None:
    """The refusal lists what there is, and the nearest name."""
    with pytest.raises(SimulatorError, match=words.replace("?", r"\?").replace(".", r"\.")):
        simulators.parse(text)


def test_short_names_of_chips() -> None:
    """910B3 is Ascend910B3, the chip that is also taken without a word."""
    assert simulators.parse("npu:910B3") == simulators.parse("npu")


def test_after_torch_it_is_too_late() -> None:
    """A process that has imported torch cannot become another device; the error says how to start."""
    pytest.importorskip("torch")
    with pytest.raises(SimulatorError, match=r"after torch was imported.*llm-adapt run --simulate npu"):
        simulators.enter("npu")


def test_two_devices_contradict_each_other() -> None:
    """The device asked for must be the simulated one; nothing stays patched."""
    code = "import llm_adapt; llm_adapt.patch(device='cpu', simulate='dcu')"
    done = run_code(code)
    assert "Drop one of the two" in done.stderr
    assert main(["run", "--device", "cpu", "--simulate", "npu", __file__]) == 78


def test_patch_refuses_an_unknown_simulator() -> None:
    """patch(simulate=...) raises what the command line shows, and an empty name is no name."""
    with pytest.raises(SimulatorError, match="there are npu, mlu, dcu"):
        llm_adapt.patch(simulate="tpu")
    with pytest.raises(SettingsError, match="simulate"):
        llm_adapt.patch(simulate="")


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """No g++: how to install one."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SimulatorError, match=r"no g\+\+ on PATH.*apt install g\+\+"):
        find_toolchain(NPU, print)


def test_with_another_torch() -> None:
    """The wheel of torch_npu fits one torch: which is there, which is needed, how to get it."""
    other = Simulator(**{**vars(NPU), "plugin_requirement": "torch_npu==2.12.0"})
    with pytest.raises(SimulatorError, match=r"torch 2\.\d+\.\d.* is installed.*needs torch 2\.12\.0"):
        find_toolchain(other, print)


def test_without_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No torch_npu and no way to fetch it: the command that brings it; nothing half fetched is left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SimulatorError, match="Run: llm-adapt simulate build npu"):
        find_toolchain(NPU, print, fetch=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SimulatorError, match=r"copy the wheel here and run: pip install --no-deps --target"):
        find_toolchain(NPU, print)
    assert [path for path in tmp_path.rglob("*") if path.is_dir() and "torch_npu" in path.name] == []


def toy(tmp_path: Path, text: str) -> Simulator:
    """A simulator of one C++ file."""
    source = tmp_path / "toy.cpp"
    source.write_text(text)
    rows = (Library("libtoy.so", (source,)),)
    return Simulator("toy", "a toy", {"one": "the one"}, "one", lambda _: rows, lambda *_: {}, lambda _: None)


def a_toolchain() -> Toolchain:
    """g++ and no torch: enough for plain libraries."""
    import shutil

    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    return Toolchain(compiler, "g++", Path(), "none")


def test_what_is_built_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time nothing is compiled; a changed source is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said: list[str] = []
    first = build(toy(tmp_path, "int one() { return 1; }"), a_toolchain(), said.append)
    assert (first / "libtoy.so").is_file()
    count = len(said)
    assert build(toy(tmp_path, "int one() { return 1; }"), a_toolchain(), said.append) == first
    assert len(said) == count
    assert build(toy(tmp_path, "int one() { return 2; }"), a_toolchain(), said.append) != first


def test_a_failed_build_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's own error, the file with the rest, and no folder that looks finished."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(SimulatorError, match=r"error.*\n.*build-failure\.txt") as caught:
        build(toy(tmp_path, "int one() { return nothing; }"), a_toolchain(), lambda line: None)
    assert "nothing" in str(caught.value)
    left = [path.name for path in (tmp_path / "cache/llm_adapt/simulators").iterdir() if path.is_dir()]
    assert left == ["objects"]


def test_the_report_says_it_first() -> None:
    """Text and JSON of a report begin with what stands in for the device; that of hardware has no such line."""
    report = Report(device="npu", simulated="npu:Ascend910B3 (a title)")
    assert report.to_text().startswith("SIMULATED on host memory, not on hardware: npu:Ascend910B3")
    assert next(iter(report.as_dict())) == "simulated"
    assert "SIMULATED" not in Report(device="npu").to_text()
    assert "simulated" not in Report(device="npu").as_dict()


def test_the_list_shows_every_chip(capsys: pytest.CaptureFixture[str]) -> None:
    """llm-adapt simulate list: devices, chips, unknowns."""
    assert main(["simulate", "list"]) == 0
    text = capsys.readouterr().out
    assert all(model in text for name in simulators.SIMULATORS for model in simulators.parse(name).simulator.models)
    assert "unknown:" in text
