"""llm-adapt doctor: what this machine has, what would be chosen and why, what is broken and its mend."""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

from llm_adapt.adapters import Finding, Host
from llm_adapt.cli import render
from llm_adapt.cli.doctor_checks import EXIT_CODES, Diagnosis, examine
from llm_adapt.cli.doctor_start import start

__all__ = ["add_parser", "run_doctor"]

_DESCRIPTION = """\
Say what this machine has, which device would be chosen and why, what is broken and how to mend it.
The doctor itself does not import torch; a child process tries it, so that a crash can be explained.
"""

_EXIT_CODES = "exit codes (the most severe finding decides; 2 is a usage error):\n   0  all well\n" + "\n".join(
    f"  {code:>2}  {kind.value}" for kind, code in EXIT_CODES.items() if code
)

_EXAMPLES = """
examples:
  llm-adapt doctor                          look, try torch, explain
  llm-adapt doctor --device npu             the same for a device of your choice
  llm-adapt doctor --no-start               look only: no child process, well under a second
  llm-adapt doctor --json > doctor.json     for a bug report or a script
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the subparsers of `llm-adapt`."""
    parser = subparsers.add_parser(
        "doctor",
        help="what this machine has, what would be chosen, what is broken",
        description=_DESCRIPTION,
        epilog=f"{_EXIT_CODES}\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", metavar="NAME", help="diagnose as if this device was asked for")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-start", action="store_true", help="do not start torch in a child process")
    parser.add_argument(
        "--timeout", type=_seconds, default=180.0, metavar="S", help="seconds torch may take to start (180)"
    )
    parser.set_defaults(func=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    """Run the command; the exit code is that of the most severe finding."""
    host = Host()
    try_torch = None if args.no_start else partial(start, timeout_s=args.timeout, environ=host.environ)
    diagnosis = examine(host, args.device, try_torch)
    if args.json:
        print(json.dumps(as_json(diagnosis), indent=2))
    else:
        _print(diagnosis)
    return diagnosis.exit_code


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < 86400:
        raise argparse.ArgumentTypeError("must be above 0 and below a day")
    return number


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Write a diagnosis as JSON values; `format` counts incompatible changes."""
    chosen = diagnosis.detection
    return {
        "format": 1,
        "requested": diagnosis.requested,
        "chosen": chosen.adapter.name if chosen else None,
        "reason": chosen.reason if chosen else None,
        "devices": [
            {"name": name, "found": probe.found, "masked": probe.masked, "reason": probe.reason}
            for name, probe in diagnosis.probes
        ],
        "versions": diagnosis.versions,
        "starts": [
            {"act": one.act, "ok": one.finding is None, "seconds": one.seconds, "lines": list(one.lines)}
            for one in diagnosis.starts
        ],
        "findings": [
            {
                "kind": found.kind.name.lower(),
                "exit_code": EXIT_CODES[found.kind],
                "device": found.device or None,
                "what": found.what,
                "mend": found.mend,
            }
            for found in diagnosis.findings
        ],
        "exit_code": diagnosis.exit_code,
    }


def _print(diagnosis: Diagnosis) -> None:
    rows = [(name, _state(probe.found, probe.masked), probe.reason) for name, probe in diagnosis.probes]
    render.table("Devices", ("name", "here", "evidence"), rows)
    chosen = diagnosis.detection
    render.heading(f"Chosen: {chosen.adapter.name} ({chosen.adapter.title})" if chosen else "Chosen: none")
    if chosen:
        render.paragraph(chosen.reason, indent=2)
    render.heading("Versions: " + (", ".join(f"{name} {found}" for name, found in diagnosis.versions.items()) or "-"))
    for one in diagnosis.starts:
        render.heading(f"Tried: {one.act}: {'fails' if one.finding else 'starts'} ({one.seconds:g} s)")
    render.heading(f"Findings: {len(diagnosis.findings) or 'none'}")
    for found in diagnosis.findings:
        _print_finding(found)


def _state(found: bool, masked: bool) -> str:
    return "yes" if found else "masked" if masked else "no"


def _print_finding(found: Finding) -> None:
    code = EXIT_CODES[found.kind]
    about = f" [{found.device}]" if found.device else ""
    render.paragraph(f"{code or 'note'}{about} {found.what}", indent=2)
    render.paragraph(f"-> {found.mend}", indent=5)
