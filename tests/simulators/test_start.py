"""Asking for a simulator: what is refused before anything is compiled, and what the report says afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import llm_adapt
from llm_adapt import simulators
from llm_adapt.cli.main import main
from llm_adapt.errors import SettingsError
from llm_adapt.report import Report
from llm_adapt.simulators import SimulatorError, toolchain
from llm_adapt.simulators.base import Library, Simulator, Toolchain
from llm_adapt.simulators.build import build, built_folder
from llm_adapt.simulators.toolchain import find_toolchain, plugin_folder

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


def test_without_the_headers_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Python.h: where it was looked for, and how to install it."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(SimulatorError, match=rf"{tmp_path}/Python\.h is not there.*apt install python3-dev"):
        find_toolchain(NPU, print)


def put_wheel(folder: Path, version: str) -> None:
    """What pip makes of a wheel of torch_npu, as far as the simulator looks at it."""
    (folder / "torch_npu").mkdir(parents=True)
    (folder / f"torch_npu-{version}.dist-info").mkdir()
    (folder / f"torch_npu-{version}.dist-info/METADATA").write_text(f"Name: torch_npu\nVersion: {version}\n")


def test_another_wheel_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel that was copied into the cache by hand must be the one that the simulator was made for."""
    monkeypatch.setenv("LLM_ADAPT_CACHE", str(tmp_path))
    put_wheel(plugin_folder(NPU), "2.12.0")
    with pytest.raises(SimulatorError, match=r"torch_npu==2\.13\.0, and .* has 2\.12\.0\. Delete the folder"):
        find_toolchain(NPU, print)


def test_ranks_that_start_together_fetch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first fetches the wheel; the others wait for it and take it."""
    monkeypatch.setenv("LLM_ADAPT_CACHE", str(tmp_path))
    fetched: list[Path] = []

    def fetch(simulator: Simulator, folder: Path, say: object) -> None:
        fetched.append(folder)
        time.sleep(0.2)
        put_wheel(folder, "2.13.0")

    monkeypatch.setattr(toolchain, "_fetch", fetch)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda _: find_toolchain(NPU, lambda line: None).plugin, range(3)))
    assert found == [plugin_folder(NPU) / "torch_npu"] * 3
    assert len(fetched) == 1


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


def test_what_a_killed_build_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a build that was killed goes when the same is built again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    simulator = toy(tmp_path, "int one() { return 1; }")
    left = built_folder(simulator, a_toolchain()).with_suffix(".4711")
    left.mkdir(parents=True)
    assert build(simulator, a_toolchain(), lambda line: None).is_dir()
    assert not left.exists()


def test_each_environment_has_its_own(tmp_path: Path) -> None:
    """The libraries hold the path of the torch that they load: another environment's torch has others."""
    simulator, here = toy(tmp_path, "int one() { return 1; }"), a_toolchain()
    assert built_folder(simulator, here) == built_folder(simulator, a_toolchain())
    assert built_folder(simulator, here) != built_folder(simulator, replace(here, torch=tmp_path / "torch"))


def test_machines_that_share_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home directory may be shared by x86 and Arm hosts with the same versions of everything."""
    simulator, here = toy(tmp_path, "int one() { return 1; }"), a_toolchain()
    folders = set()
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        folders |= {built_folder(simulator, here), plugin_folder(NPU)}
    assert len(folders) == 4
    monkeypatch.setattr(sys.implementation, "cache_tag", "cpython-399")
    assert plugin_folder(NPU) not in folders


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal names the folder and the variable that names another."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLM_ADAPT_CACHE", str(tmp_path / "file"))
    simulator = toy(tmp_path, "int one() { return 1; }")
    with pytest.raises(SimulatorError, match=r"was to be built in .*file/simulators; .*LLM_ADAPT_CACHE"):
        build(simulator, a_toolchain(), lambda line: None)
    with pytest.raises(SimulatorError, match=r"was to be fetched into .*LLM_ADAPT_CACHE"):
        find_toolchain(NPU, lambda line: None)


def test_a_failed_build_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's own error, the file with the rest, and no folder that looks finished."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(SimulatorError, match=r"error.*\n.*build-failure\.txt") as caught:
        build(toy(tmp_path, "int one() { return nothing; }"), a_toolchain(), lambda line: None)
    assert "nothing" in str(caught.value)
    left = [path.name for path in (tmp_path / "cache/llm_adapt/simulators").iterdir() if path.is_dir()]
    assert left == ["objects"]


@pytest.mark.parametrize(
    ("name", "value"), [("NPU_SIM_HBM_GB", "abc"), ("NPU_SIM_HBM_GB", "0"), ("NPU_SIM_DEVICES", "17")]
)
def test_a_size_that_is_none_is_refused(name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of the simulator that is no number in its range is an error, not another number."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SimulatorError, match=f"{name}='{value}' was set; accepted: a number from"):
        NPU.enter(tmp_path, "Ascend910B3")


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
