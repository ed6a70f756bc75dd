"""benchmarks/*.py: what they judge and write, with figures given; and docs/benchmarks.md says what the code says."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llm_adapt.cli.bench.counterparts import WITHOUT, eager_of
from llm_adapt.cli.bench.counts import FORMULAS
from llm_adapt.ops.dispatch.registry import op_names

ROOT = Path(__file__).parents[2]


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of benchmarks/, which Python finds beside the script that it runs."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def steps(factor: float = 1.0, losses: tuple[float, ...] = (5.0, 4.0)) -> dict[str, Any]:
    """What a mode answered: eight steps, so many times as long."""
    seconds = [factor * (0.1 + 0.001 * (place % 3)) for place in range(8)]
    served = [{"op": "glu", "library": "lib", "calls": 12}]
    return {"losses": list(losses), "seconds": seconds, "peak_bytes": 2**20, "served": served}


def record_of(end_to_end: ModuleType, modes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The record of one model."""
    result = {"model": "llama", "dtype": "float32", "tokens": 512} | end_to_end.summary(modes, "float32")
    facts = {
        "device": "cpu",
        "machine": "m",
        "cores": 2,
        "versions": {"torch": "2"},
        "date": "2026-01-01",
        "command": "c",
    }
    return facts | {"results": [result]}


def test_equal_modes_are_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modes of one speed and one loss pass, and JSON, Markdown and the plot are written."""
    end_to_end, report = (script(name, monkeypatch) for name in ("end_to_end", "end_to_end_report"))
    record = record_of(end_to_end, {"off": steps(), "on": steps(0.5)})
    assert report.check(record) == []
    report.write(record, tmp_path)
    assert json.loads((tmp_path / "end_to_end.json").read_text())["results"][0]["modes"]["on"]["ratio"][0] == 2.0
    assert "2.000x (2.000-2.000) | equal (0.0e+00) | 1 | glu: lib (12) |" in (tmp_path / "end_to_end.md").read_text()
    assert (tmp_path / "end_to_end.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("mode", "problem"),
    [
        (steps(1.2), "llama float32 on: 0.833x the speed of off"),
        (steps(losses=(5.0, 4.1)), "llama float32 on: losses differ by 0.025 from off"),
    ],
)
def test_a_slower_mode_and_other_losses(mode: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are found, with the figure."""
    end_to_end, report = (script(name, monkeypatch) for name in ("end_to_end", "end_to_end_report"))
    assert report.check(record_of(end_to_end, {"off": steps(), "on": mode})) == [problem]


def test_a_process_that_ends_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last lines of its standard error are in the exception; nothing is left running."""
    end_to_end = script("end_to_end", monkeypatch)
    args = end_to_end.parse(["--out", ".", "--modes", "on", "--device", "tpu", "--dtype", "float32"])
    with pytest.raises(RuntimeError, match=r"Device 'tpu'|'tpu'"):
        end_to_end.compare_modes(args, "llama", "float32")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "gpt5"), "gpt5 was asked; there are llama, mistral, mixtral, job"),
        (("--modes", "fast"), "fast was asked; there are unpatched, off, on, liger"),
        (("--out", "file/folder"), "cannot be written"),
    ],
)
def test_wrong_options(
    words: tuple[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The parser says what there is."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        script("end_to_end", monkeypatch).parse(["--out", str(tmp_path), *words])
    assert message in capsys.readouterr().err


def test_startup_subtracts_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe costs the import with patch() less the same import without, in the same round."""
    startup = script("startup", monkeypatch)
    asked = []

    def run(before: str, act: str) -> float:
        asked.append(before)
        return {"with": 30.0, "without": 20.0}[before]

    case = startup.Case("probe", "with", "import model", 50.0, "without")
    assert startup.measure(case, 2, run) == [10.0, 10.0]
    assert asked == ["with", "without", "with", "without", "with"]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        startup.run("", "1 / 0")


def test_ops_py_is_the_command() -> None:
    """benchmarks/ops.py lists what `llm-adapt bench` lists."""
    command = [sys.executable, str(ROOT / "benchmarks" / "ops.py"), "--list", "--only", "z_loss", "--device", "cpu"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "router_z_loss  DeepSeek-V3" in said


def test_the_table_of_counts_is_the_code() -> None:
    """docs/benchmarks.md has a row for each op: its operations, and what eager is."""
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name in op_names():
        sources = "; ".join(kernel.source for kernel in eager_of(name)) or f"none: {WITHOUT[name]}"
        assert f"| `{name}` | {FORMULAS[name].words} | {sources} |" in text


@pytest.mark.slow
def test_a_quick_run_of_training_steps(tmp_path: Path) -> None:
    """Real processes make steps: losses are equal, and the results have all modes."""
    words = ["--quick", "--tokens", "32", "--rounds", "2", "--dtype", "float32", "--out", str(tmp_path)]
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "end_to_end.py"), *words], check=True, cwd=ROOT)
    (result,) = json.loads((tmp_path / "end_to_end.json").read_text())["results"]
    assert list(result["modes"]) == ["unpatched", "off", "on"]
    assert {found["losses_equal"] for found in result["modes"].values()} == {True}
    assert {len(found["losses"]) for found in result["modes"].values()} == {6}
    assert "glu" in {row["op"] for row in result["modes"]["on"]["served"]}
