"""What end_to_end.py writes: JSON, Markdown and a plot; and what it finds wrong."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["check", "write"]

_MARGIN = 0.02  # slower by so much counts as equal, beyond the interval


def check(record: dict[str, Any]) -> list[str]:
    """Modes that are slower than the first one beyond the interval, or whose losses differ."""
    problems = []
    for result in record["results"]:
        for mode, found in result["modes"].items():
            name = f"{result['model']} {result['dtype']} {mode}"
            if not found["losses_equal"]:
                problems.append(f"{name}: losses differ by {found['loss_difference']:.2g} from {result['base']}")
            if found["ratio"][2] * (1 + _MARGIN) < 1:
                problems.append(f"{name}: {found['ratio'][0]:.3f}x the speed of {result['base']}")
    return problems


def write(record: dict[str, Any], folder: Path) -> None:
    """end_to_end.json, end_to_end.md and, where matplotlib is installed, end_to_end.png."""
    (folder / "end_to_end.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "end_to_end.md").write_text(_markdown(record), encoding="utf-8")
    try:
        _plot(record, folder / "end_to_end.png")
    except ImportError as error:
        print(f"end_to_end: no plot: {error} (pip install llm-adapt[bench])", file=sys.stderr)


def _markdown(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "# Training steps with and without the operators",
        "",
        f"{record['device']}, {record['machine']}, {record['cores']} cores; {versions}; {record['date']}.",
        f"Command: `{record['command']}`.",
        "",
        "| model | dtype | mode | ms a step (95 %) | speed (95 %) | losses | peak MiB | served |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in record["results"]:
        for mode, found in result["modes"].items():
            median, low, high = (1e3 * value for value in found["step_s"])
            speed = f"{found['ratio'][0]:.3f}x ({found['ratio'][1]:.3f}-{found['ratio'][2]:.3f})"
            losses = f"{'equal' if found['losses_equal'] else 'DIFFER'} ({found['loss_difference']:.1e})"
            memory = f"{found['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in found else "-"
            cells = (result["model"], result["dtype"], mode, f"{median:.1f} ({low:.1f}-{high:.1f})", speed, losses,
                     memory, served(found.get("served", [])))  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Speed is relative to the first mode of the model; above 1 is faster.", ""])


def served(rows: list[dict[str, Any]]) -> str:
    """Op by library, with how often it was called."""
    calls: Counter[tuple[str, str]] = Counter()
    for row in rows:
        calls[row["op"], row["library"]] += row["calls"]
    return ", ".join(f"{op}: {library} ({number})" for (op, library), number in sorted(calls.items())) or "-"


def _plot(record: dict[str, Any], path: Path) -> None:
    """The speed of each mode with its interval, and the losses of all modes over one another."""
    from matplotlib.figure import Figure

    results = record["results"]
    figure = Figure(figsize=(11, 1.6 + 0.55 * sum(len(result["modes"]) for result in results)), layout="constrained")
    speeds, losses = figure.subplots(1, 2)
    labels = []
    for result in results:
        for mode, found in result["modes"].items():
            median, low, high = found["ratio"]
            speeds.errorbar([median], [len(labels)], xerr=[[median - low], [high - median]], fmt="o", capsize=3,
                            color={"on": "#0072B2", "liger": "#E69F00"}.get(mode, "#666666"))  # fmt: skip
            labels.append(f"{result['model']} {result['dtype']}, {mode}")
            style = "-" if mode == "on" else ":"
            losses.plot(found["losses"], style, label=labels[-1], linewidth=1 if mode == "on" else 2)
    speeds.axvline(1.0, color="black", linewidth=1)
    speeds.set_yticks(range(len(labels)), labels, fontsize=7)
    speeds.invert_yaxis()
    speeds.grid(axis="x", alpha=0.3)
    speeds.set_xlabel("speed relative to the first mode (right of 1: faster)")
    losses.set(xlabel="step", ylabel="loss")
    losses.legend(fontsize=6)
    figure.suptitle(f"Training steps on {record['device']}, {record['date'][:10]}", fontsize=9)
    figure.savefig(path, dpi=130)
