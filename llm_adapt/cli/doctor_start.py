"""Start torch in a child process and say what became of it; a crash there costs the doctor nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_adapt.adapters import (
    ActivationError,
    Finding,
    FindingKind,
    Host,
    activate,
    adapters,
    explain,
    spell_error,
)

__all__ = ["PLAIN", "Start", "child", "start"]

_MARK = "llm_adapt.doctor "  # plug-ins print to standard output while they are imported
_ROOT = Path(__file__).resolve().parents[2]
PLAIN = ""  # stands for: `import torch` as any script does it, no device chosen


@dataclass(frozen=True)
class Start:
    """How one start of torch in a child process went.

    Attributes:
        act: what was tried, in words.
        device: name of the adapter tried, PLAIN for a plain `import torch`.
        seconds: how long it took.
        lines: what activation did, when it went well.
        finding: what went wrong, None when it went well.
    """

    act: str
    device: str
    seconds: float
    lines: tuple[str, ...] = ()
    finding: Finding | None = None


def start(device: str, timeout_s: float, environ: Mapping[str, str]) -> Start:
    """Run `import torch` (device PLAIN) or `activate(device)` in a child process."""
    act = f"llm_adapt on {device}" if device else "`import torch`"
    where = f"import sys; sys.path.append({str(_ROOT)!r})"
    code = f"{where}; from llm_adapt.cli.doctor_start import child; child({device!r})"
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=dict(environ),
            timeout=timeout_s,
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        what = f"{act} did not finish in {timeout_s:g} s."
        mend = "Allow more with --timeout; if it never ends, look at the driver with the vendor's monitor."
        return Start(act, device, timeout_s, finding=Finding(FindingKind.PLUGIN, what, mend, device))
    seconds = round(time.monotonic() - began, 1)
    answer = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(_MARK)), None)
    if answer is None:
        return Start(act, device, seconds, finding=_died(act, device, done.returncode, done.stderr))
    return _read(act, device, seconds, json.loads(answer[len(_MARK) :]))


def _died(act: str, device: str, code: int, errors: str) -> Finding:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "nothing was printed")
    cause = explain(errors, adapters().values(), Host())
    what = f"{act} died with {how}: {last}"
    return Finding(cause.kind, what, cause.mend, cause.device or device)


def _read(act: str, device: str, seconds: float, answer: dict[str, Any]) -> Start:
    if answer["finding"] is None:
        return Start(act, device, seconds, tuple(answer["lines"]))
    parts = answer["finding"]
    what = f"{act} fails: {parts['what']}"
    finding = Finding(FindingKind[parts["kind"]], what, parts["mend"], parts["device"])
    return Start(act, device, seconds, finding=finding)


def child(device: str) -> None:
    """Do the act in this (child) process and print the answer as one marked line of JSON."""
    finding, lines = None, []
    try:
        if device == PLAIN:
            import torch  # noqa: F401
        else:
            lines = activate(adapters()[device])
    except ActivationError as error:
        finding = error.finding
    except Exception as error:  # noqa: BLE001 - whatever torch raises is what the parent explains
        finding = explain(f"`import torch`\n{spell_error(error)}", adapters().values(), Host())
    told = asdict(finding) | {"kind": finding.kind.name} if finding else None
    print(_MARK + json.dumps({"finding": told, "lines": lines}), flush=True)
