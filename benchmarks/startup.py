"""What patch() costs at the start of a process, each figure the median of fresh processes.

"not imported": patch() with torch imported, and the frameworks installed but not imported. "both imported": patch()
after Megatron-Core and transformers have been imported. "module of ...": what patch() adds to the import of one model
file of transformers, whose classes are recognised by their numbers: the import with and without, in turn.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import llm_adapt
from llm_adapt.cli.bench.timing import interval

ROOT = Path(__file__).resolve().parents[1]
_EXAMPLES = """examples:
  python benchmarks/startup.py                   exit code 1 when a goal is missed
  python benchmarks/startup.py --rounds 11       steadier figures
  python benchmarks/startup.py --json out.json   also as JSON, with versions and date
"""
_BOTH = """
import megatron.core.transformer.transformer_layer, megatron.core.models.gpt.gpt_layer_specs
import megatron.core.optimizer, megatron.core.transformer.moe.moe_layer
import transformers.models.llama.modeling_llama
"""
_TIMED = """
import time
{before}
start = time.perf_counter()
{act}
print("@", (time.perf_counter() - start) * 1e3)
"""
_PATCH = 'import llm_adapt; llm_adapt.patch(device="cpu")'
_MODEL = "import transformers.models.{0}.modeling_{0}"


@dataclass(frozen=True)
class Case:
    """Code that is timed, code before it, and code that is timed instead to be subtracted; milliseconds at most."""

    name: str
    before: str
    act: str
    goal_ms: float
    less_before: str = ""


def _probe(model: str) -> Case:
    first = "import torch, transformers, transformers.models.mistral.modeling_mistral"
    return Case(f"module of {model}", f"import torch\n{_PATCH}\n{first}", _MODEL.format(model), 50.0, first)


CASES = (
    Case("patch(), not imported", "import torch", _PATCH, 60.0),
    Case("patch(), both imported", f"import torch\n{_BOTH}", _PATCH, 1000.0),
    *(_probe(model) for model in ("llama", "mixtral", "deepseek_v3")),
)


def run(before: str, act: str) -> float:
    """Milliseconds of an act in a fresh process. Raises RuntimeError with what the process said."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("LLM_ADAPT_")}
    code = _TIMED.format(before=before, act=act)
    found = subprocess.run(
        [sys.executable, "-c", code], env=plain | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    lines = [line for line in found.stdout.splitlines() if line.startswith("@ ")]
    if found.returncode or not lines:
        raise RuntimeError(f"{act} ended with {found.returncode}:\n{found.stderr[-1500:]}")
    return float(lines[-1][2:])


def measure(case: Case, rounds: int, run: Callable[[str, str], float] = run) -> list[float]:
    """Milliseconds of each round; what is subtracted is measured in the same round."""
    run(case.before, case.act)  # files come from the disk once
    figures = []
    for _ in range(rounds):
        less = run(case.less_before, case.act) if case.less_before else 0.0
        figures.append(run(case.before, case.act) - less)
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and say by the exit code whether every goal is met."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="fresh processes for each figure (7)")
    parser.add_argument("--only", default="", help="rows whose name contains this text")
    parser.add_argument("--json", type=Path, help="file for the results as JSON")
    args = parser.parse_args(arguments)
    if os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
        load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        print(f"startup: {load}: the machine is busy, and so will the figures be", file=sys.stderr)
    print(f"{'what':28s} {'ms':>8s} {'95 %':>17s} {'goal ms':>8s}")
    results = []
    for case in (case for case in CASES if args.only in case.name):
        found = interval(measure(case, args.rounds))
        verdict = "ok" if found.median <= case.goal_ms else "MISSED"
        spread = f"{found.low:.1f}-{found.high:.1f}"
        print(f"{case.name:28s} {found.median:8.1f} {spread:>17s} {case.goal_ms:8.0f}  {verdict}", flush=True)
        results.append(asdict(case) | {"ms": found, "verdict": verdict})
    if args.json is not None:
        record = {
            "benchmark": "startup",
            "machine": platform.processor() or platform.machine(),
            "load": os.getloadavg()[0],
            "versions": {"llm_adapt": llm_adapt.__version__, "python": platform.python_version()},
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "results": results,
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(any(row["verdict"] != "ok" for row in results))


if __name__ == "__main__":
    sys.exit(main())
