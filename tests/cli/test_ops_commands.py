"""llm-adapt ops, explain and diff: what they say of this machine, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_adapt
from llm_adapt.cli.main import main
from llm_adapt.ops.dispatch.registry import all_ops
from llm_adapt.ops.rms_norm import rms_norm

Capture = pytest.CaptureFixture[str]


def output(capsys: Capture, *arguments: str, code: int = 0) -> str:
    """What a command prints; its exit code is asserted."""
    assert main(list(arguments)) == code
    return capsys.readouterr().out


def answer(capsys: Capture, *arguments: str, code: int = 0) -> Any:
    """What a command prints as JSON."""
    return json.loads(output(capsys, *arguments, "--json", code=code))


def test_ops_has_a_row_for_every_op_and_dtype(capsys: Capture) -> None:
    """Every op is there in both dtypes, with who serves it and what the others say."""
    rows = answer(capsys, "ops", "--device", "cpu")
    assert {(row["op"], row["dtype"]) for row in rows} >= {
        (name, dtype) for name in all_ops() for dtype in ("float32", "bfloat16")
    }
    (found,) = [row for row in rows if (row["op"], row["dtype"]) == ("rms_norm", "float32")]
    assert found["serves"] == "openmp"
    assert found["libraries"]["openmp"]["answer"] == "serves"
    assert "gradient of x" in found["libraries"]["openmp"]["proof"]
    assert not llm_adapt.is_patched()


def test_ops_under_a_policy(capsys: Capture) -> None:
    """The table shows what a policy makes of this machine."""
    text = output(capsys, "ops", "--device", "cpu", "--ops=-torch_native,-openmp", "--dtype", "fp32")
    lines = [line for line in text.splitlines() if " rms_norm " in line]
    assert len(lines) == 1
    assert "reference" in lines[0]
    assert "torch_native: denied by the policy" in lines[0]


def test_explain_says_who_and_why(capsys: Capture) -> None:
    """Each library answers for the call: it serves, it comes later, or why it does not; with the proof's errors."""
    text = output(capsys, "explain", "rms_norm", "--device", "cpu", "--dtype", "bf16", "--shape", "8,16,64")
    assert "rms_norm(x bfloat16[8x16x64], weight bfloat16[64]" in text
    found = answer(capsys, "explain", "rms_norm", "--device", "cpu", "--option", "form=one_plus", "--ops=-openmp")
    assert found["serves"] == "reference"
    assert "form" in found["libraries"]["torch_native"]["answer"]
    assert found["call"].startswith("rms_norm(x float32[")


def test_a_choice_that_cannot_serve(capsys: Capture) -> None:
    """An explicit choice never falls back: nothing serves, the table says why, and the exit code is 1."""
    found = answer(capsys, "explain", "rms_norm", "--device", "cpu", "--ops", "rms_norm=chunked", code=1)
    assert (found["serves"], found["libraries"]["chunked"]["answer"]) == ("nothing", "has no kernel of this op")
    text = output(capsys, "ops", "--device", "cpu", "--ops", "rms_norm=chunked", "--dtype", "fp32")
    assert [line.split()[2] for line in text.splitlines() if " rms_norm " in line] == ["nothing"]


def test_explain_in_inference_mode(capsys: Capture) -> None:
    """The call is explained as it would be inside torch.inference_mode()."""
    found = answer(capsys, "explain", "rms_norm", "--device", "cpu", "--inference")
    assert found["serves"] == "openmp"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "rms_nrm"), "did you mean rms_norm"),
        (("explain", "rms_norm", "--dtype", "int8"), "pass float32, bfloat16, float16 or float64"),
        (("explain", "rms_norm", "--option", "frm=1"), "rms_norm has the options eps, form"),
        (("explain", "rms_norm", "--option", "form"), "Write NAME=VALUE"),
        (("explain", "rms_norm", "--device", "tpu"), "tpu"),
        (("explain", "rms_norm", "--option", "form=none"), "form='none' was asked; pass one of standard"),
        (("explain", "attention", "--option", "causal=yes"), "causal='yes'"),
        (("explain", "attention", "--option", "window_left=abc"), "a call that attention does not take"),
        (("explain", "attention", "--shape", "4,4"), "it does not fit"),
        (("explain", "rms_norm", "--shape", "1000000,100000000"), "it does not fit"),
        (("ops", "--ops", "rms_norm=torch_nativ"), "did you mean torch_native"),
        (("ops", "--dtype", "float99"), "pass float32"),
        (("diff", "a.json", "b.json"), "cannot be read as a report"),
    ],
)
def test_what_is_refused(
    arguments: tuple[str, ...], message: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong call is one error on one screen, exit code 78, and nothing stays patched."""
    monkeypatch.chdir(tmp_path)
    assert main(list(arguments)) == 78
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) < 12
    assert not llm_adapt.is_patched()


@pytest.mark.parametrize("shape", ["", "8,x", "-1,4", "a"])
def test_a_shape_that_is_none(shape: str, capsys: Capture) -> None:
    """The parser says what a shape looks like."""
    with pytest.raises(SystemExit, match="2"):
        main(["explain", "rms_norm", f"--shape={shape}"])
    assert "is not a list of sizes such as 8,1024,4096" in capsys.readouterr().err


def report(folder: Path, **arguments: Any) -> Path:
    """The report of a session that made one call."""
    with llm_adapt.patched(device="cpu", out=folder, **arguments):
        rms_norm(torch.ones(2, 4), torch.ones(4))
    return folder / "report.json"


def test_diff_of_equal_reports(capsys: Capture, tmp_path: Path) -> None:
    """Two runs that chose the same do not differ, however often they called."""
    paths = [str(report(tmp_path / name)) for name in ("a", "b")]
    assert "made the same choices" in output(capsys, "diff", *paths)
    assert answer(capsys, "diff", *paths) == []


def test_diff_of_reports_that_differ(capsys: Capture, tmp_path: Path) -> None:
    """Another kernel and another policy are shown with both choices; the exit code is 1."""
    first, second = str(report(tmp_path / "a")), str(report(tmp_path / "b", ops="rms_norm=reference"))
    rows = answer(capsys, "diff", first, second, code=1)
    assert {(row["part"], row["subject"], row["first"], row["second"]) for row in rows} >= {
        ("op", "rms_norm float32", "openmp", "reference")
    }
    assert "rms_norm=reference" in output(capsys, "diff", first, second, code=1)


def test_a_file_that_is_no_report(capsys: Capture, tmp_path: Path) -> None:
    """JSON that is no report is refused, with how to get one."""
    path = tmp_path / "x.json"
    path.write_text("[]")
    assert main(["diff", str(path), str(path)]) == 78
    assert "llm-adapt run --out DIR writes one" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["ops", "explain", "diff", "bench"])
def test_help(command: str, capsys: Capture) -> None:
    """Each command has examples in its help."""
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"llm-adapt {command} " in capsys.readouterr().out.partition("examples:")[2]
