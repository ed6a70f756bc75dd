"""Every operator of torch's OpInfo database on a simulated device against the CPU.

Compared are the forward result (values, dtypes, shapes, strides), the gradient under the same upstream gradient, the
in-place form, the out= form (results that must grow, results with strides) in float32 (int64 where there is none),
and the forward result in bfloat16. Random operators are compared by shape, dtype and statistics.

Each operator has one outcome in each column: pass, deviates, refused, crashed or no sample. Deviations that are known
stand with their reason in docs/evidence/opinfo_known.json; anything else makes the exit code 1.

The sweep needs numpy, scipy and expecttest, as torch's own tests do.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from opinfo_page import page

ROOT = Path(__file__).parents[1]
KNOWN = ROOT / "docs" / "evidence" / "opinfo_known.json"
GOOD = ("pass", "no sample")
_EXAMPLES = """examples:
  python scripts/sweep_opinfo.py                                    the whole sweep on the simulated NPU
  python scripts/sweep_opinfo.py --only nn.functional.gelu          one operator, nothing written
  python scripts/sweep_opinfo.py --only 'linalg.*' --samples 10     a family, more samples
  python scripts/sweep_opinfo.py --simulate mlu --out docs/evidence/opinfo_mlu.json
"""


class Worker:
    """A process of opinfo_worker.py, started again when an operator ends it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.names: list[str] = []
        self._start()

    def _start(self) -> None:
        read, write = os.pipe()
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - outlives this
        script = Path(__file__).with_name("opinfo_worker.py")
        command = [sys.executable, str(script), self.arguments.simulate, str(self.arguments.samples), str(write)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self.said, stderr=self.said, pass_fds=(write,), text=True
        )
        os.close(write)
        self.answers = os.fdopen(read, encoding="utf-8")
        first = self._answer(600)
        if first is None:
            self.stop()
            raise SystemExit(f"The simulated {self.arguments.simulate} did not start:\n{self._last_words()}")
        self.names = first["names"]

    def ask(self, place: int) -> dict[str, Any]:
        """The findings for one operator; the reason where it ended the process."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{place}\n")
        self.process.stdin.flush()
        answer = self._answer(self.arguments.timeout)
        if answer is not None:
            if not answer["is_sound"]:
                print(f"{self.names[place]} left the device unusable: another process goes on", flush=True)
                self.stop()
                self._start()
            return answer
        reason = self._end()
        self._start()
        return {"findings": {"forward": {"outcome": "crashed", "samples": 0, "text": reason}}, "fallbacks": []}

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        """One line, or None when the process ended or took too long."""
        ready, _, _ = select.select([self.answers], [], [], seconds)
        line = self.answers.readline() if ready else ""
        answer: dict[str, Any] | None = json.loads(line) if line else None
        return answer

    def _end(self) -> str:
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.stop()
            return f"no answer in {self.arguments.timeout} s"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"the process ended: {how}; {' '.join(self._last_words().split())[-300:]}"

    def _last_words(self) -> str:
        self.said.seek(0)
        return self.said.read()[-2000:]

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def sweep(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Findings by operator, and for each operator of aten left to the CPU the OpInfos that use it."""
    workers = [Worker(arguments)]
    names = workers[0].names
    places = [place for place, name in enumerate(names) if fnmatch(name, arguments.only or "*")]
    if not places:
        raise SystemExit(f"--only {arguments.only} names none of the {len(names)} operators of op_db.")
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for place in places:
        waiting.put(place)
    findings: dict[str, Any] = {}
    fallbacks: dict[str, set[str]] = {}
    progress = Progress(len(places))

    def serve(worker: Worker | None) -> None:
        worker = worker or Worker(arguments)
        while True:
            try:
                place = waiting.get_nowait()
            except queue.Empty:
                break
            answer = worker.ask(place)
            findings[names[place]] = answer["findings"]
            for operator in answer["fallbacks"]:
                fallbacks.setdefault(operator, set()).add(names[place])
            progress.done(names[place], answer["findings"])
        worker.stop()

    more = min(arguments.jobs, len(places)) - 1
    threads = [threading.Thread(target=serve, args=(worker,)) for worker in (workers[0], *([None] * more))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(findings) != len(places):
        raise SystemExit(f"{len(findings)} of {len(places)} operators were compared; see the errors above.")
    return dict(sorted(findings.items())), {key: sorted(fallbacks[key]) for key in sorted(fallbacks)}


class Progress:
    """A line for each bad outcome and for every fiftieth operator."""

    def __init__(self, total: int) -> None:
        self.total, self.count = total, 0
        self.started = time.monotonic()

    def done(self, name: str, findings: dict[str, Any]) -> None:
        """Say how far the sweep is."""
        self.count += 1
        for column, one in findings.items():
            if one["outcome"] not in GOOD:
                print(f"[{self.count}/{self.total}] {name} {column}: {one['outcome']}, {one['text']}", flush=True)
        if self.count % 50 == 0 or self.count == self.total:
            print(f"[{self.count}/{self.total}] {time.monotonic() - self.started:.0f} s", flush=True)


def explain(findings: dict[str, Any], known: list[dict[str, str]]) -> tuple[list[str], list[str]]:
    """Write the reason to each known deviation; return those without one, and the entries that explain nothing."""
    used: set[int] = set()
    unexpected = []
    for name, columns in findings.items():
        for column, finding in columns.items():
            if finding["outcome"] in GOOD:
                continue
            match = next((place for place, entry in enumerate(known) if _fits(entry, name, column, finding)), None)
            if match is None:
                unexpected.append(f"{name}, {column}: {finding['outcome']}, {finding['text']}")
            else:
                used.add(match)
                finding["reason"] = known[match]["reason"]
    idle = [f"{entry['operator']}, {entry['column']}" for place, entry in enumerate(known) if place not in used]
    return unexpected, idle


def compact(record: dict[str, Any]) -> str:
    """JSON with a line for each operator: what deviates in full, of the rest the outcome."""
    lines = {name: json.dumps(value) for name, value in record.items() if name != "operators"}
    for name, columns in record["operators"].items():
        short = {column: one["outcome"] if one["outcome"] in GOOD else one for column, one in columns.items()}
        lines[name] = json.dumps(short)
    head = [f'"{name}": {lines.pop(name)}' for name in ("device", "samples", "fallbacks")]
    operators = ",\n".join(f" {json.dumps(name)}: {line}" for name, line in lines.items())
    return "{" + ",\n".join([*head, '"operators": {']) + "\n" + operators + "\n}}\n"


def _fits(entry: dict[str, str], name: str, column: str, finding: dict[str, Any]) -> bool:
    return (
        fnmatch(name, entry["operator"])
        and fnmatch(column, entry["column"])
        and finding["outcome"] == entry["outcome"]
        and re.search(entry["text"], finding["text"]) is not None
    )


def main() -> int:
    """Sweep, explain, write; 1 when something is unexpected."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulate", default="npu", metavar="NAME", help="npu, mlu or dcu, :MODEL may follow")
    parser.add_argument("--only", metavar="NAME", help="operators of this name, * and ? allowed; writes nothing")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="of each operator (default 3)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default docs/evidence/opinfo_<device>.json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes at once")
    parser.add_argument("--timeout", type=float, default=180, metavar="S", help="for one operator (default 180)")
    arguments = parser.parse_args()
    device = arguments.simulate.partition(":")[0]
    out = arguments.out or ROOT / "docs" / "evidence" / f"opinfo_{device}.json"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    findings, fallbacks = sweep(arguments)
    unexpected, idle = explain(findings, json.loads(KNOWN.read_text(encoding="utf-8")).get(device, []))
    if arguments.only is None:
        record: dict[str, Any] = {"device": arguments.simulate, "samples": arguments.samples}
        record |= {"operators": findings, "fallbacks": fallbacks}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(compact(record), encoding="utf-8")
        out.with_suffix(".md").write_text(page(record), encoding="utf-8")
        print(f"written: {out} and {out.with_suffix('.md')}")
        for entry in idle:
            print(f"known, but not found: {entry}. Take it out of {KNOWN}.")
    for line in unexpected:
        print(f"unexpected: {line}")
    print(f"{len(findings)} operators, {len(unexpected)} outcomes without a known reason")
    return 1 if unexpected or (idle and arguments.only is None) else 0


if __name__ == "__main__":
    sys.exit(main())
