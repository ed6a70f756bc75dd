"""Report: lines, text and JSON."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import pytest

from llm_adapt.report import Line, Report


def filled() -> Report:
    """A report with one line of each kind."""
    report = Report(device="cpu", versions={"torch": "2.13.0", "numpy": "absent"})
    report.add("device", "cpu", "CPU", "no accelerator found")
    report.sources.append(
        lambda: [
            Line("patch", "torch:zeros", "applied", "takes a device"),
            Line("patch", "torch:ones", "applied", "takes a device"),
            Line("patch", "torch.nn:Module.to", "applied", "takes a device"),
            Line("patch", "megatron.core.jit:jit_fuser", "waiting", "not imported yet", "waiting"),
            Line("patch", "m:gone", "skipped", "m has no gone", "skipped"),
        ]
    )
    return report


def test_text_has_a_line_for_each_choice_and_counts_patches() -> None:
    """Applied and waiting rows are counted per module; everything else has its own line with its reason."""
    assert str(filled()).splitlines() == [
        "llm_adapt on cpu",
        "  torch 2.13.0",
        "  numpy absent",
        "  [ok] device: cpu: CPU - no accelerator found",
        "  [skipped] patch: m:gone: skipped - m has no gone",
        "     2 names in torch (applied)",
        "     1 name  in torch.nn (applied)",
        "     1 name  in megatron.core.jit (waiting)",
    ]


def test_json_has_everything() -> None:
    """The JSON holds device, versions and every choice with its reason and status."""
    data = json.loads(filled().to_json())
    assert (data["device"], data["versions"]) == ("cpu", {"torch": "2.13.0", "numpy": "absent"})
    assert data["choices"][0] == {
        "section": "device",
        "subject": "cpu",
        "choice": "CPU",
        "reason": "no accelerator found",
        "status": "ok",
    }
    assert len(data["choices"]) == 6


def test_lines_show_the_present_state() -> None:
    """A source is asked at each look: what was waiting is applied when it has been applied."""
    report, state = Report(), ["waiting"]
    report.add("device", "cpu", "CPU", "why")
    report.sources.append(lambda: [Line("patch", "m:f", state[0], "why")])
    assert [line.choice for line in report.lines] == ["CPU", "waiting"]
    state[0] = "applied"
    assert [line.choice for line in report.lines] == ["CPU", "applied"]
    report.add("effect", "pin_memory", "no effect", "why")
    assert [line.choice for line in report.lines] == ["CPU", "no effect", "applied"]


def test_once_is_once(caplog: pytest.LogCaptureFixture) -> None:
    """An effect is recorded and logged at its first use only; another effect of the same subject is another."""
    caplog.set_level(logging.INFO)
    report = Report()
    for choice in ("no effect", "no effect", "left out", "no effect"):
        report.once("pin_memory", choice, "host memory")
    assert [(line.section, line.choice) for line in report.lines] == [("effect", "no effect"), ("effect", "left out")]
    assert caplog.text.count("pin_memory") == 2


def test_once_is_once_in_threads() -> None:
    """Threads that meet at a first use record one line."""
    for _ in range(20):
        report, start = Report(), threading.Barrier(8)

        def use(report: Report = report, start: threading.Barrier = start) -> None:
            start.wait(30)
            report.once("pin_memory", "no effect", "host memory")

        threads = [threading.Thread(target=use) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(report.lines) == 1


def test_save_makes_the_folder_and_leaves_no_half_file(tmp_path: Path) -> None:
    """The file is there in full or not at all; a second save replaces it."""
    path = tmp_path / "deep" / "er" / "report.json"
    report = filled()
    report.save(path)
    report.add("effect", "x", "y", "z")
    report.save(path)
    assert json.loads(path.read_text()) == json.loads(report.to_json())
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def test_a_save_that_fails_keeps_the_last_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When writing fails in the middle, the report of before is still the report."""
    path, report = tmp_path / "report.json", filled()
    report.save(path)
    before = path.read_text()

    def fail(self: Path, text: str, encoding: str) -> int:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        report.save(path)
    assert path.read_text() == before
