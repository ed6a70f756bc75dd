"""examples/report_progress.py: what the user sees of a run survives kills and resumes."""

import builtins
import importlib.util
import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def report_progress():
    """The companion module, loaded by its path."""
    spec = importlib.util.spec_from_file_location("example_report_progress", EXAMPLES / "report_progress.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(step: int, loss: float = 2.0) -> dict[str, float]:
    """What one training step hands to step_done."""
    return {"step": step, "loss": loss, "grad_norm": 1.0, "lr": 0.001}


def read_steps(out: Path) -> list[int]:
    """The steps in loss.jsonl."""
    return [json.loads(line)["step"] for line in (out / "loss.jsonl").read_text().splitlines()]


def test_lines_of_progress_have_loss_speed_and_time_left(report_progress, tmp_path, capsys):
    """The first step, every n-th and the last are printed."""
    progress = report_progress.Progress(tmp_path, True, (0, 10), tokens_per_step=100, print_every=4)
    for step in range(1, 11):
        progress.step_done(row(step))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0].split()[-1] for line in lines] == ["1", "4", "8", "10"]
    for words in ("loss 2.0000", "tokens/s", "left"):
        assert all(words in line for line in lines)
    assert "0:00 left" in lines[-1]


def test_resumed_run_continues_the_file(report_progress, tmp_path):
    """Steps beyond the checkpoint stand there once, though done twice; a torn last line is dropped."""
    first = report_progress.Progress(tmp_path, True, (0, 10), tokens_per_step=1, print_every=100)
    for step in range(1, 8):
        first.step_done(row(step))
    with (tmp_path / "loss.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    second = report_progress.Progress(tmp_path, True, (5, 10), tokens_per_step=1, print_every=100)
    for step in range(6, 11):
        second.step_done(row(step))
    assert read_steps(tmp_path) == list(range(1, 11))
    assert second.summary()["steps_this_run"] == 5
    assert second.summary()["step"] == 10


def test_new_run_starts_a_new_file(report_progress, tmp_path):
    """A run from step 0 does not continue an older curve that lies in the same folder."""
    (tmp_path / "loss.jsonl").write_text(json.dumps(row(1)) + "\n")
    report_progress.Progress(tmp_path, True, (0, 10), tokens_per_step=1, print_every=100)
    assert read_steps(tmp_path) == []


def test_other_ranks_write_and_print_nothing(report_progress, tmp_path, capsys):
    """They count steps, since the loop asks for them, and that is all."""
    out = tmp_path / "out"
    progress = report_progress.Progress(out, False, (0, 10), tokens_per_step=1, print_every=1)
    progress.step_done(row(1))
    progress.finish({"validation_loss": 1.0}, "text")
    assert progress.step == 1
    assert not out.exists()
    assert capsys.readouterr() == ("", "")


def test_finish_writes_summary_sample_and_picture(report_progress, tmp_path, capsys):
    """The results lie in one folder, and the last line says which."""
    pytest.importorskip("matplotlib")
    progress = report_progress.Progress(tmp_path, True, (0, 2), tokens_per_step=1, print_every=100)
    progress.step_done(row(1))
    progress.step_done(row(2, loss=1.5))
    progress.finish({**progress.summary(), "validation_loss": 1.7}, "def f():\n")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["training_loss"], summary["validation_loss"]) == (1.5, 1.7)
    assert (tmp_path / "sample.txt").read_text() == "def f():\n"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"in {tmp_path}: ")


def test_without_matplotlib_there_is_a_line_and_no_picture(report_progress, tmp_path, monkeypatch, capsys):
    """The picture is optional, and its absence is not silent."""
    original = builtins.__import__

    def without_matplotlib(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    report_progress.draw_curve([row(1)], 1.0, tmp_path / "loss.png")
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize(("seconds", "expected"), [(0, "0:00"), (59.7, "1:00"), (75, "1:15"), (3700, "1:01:40")])
def test_seconds_read_like_a_clock(report_progress, seconds, expected):
    """Minutes and seconds; hours where there are any."""
    assert report_progress.format_seconds(seconds) == expected
