"""transformers' own tests run with llm_adapt through one environment variable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="run: pip install transformers==5.24.0")

BACKEND = "llm_adapt.cli.transformers_backend"


def run(code: str, **variables: str) -> Any:
    """What a process of its own prints as JSON."""
    environment = {**os.environ, "LLM_ADAPT_DEVICE": "cpu", **variables}
    command = [sys.executable, "-c", "import json, sys\n" + code]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def test_importing_the_module_patches() -> None:
    """The import alone is the call of patch(), with the settings of the environment."""
    code = f"""
import {BACKEND}
from llm_adapt import session
print(json.dumps([session.is_patched(), session.current_adapter().name]))
"""
    assert run(code) == [True, "cpu"]


def test_transformers_imports_it_before_a_model(tmp_path: Path) -> None:
    """TRANSFORMERS_TEST_BACKEND makes transformers.testing_utils patch: a model imported later is patched, and told."""
    code = """
import transformers.testing_utils
from transformers.models.llama import modeling_llama
print(json.dumps([hasattr(modeling_llama.LlamaMLP.forward, "__wrapped__"), transformers.testing_utils.torch_device]))
"""
    variables = {"TRANSFORMERS_TEST_DEVICE": "cpu", "LLM_ADAPT_OUT": str(tmp_path)}
    assert run(code, TRANSFORMERS_TEST_BACKEND=BACKEND, **variables) == [True, "cpu"]
    lines = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["choices"]
    applied = {line["subject"] for line in lines if line["choice"] == "applied"}
    assert "transformers.models.llama.modeling_llama:LlamaMLP.forward" in applied
    assert run(code, **variables) == [False, "cpu"]


def test_nothing_else_imports_it() -> None:
    """Every other module of the package can be imported and changes nothing: this one is named by users only."""
    package = Path(__file__).parents[3] / "llm_adapt"
    users = [path.name for path in package.rglob("*.py") if "transformers_backend" in path.read_text(encoding="utf-8")]
    assert users == ["transformers_backend.py"]


def test_suites_script_tells_fates_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed part fails its test, a test that was passed and is skipped or gone is lost, one that was not is told."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "scripts"))
    import transformers_suites as suites

    cases = """<testsuites><testsuite>
      <testcase classname="a.B" name="one"/><testcase classname="a.B" name="two"><skipped/></testcase>
      <testcase classname="a.B" name="three"><skipped/><failure/></testcase><testcase classname="a.B" name="four"/>
    </testsuite></testsuites>"""
    (tmp_path / "junit.xml").write_text(cases, encoding="utf-8")
    found = suites.fates(tmp_path / "junit.xml")
    assert found == {"B::one": "passed", "B::two": "skipped", "B::three": "failed", "B::four": "passed"}
    without = suites.Run(found, 1.0)
    patched = suites.Run({"B::one": "failed", "B::two": "passed", "B::three": "passed"}, 2.0, "note")
    assert suites.lost(without, patched) == ["B::four", "B::one"]
    assert [name for name, *_ in suites.changed(without, patched)] == ["B::four", "B::one", "B::three", "B::two"]
    assert suites.lost(without, without) == []
    text = suites.page(tmp_path, {"a": (without, patched)})
    assert "| a | 4 | 2 | 1 | 1 | 2 | 1 | 0 | 2 |" in text
    assert "`B::one`: passed without, failed with" in text


def test_suites_script_says_how_to_lay_the_tests_out(tmp_path: Path) -> None:
    """A folder without transformers' tests is an error that says what belongs there."""
    script = Path(__file__).parents[3] / "scripts" / "transformers_suites.py"
    command = [sys.executable, str(script), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"{tmp_path} has no tests of llama" in result.stderr
    assert "FOLDER/site" in result.stderr
