"""docs/transfer_to_npu.md from the evidence of compare_transfer.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["write"]

Row = Mapping[str, Any]
_TOP = """# transfer_to_npu and llm_adapt, on the same device

`from torch_npu.contrib import transfer_to_npu` is the vendor's way to run CUDA code on an Ascend NPU;
`llm_adapt.patch()` is ours. Here both meet the same {count} probes: a few lines that CUDA scripts
contain, with the outcome that they have on CUDA. Each probe runs in a process of its own. The device is the simulated
NPU of llm_adapt (real torch_npu over an emulated CANN, on host memory); no line of this page was run on hardware.

Versions: {versions}. transfer_to_npu runs as its import leaves it,
without further variables of its environment; `llm_adapt.patch(simulate="npu")` sets what it needs itself
(`TORCH_NPU_DEVICE_CAPABILITY`, among others).

The page is written by `python scripts/compare_transfer.py`, the evidence is `docs/evidence/transfer_to_npu.json`,
the probes are `scripts/transfer_probes/`. They were written beside the facade, with what was known of the gaps of
transfer_to_npu, and what they found wrong in the facade was mended before this page was made: the counts say what works
in each, not how often a script will meet it.

## As on CUDA

| group | probes | transfer_to_npu | llm_adapt |
|---|---|---|---|
{counts}

transfer_to_npu is right where llm_adapt is not: {behind}. Both are wrong: {both}.
"""
_WRONG = """
## What cannot be had without CUDA

Here llm_adapt does not answer as CUDA does.

| probe | on CUDA | transfer_to_npu | llm_adapt | why |
|---|---|---|---|---|
"""
_DIFFERENT = """
## Where transfer_to_npu differs from CUDA and llm_adapt does not

"as on CUDA" is left out: in all of these llm_adapt gives the value of the second column.
"""
_RIGHT_CELL = "as on CUDA"


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Write the page.

    Args:
        path: of the page.
        data: the evidence: "versions", and "probes" with what was seen under both sides.
    """
    rows: list[Row] = data["probes"]
    behind = sum(row["transfer"]["ok"] and not row["facade"]["ok"] for row in rows)
    both = sum(not row["transfer"]["ok"] and not row["facade"]["ok"] for row in rows)
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    text = _TOP.format(count=len(rows), versions=versions, counts=_counts(rows), behind=behind, both=both)
    wrong = [row for row in rows if not row["facade"]["ok"]]
    text += _WRONG + "".join(_line(row, *_sides(row), row["limit"] or "open") for row in wrong)
    text += _DIFFERENT
    different = [row for row in rows if row["facade"]["ok"] and not row["transfer"]["ok"]]
    for group in dict.fromkeys(row["group"] for row in different):
        text += f"\n### {group}\n\n| probe | on CUDA | transfer_to_npu |\n|---|---|---|\n"
        text += "".join(_line(row, _cell(row["transfer"])) for row in different if row["group"] == group)
    path.write_text(text, encoding="utf-8")


def _counts(rows: Sequence[Row]) -> str:
    groups = [*dict.fromkeys(row["group"] for row in rows)]
    lines = [_count(group, [row for row in rows if row["group"] == group]) for group in groups]
    return "\n".join([*lines, _count("**all**", rows)])


def _count(title: str, rows: Iterable[Row]) -> str:
    rows = list(rows)
    right = [sum(row[side]["ok"] for row in rows) for side in ("transfer", "facade")]
    return f"| {title} | {len(rows)} | {right[0]} | {right[1]} |"


def _line(row: Row, *cells: str) -> str:
    """One row of a table: the probe, what CUDA does, then these cells."""
    lines = [f"(before the patch) {line}" for line in row["before"].splitlines()] + row["code"].strip().splitlines()
    probe = "<br>".join(_code(line) for line in lines)
    return "| " + " | ".join([probe, _code(row["expected"]), *cells]) + " |\n"


def _sides(row: Row) -> tuple[str, str]:
    return _cell(row["transfer"]), _cell(row["facade"])


def _cell(outcome: Row) -> str:
    return _RIGHT_CELL if outcome["ok"] else _code(outcome["seen"])


def _code(text: str) -> str:
    """As code in a cell of a table, indented as it was."""
    bare = text.lstrip()
    shown = bare.replace("|", "\\|")
    fence = "``" if "`" in shown else "`"
    return "&nbsp;" * (len(text) - len(bare)) + fence + shown + fence
