"""llm-adapt diff: what two reports chose differently."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm_adapt.cli import render
from llm_adapt.errors import SettingsError

__all__ = ["add_parser", "differences", "run_diff"]

_EXAMPLES = """examples:
  llm-adapt diff runs/gpu/report.json runs/npu/report.json     two devices
  llm-adapt diff good/report.json bad/report.json --json       for a script

exit codes: 0 the same choices, 1 they differ, 78 a file cannot be read
"""
_SAME = {"waiting": "applied"}
_COLUMNS = ("part", "subject", "first", "second")


def add_parser(subparsers: Any) -> None:
    """Add the command to the subparsers of `llm-adapt`."""
    parser = subparsers.add_parser(
        "diff",
        help="what two reports chose differently",
        description="Compare two report.json files: device, versions, which kernel served which op, other choices.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", type=Path, help="a report.json")
    parser.add_argument("second", type=Path, help="another report.json")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=run_diff)


def run_diff(args: argparse.Namespace) -> int:
    """Run the command; 1 when the reports differ."""
    found = differences(_read(args.first), _read(args.second))
    if args.json:
        print(json.dumps([dict(zip(_COLUMNS, row, strict=True)) for row in found], indent=2))
    elif found:
        render.table(f"{args.first} and {args.second} differ", _COLUMNS, found)
    else:
        render.heading(f"{args.first} and {args.second} made the same choices")
    return int(bool(found))


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (part, subject, first, second) for everything that the two reports chose differently.

    Numbers of calls and errors of proofs are no choices; a kernel that was quarantined is.
    """
    rows = [("device", "", first["device"], second["device"])]
    rows += _compared("version", first["versions"], second["versions"])
    rows += _compared("variable", *(_variables(report) for report in (first, second)))
    rows += _compared("op", _served(first.get("ops", ())), _served(second.get("ops", ())))
    rows += _compared("choice", _choices(first["choices"]), _choices(second["choices"]))
    return [row for row in rows if row[2] != row[3]]


def _compared(part: str, first: dict[str, str], second: dict[str, str]) -> list[tuple[str, str, str, str]]:
    return [(part, name, first.get(name, "-"), second.get(name, "-")) for name in sorted(first.keys() | second.keys())]


def _variables(report: dict[str, Any]) -> dict[str, str]:
    """Environment variables, less those that name where reports go and differ by purpose."""
    return {name: value for name, value in report.get("environment", {}).items() if name != "LLM_ADAPT_OUT"}


def _served(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Op, variant, dtype and layer -> the libraries that served it, with what was quarantined."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        name = " ".join(part for part in (row["op"], row["variant"], row["dtype"], row["layer"]) if part)
        quarantined = "".join(f" ({library} quarantined)" for library in row.get("quarantine", ()))
        found.setdefault(name, {})[row["library"] + quarantined] = None
    return {name: ", ".join(sorted(libraries)) for name, libraries in found.items()}


def _choices(lines: Iterable[dict[str, str]]) -> dict[str, str]:
    """The other choices: what was patched, what has no effect. Ops have rows of their own.

    A row that waits for a module is as good as applied: which modules a script has imported is no choice.
    """
    kept = (line for line in lines if line["section"] not in ("op", "device"))
    return {f"{line['section']}: {line['subject']}": _SAME.get(line["choice"], line["choice"]) for line in kept}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not {"device", "versions", "choices"} <= found.keys():
            raise ValueError("it has not the parts of a report")
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"diff {path} was asked; it cannot be read as a report: {error}. llm-adapt run --out DIR writes one."
        ) from None
    return found
