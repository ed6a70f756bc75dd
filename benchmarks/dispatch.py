"""What dispatch costs a call: an op through its entry, next to the very kernel it is bound to, in one process.

The kernel does nothing, so that the difference is dispatch alone. The two are timed in turn, and the best of all
rounds counts, because everything that disturbs a measurement makes it longer. Graph breaks are counted by dynamo.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import sys
import timeit
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import llm_adapt
from llm_adapt.ops.dispatch.dispatcher import dispatchers
from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy, Proof
from llm_adapt.ops.dispatch.registry import Kernel, all_ops

_EXAMPLES = """examples:
  python benchmarks/dispatch.py                     every op; exit code 1 when one is above the goal or breaks a graph
  python benchmarks/dispatch.py --only attention    ops whose name contains the text
  python benchmarks/dispatch.py --json out.json     also as JSON, with versions and date
"""
GOAL_US = 1.0  # and for an op over lists, 0.1 for each tensor: it hands over hundreds, and computes for milliseconds
_PER_TENSOR_US = 0.1
_NAME = "does_nothing"


@dataclass(frozen=True)
class Result:
    """Best times of one op in microseconds a call; graph breaks of its compiled call; tensors in lists."""

    op: str
    direct_us: float
    entry_us: float
    graph_breaks: int
    num_listed: int = 0

    @property
    def goal_us(self) -> float:
        """How much dispatch may add."""
        return GOAL_US + _PER_TENSOR_US * self.num_listed

    @property
    def added_us(self) -> float:
        """What dispatch adds."""
        return self.entry_us - self.direct_us

    @property
    def verdict(self) -> str:
        """Whether the goals are met: no more added than the goal, no graph break."""
        return "ok" if self.added_us <= self.goal_us and self.graph_breaks == 0 else "MISSED"


@contextlib.contextmanager
def nothing_kernel(name: str) -> Iterator[Callable[..., Any]]:
    """A kernel of the op that takes all of its parameters and does nothing."""
    op = all_ops()[name]
    parameters = ", ".join(op.signature.parameters)
    function: Callable[..., Any] = eval(f"lambda {parameters}: None")
    function.__defaults__ = tuple(op.defaults.values())
    op.kernels[_NAME] = Kernel(name, _NAME, function, "this benchmark")
    try:
        with using(Policy(choose={name: _NAME}, proof=Proof(at_first_use=False))):
            yield function
    finally:
        del op.kernels[_NAME]
        dispatchers[name].start_over()


def measure(name: str, rounds: int) -> Result:
    """Time the op's entry and the kernel it is bound to on one call, in turn."""
    op, entry = all_ops()[name], dispatchers[name].entry
    arguments = op.bind(**next(iter(op.inputs(torch.Generator().manual_seed(0), torch.float32))))
    given = {key: value for key, value in arguments.items() if key not in op.defaults or value is not op.defaults[key]}
    best = {"direct": float("inf"), "entry": float("inf")}
    with nothing_kernel(name) as kernel:
        entry(**given)
        everything = list(arguments.values())
        (binding,) = dispatchers[name].bindings.values()
        assert binding.call is kernel or binding.choice.library == _NAME
        for _ in range(rounds):
            for what, call in (("direct", lambda: kernel(*everything)), ("entry", lambda: entry(*everything))):
                best[what] = min(best[what], _best_us(call))
    num_listed = sum(len(arguments[listed]) for listed in op.lists if arguments[listed] is not None)
    return Result(name, best["direct"], best["entry"], graph_breaks(name), num_listed)


def graph_breaks(name: str) -> int:
    """Graph breaks of a compiled call of the op, as torch._dynamo.explain counts them."""
    op, entry = all_ops()[name], dispatchers[name].entry
    arguments = op.bind(**next(iter(op.inputs(torch.Generator().manual_seed(0), torch.float32))))
    torch._dynamo.reset()
    return int(torch._dynamo.explain(entry)(**arguments).graph_break_count)


def _best_us(call: Callable[[], Any], calls: int = 5000, repeats: int = 5) -> float:
    return min(timeit.repeat(call, number=calls, repeat=repeats)) / calls * 1e6


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and say by the exit code whether every goal is met."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often the two are timed in turn (5)")
    parser.add_argument("--only", default="", help="ops whose name contains this text")
    parser.add_argument("--json", type=Path, help="file for the results as JSON")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = []
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread, best of {args.rounds} rounds")
    print(f"{'op':26s} {'direct us':>9s} {'entry us':>9s} {'added us':>9s} {'goal us':>8s} {'breaks':>6s}")
    for name in (name for name in all_ops() if args.only in name):
        found = measure(name, args.rounds)
        results.append(found)
        times = f"{found.direct_us:9.2f} {found.entry_us:9.2f} {found.added_us:+9.2f}"
        figures = f"{times} {found.goal_us:+8.1f} {found.graph_breaks:6d}"
        print(f"{name:26s} {figures}  {found.verdict}", flush=True)
    if args.json is not None:
        record = {
            "benchmark": "dispatch",
            "device": f"cpu ({platform.processor() or platform.machine()})",
            "versions": {"llm_adapt": llm_adapt.__version__, "torch": torch.__version__},
            "python": platform.python_version(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "results": [asdict(row) | {"added_us": row.added_us, "verdict": row.verdict} for row in results],
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(any(found.verdict != "ok" for found in results))


if __name__ == "__main__":
    sys.exit(main())
