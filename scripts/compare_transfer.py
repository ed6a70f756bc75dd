"""Compare torch_npu's transfer_to_npu with the facade of llm_adapt: what CUDA scripts do, on the same simulated NPU.

Every probe is a few lines of CUDA code with the outcome that it has on CUDA (transfer_probes/). It runs in a process
of its own under both sides; a server process per side imports torch and torch_npu once and forks for each probe.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import transfer_page
import transfer_process
from transfer_probes import PROBES, Probe

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
_EXAMPLES = """examples:
  python scripts/compare_transfer.py                           all probes; writes docs/transfer_to_npu.md
  python scripts/compare_transfer.py --group memory             one group, shown and not written
  python scripts/compare_transfer.py --group memory --update    one group anew, into the evidence and the page
  python scripts/compare_transfer.py --only map_location        the probes that have these words in their code
  python scripts/compare_transfer.py --side facade --failing    what the facade gets wrong
  python scripts/compare_transfer.py --page-only                the page anew from the evidence that is there
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--group", choices=sorted({probe.group for probe in PROBES}), help="only the probes of this group"
    )
    parser.add_argument("--only", metavar="TEXT", help="only the probes whose code contains this")
    parser.add_argument("--side", choices=transfer_process.SIDES, help="only this side")
    parser.add_argument("--failing", action="store_true", help="show only what failed")
    parser.add_argument("--update", action="store_true", help="put what was run, under both sides, into the evidence")
    parser.add_argument("--limit", type=int, default=180, metavar="SECONDS", help="for one probe (default 180)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", metavar="FOLDER", help="default: docs/")
    parser.add_argument("--page-only", action="store_true", help="write the page from the evidence, run nothing")
    parser.add_argument("--serve", choices=transfer_process.SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    return parser


def _chosen(args: argparse.Namespace) -> list[Probe]:
    return [
        probe
        for probe in PROBES
        if args.group in (None, probe.group) and (args.only is None or args.only in probe.before + probe.code)
    ]


def _served(side: str, bare: bool, probes: list[Probe], limit: int) -> Iterator[dict[str, Any]]:
    """Outcomes of the probes, one after the other, from a server process of that side."""
    command = [sys.executable, __file__, "--serve", side, "--limit", str(limit), *(["--bare"] if bare else [])]
    places = [PROBES.index(probe) for probe in probes]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(places))
        server.stdin.close()
        for line in server.stdout:
            yield json.loads(line)
    if server.returncode:
        raise SystemExit(f"The server of {side} ended with exit code {server.returncode}; its error stands above.")


def _run(
    side: str, probes: list[Probe], args: argparse.Namespace
) -> tuple[dict[str, str], dict[Probe, dict[str, Any]]]:
    """Versions, and what every probe did under one side, with a line of progress for each."""
    found: dict[Probe, dict[str, Any]] = {}
    versions: dict[str, str] = {}
    for bare in (False, True):
        wanted = [probe for probe in probes if bool(probe.before) is bare]
        if not wanted:
            continue
        answers = _served(side, bare, wanted, args.limit)
        versions = next(answers)
        for probe, outcome in zip(wanted, answers, strict=True):
            found[probe] = outcome
            if not (args.failing and outcome["ok"]):
                mark = "ok    " if outcome["ok"] else "FAILED"
                shown = "" if outcome["ok"] else f"\n       {outcome['seen']}"
                print(f"{mark} {side} {len(found)}/{len(probes)} {probe.title}{shown}", file=sys.stderr, flush=True)
    return versions, found


def _rows(runs: dict[str, Any], evidence: Path) -> list[dict[str, Any]]:
    """All probes with what they did in these runs, or else in the runs that the evidence is of."""
    known: dict[str, Any] = {}
    if evidence.exists():
        known = {row["before"] + row["code"]: row for row in json.loads(evidence.read_text(encoding="utf-8"))["probes"]}
    rows = []
    for probe in PROBES:
        new = {side: found[probe] for side, (_, found) in runs.items() if probe in found}
        old = known.get(probe.before + probe.code)
        if not new and old is None:
            raise SystemExit(f"The evidence lacks {probe.title!r}; run all probes once.")
        outcomes = new or {side: old[side] for side in runs}
        rows.append({**probe.as_dict(), **outcomes})
    return rows


def main() -> int:
    """Run what was asked; 1 when the facade got something wrong that is not a stated limit."""
    args = _parser().parse_args()
    if args.serve:
        transfer_process.serve(args.serve, args.bare, args.limit)
        return 0
    evidence = args.out / "evidence" / "transfer_to_npu.json"
    if args.page_only:
        transfer_page.write(args.out / "transfer_to_npu.md", json.loads(evidence.read_text(encoding="utf-8")))
        return 0
    probes = _chosen(args)
    sides = (args.side,) if args.side else transfer_process.SIDES
    with ThreadPoolExecutor(len(sides)) as pool:
        runs = dict(zip(sides, pool.map(lambda side: _run(side, probes, args), sides), strict=True))
    for side, (_, found) in runs.items():
        right = sum(outcome["ok"] for outcome in found.values())
        print(f"{side}: {right} of {len(found)} as on CUDA", file=sys.stderr)
    if len(sides) == len(transfer_process.SIDES) and (args.update or len(probes) == len(PROBES)):
        data = {"versions": runs["facade"][0], "probes": _rows(runs, evidence)}
        evidence.parent.mkdir(parents=True, exist_ok=True)
        evidence.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        transfer_page.write(args.out / "transfer_to_npu.md", data)
        print(f"written: {evidence}, {args.out / 'transfer_to_npu.md'}", file=sys.stderr)
    if "facade" not in runs:
        return 0
    return int(any(not outcome["ok"] and not probe.limit for probe, outcome in runs["facade"][1].items()))


if __name__ == "__main__":
    sys.exit(main())
