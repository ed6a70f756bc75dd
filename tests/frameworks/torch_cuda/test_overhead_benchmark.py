"""benchmarks/overhead.py measures, prints a table, writes JSON, and says by its exit code whether goals are met."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import llm_adapt

PATH = Path(__file__).parents[3] / "benchmarks" / "overhead.py"


@pytest.fixture
def overhead() -> Any:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("overhead", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["overhead"] = module
    spec.loader.exec_module(module)
    return module


def test_a_run(overhead: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of one case prints its row and writes its figures with versions and date; nothing stays patched."""
    code = overhead.main(["--rounds", "1", "--only", "Tensor.view", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert code == 0
    assert "ok: the same object" in capsys.readouterr().out
    assert [row["case"]["name"] for row in found["results"]] == ["Tensor.view"]
    assert found["results"][0]["plain_us"] > 0
    assert {"torch", "python", "llm_adapt"} == set(found["versions"])
    assert found["date"].startswith("20")
    assert not llm_adapt.session.is_patched()


def test_a_missed_goal(overhead: Any) -> None:
    """A goal is missed when more is added, or when an op that must be untouched is another object."""
    case = overhead.Case("x", "x", "x", goal_us=0.3)
    assert overhead.Result(case, 1.0, 1.2, True).verdict == "ok"
    assert overhead.Result(case, 1.0, 1.4, True).verdict == "MISSED"
    untouched = overhead.Case("x", "x", "x", goal_us=0.0, untouched="torch.add")
    assert overhead.Result(untouched, 1.0, 9.0, True).verdict == "ok: the same object"
    assert overhead.Result(untouched, 1.0, 1.0, False).verdict == "MISSED: another object"


def test_wrapped_functions_are_seen(overhead: Any) -> None:
    """A function that the facade does wrap fails the check for untouched ones."""
    case = overhead.Case("zeros", "torch.zeros(1)", "torch.zeros(1)", untouched="torch.zeros")
    (result,) = overhead.measure([case], rounds=1)
    assert result.verdict == "MISSED: another object"


def test_the_goals_are_those_promised(overhead: Any) -> None:
    """+0.3 us for Tensor.to and current_device, +1.5 us for factories, nothing for ops without a device."""
    goals = {case.name: case.goal_us for case in overhead.CASES}
    assert goals['Tensor.to("cuda")'] == goals["torch.cuda.current_device()"] == 0.3
    assert goals['zeros(device="cuda")'] == goals['new_zeros(device="cuda")'] == 1.5
    assert {case.goal_us for case in overhead.CASES if case.untouched} == {0.0}


def test_help(overhead: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """--help shows examples."""
    with pytest.raises(SystemExit) as stop:
        overhead.main(["--help"])
    assert stop.value.code == 0
    assert "python benchmarks/overhead.py --json overhead.json" in capsys.readouterr().out
