"""The Markdown page of an OpInfo sweep."""

from __future__ import annotations

from collections import Counter
from typing import Any

COLUMNS = ("forward", "gradient", "in place", "out=", "bfloat16")
OUTCOMES = ("pass", "deviates", "refused", "crashed", "no sample")


def page(record: dict[str, Any]) -> str:
    """Counts, deviations with their reasons, and the operators that the device leaves to the CPU."""
    device = record["device"]
    lines = [
        f"# OpInfo on the simulated {device}",
        "",
        f"Written by `python scripts/sweep_opinfo.py --simulate {device} --samples {record['samples']}`: every",
        "operator of torch's OpInfo database on the simulated device against the CPU. It is evidence of the plumbing",
        "(arguments, views, memory, autograd), not of what real kernels support or how accurate they are.",
        "",
        "## Counts",
        "",
        *_counts(record["operators"]),
        "",
        'A column counts the operators that have it. "out=" gives results that must grow and results with strides.',
        "",
        "## Deviations",
        "",
        *_deviations(record["operators"]),
        "",
        "## Left to the CPU",
        "",
        *_fallbacks(record["fallbacks"]),
    ]
    return "\n".join(lines) + "\n"


def _counts(operators: dict[str, Any]) -> list[str]:
    counts = {
        column: Counter(columns[column]["outcome"] for columns in operators.values() if column in columns)
        for column in COLUMNS
    }
    lines = [f"| | {' | '.join(OUTCOMES)} | operators |", "|---" * (len(OUTCOMES) + 2) + "|"]
    for column, count in counts.items():
        numbers = " | ".join(str(count[outcome]) for outcome in OUTCOMES)
        lines.append(f"| {column} | {numbers} | {sum(count.values())} |")
    return lines


def _deviations(operators: dict[str, Any]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name, columns in operators.items():
        for column, finding in columns.items():
            if finding["outcome"] not in ("pass", "no sample"):
                reason = finding.get("reason", "UNEXPECTED")
                row = f"| {name} | {column} | {finding['outcome']} | {_cell(finding['text'])} |"
                groups.setdefault(reason, []).append(row)
    lines: list[str] = []
    for reason in sorted(groups, key=lambda one: (one != "UNEXPECTED", -len(groups[one]), one)):
        head = ["", f"**{reason}**", "", "| operator | column | outcome | found |", "|---|---|---|---|"]
        lines += head + groups[reason]
    return lines[1:] or ["None."]


def _cell(text: str) -> str:
    return text[:160].replace("|", "\\|").replace("<", "&lt;")


def _fallbacks(fallbacks: dict[str, list[str]]) -> list[str]:
    if not fallbacks:
        return ["None were counted."]
    lines = [
        f"{len(fallbacks)} operators have no kernel on the device. Its plug-in computes them on the CPU, slowly and",
        "with a warning, on real hardware too.",
        "",
        "| aten operator | used by |",
        "|---|---|",
    ]
    for operator, users in fallbacks.items():
        shown = ", ".join(users[:4]) + (f" and {len(users) - 4} more" if len(users) > 4 else "")
        lines.append(f"| {operator} | {shown} |")
    return lines
