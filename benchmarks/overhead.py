"""What the torch.cuda facade costs a call on the CPU, next to the same call in the same process without it.

The facade is put on and taken off in turn, and each statement is timed in both states; the best of all rounds
counts, because everything that disturbs a measurement makes it longer.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import timeit
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import llm_adapt

_EXAMPLES = """examples:
  python benchmarks/overhead.py                          the table; exit code 1 when a goal is missed
  python benchmarks/overhead.py --rounds 15              steadier figures on a busy machine
  python benchmarks/overhead.py --json overhead.json     also as JSON, with versions and date
  python benchmarks/overhead.py --only Tensor.to         rows whose name contains the text
"""
_SETUP = {"torch": torch, "cpu": torch.device("cpu"), "x": torch.ones(8), "linear": torch.nn.Linear(8, 8)}


@dataclass(frozen=True)
class Case:
    """One statement with the facade, and the statement without it that it is compared with.

    Attributes:
        name: what is called.
        patched: the statement timed with the facade.
        plain: the statement timed without it.
        goal_us: how much may be added; None = only shown.
        untouched: an expression that must be the same object with and without the facade; the proof that nothing
            is added, where two timings of one object differ by chance.
    """

    name: str
    patched: str
    plain: str
    goal_us: float | None = None
    untouched: str = ""


@dataclass(frozen=True)
class Result:
    """Best times of one case in microseconds a call."""

    case: Case
    plain_us: float
    patched_us: float
    is_same_object: bool

    @property
    def added_us(self) -> float:
        """What the facade adds."""
        return self.patched_us - self.plain_us

    @property
    def verdict(self) -> str:
        """Whether the goal is met."""
        if self.case.untouched:
            return "ok: the same object" if self.is_same_object else "MISSED: another object"
        if self.case.goal_us is None:
            return ""
        return "ok" if self.added_us <= self.case.goal_us else "MISSED"


def _same(name: str, statement: str, goal_us: float | None = None) -> Case:
    return Case(name, statement, statement, goal_us)


def _untouched(name: str, statement: str, path: str) -> Case:
    return Case(name, statement, statement, goal_us=0.0, untouched=path)


CASES = (
    Case('Tensor.to("cuda")', 'x.to("cuda")', "x.to(cpu)", 0.3),
    _same("Tensor.to(device)", "x.to(cpu)", 0.3),
    _same("Tensor.to(dtype)", "x.to(torch.float32)", 0.3),
    # Without CUDA the plain call raises, so it is compared with the cheapest call there is.
    Case("torch.cuda.current_device()", "torch.cuda.current_device()", "torch.is_grad_enabled()", 0.3),
    Case('zeros(device="cuda")', 'torch.zeros(8, device="cuda")', "torch.zeros(8, device=cpu)", 1.5),
    Case('tensor(device="cuda")', 'torch.tensor(1.0, device="cuda")', "torch.tensor(1.0, device=cpu)", 1.5),
    Case('new_zeros(device="cuda")', 'x.new_zeros(8, device="cuda")', "x.new_zeros(8, device=cpu)", 1.5),
    _untouched("torch.add(x, x)", "torch.add(x, x)", "torch.add"),
    _untouched("x + x", "x + x", "torch.Tensor.__add__"),
    _untouched("Tensor.view", "x.view(2, 4)", "torch.Tensor.view"),
    _untouched(
        "nn.Linear", "linear(x)", "(torch.nn.Module.__call__, torch.nn.Linear.forward, torch.nn.functional.linear)"
    ),
    _same("zeros, device not given", "torch.zeros(8)"),
    _same("Tensor.is_cuda", "x.is_cuda"),
    _same("torch.cuda.is_available()", "torch.cuda.is_available()"),
    Case("torch.device", 'torch.device("cuda", 0)', 'torch.device("cpu", 0)'),
)


def measure(cases: Iterable[Case], rounds: int) -> list[Result]:
    """Time every case with and without the facade, in turn."""
    best: dict[tuple[str, bool], float] = {}
    objects: dict[tuple[str, bool], Any] = {}
    cases = list(cases)
    for _ in range(rounds):
        for is_patched in (False, True):
            if is_patched:
                llm_adapt.patch(device="cpu")
            for case in cases:
                found = _best_us(case.patched if is_patched else case.plain)
                best[case.name, is_patched] = min(found, best.get((case.name, is_patched), found))
                objects[case.name, is_patched] = eval(case.untouched or "None", dict(_SETUP))
            llm_adapt.unpatch()
    return [
        Result(
            case,
            best[case.name, False],
            best[case.name, True],
            is_same_object=objects[case.name, False] == objects[case.name, True],
        )
        for case in cases
    ]


def _best_us(statement: str, calls: int = 2000, repeats: int = 7) -> float:
    timer = timeit.Timer(statement, globals=_SETUP)
    return min(timer.repeat(repeats, calls)) / calls * 1e6


def table(results: Iterable[Result]) -> str:
    """The results as text."""
    lines = [f"{'call':32s} {'plain us':>9s} {'facade us':>9s} {'added us':>9s} {'goal us':>8s}  verdict"]
    for found in results:
        goal = "" if found.case.goal_us is None else f"{found.case.goal_us:+.1f}"
        figures = f"{found.plain_us:9.2f} {found.patched_us:9.2f} {found.added_us:+9.2f}"
        lines.append(f"{found.case.name:32s} {figures} {goal:>8s}  {found.verdict}")
    return "\n".join(lines)


def as_json(results: Iterable[Result], rounds: int) -> dict[str, Any]:
    """The results with everything that is needed to compare them with others."""
    return {
        "benchmark": "overhead",
        "device": f"cpu ({platform.processor() or platform.machine()})",
        "versions": {
            "llm_adapt": llm_adapt.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "rounds": rounds,
        "results": [asdict(found) | {"added_us": found.added_us, "verdict": found.verdict} for found in results],
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and say by the exit code whether every goal is met."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often the facade is put on and taken off (5)")
    parser.add_argument("--only", default="", help="rows whose name contains this text")
    parser.add_argument("--json", type=Path, help="file for the results as JSON")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = measure([case for case in CASES if args.only in case.name], args.rounds)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread, best of {args.rounds} rounds")
    print(table(results))
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(results, args.rounds), indent=2) + "\n", encoding="utf-8")
    return int(any(found.verdict.startswith("MISSED") for found in results))


if __name__ == "__main__":
    sys.exit(main())
