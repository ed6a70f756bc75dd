"""llm-adapt bench: the parser, the run from case to case, and the verdict."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_adapt.cli import render
from llm_adapt.cli.explain import parse_dtype
from llm_adapt.errors import KernelError, SettingsError
from llm_adapt.session import current_adapter, patched

if TYPE_CHECKING:
    import torch

    from llm_adapt.cli.bench.cases import Case
    from llm_adapt.cli.bench.machine import Machine
    from llm_adapt.cli.bench.measure import Settings
    from llm_adapt.cli.bench.results import Row
    from llm_adapt.ops.dispatch.policy import Policy
    from llm_adapt.ops.dispatch.registry import FusedOp

    Work = list[tuple[FusedOp, Case, torch.dtype, Settings]]

__all__ = ["add_parser", "run_bench"]

_BUSY = 0.5  # load for each core at the start beyond which other work disturbs what is measured
_DESCRIPTION = """Every operator at the shapes of large models: what frameworks run without llm_adapt ("eager"), what
dispatch serves, every kernel that can serve, and installed peers, side by side in one run. Each is proved against the
float64 reference before it is timed; what fails is listed with its reason and not timed. docs/benchmarks.md says how
times, bytes, operations and memory are measured.
"""
_EXAMPLES = """examples:
  llm-adapt bench --quick                            every operator, small shapes, under 3 minutes on 2 cores
  llm-adapt bench --out runs/bench                   every case; bench.json, bench.md and plots (6 minutes)
  llm-adapt bench --check --out runs/bench           exit code 1 when a dispatched operator is slower than eager
  llm-adapt bench --only attention --dtype bf16      one operator
  llm-adapt bench --only norm --ops "order=triton"   under another order of kernel libraries
  llm-adapt bench --quick --only glu --peers all     with torch.compile of the eager code, Liger, FlagGems ...
  llm-adapt bench --list                             cases, shapes and candidates; nothing is timed

A ratio above 1 is faster than eager. Compare ratios, not times of different runs.
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the subparsers of `llm-adapt`."""
    parser = subparsers.add_parser(
        "bench",
        help="operators beside what frameworks run without us, proved before they are timed",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(func=run_bench)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, for `llm-adapt bench` and for benchmarks/ops.py."""
    parser.add_argument("--quick", action="store_true", help="the first case of each operator, small, few rounds")
    parser.add_argument("--only", default="", metavar="TEXT", help="operators whose name contains the text")
    parser.add_argument("--dtype", action="append", help="may be repeated (float32 and bfloat16)")
    parser.add_argument("--device", metavar="NAME", help="device instead of the detected one")
    parser.add_argument("--ops", metavar="POLICY", help="which library serves which operator (docs/ops.md)")
    parser.add_argument("--peers", metavar="NAMES", help="all, none, or names separated by commas: what to time beside "
                        "eager and our kernels (default: all, but inductor only for the first case of each operator on "
                        "the CPU, and not with --quick)")  # fmt: skip
    parser.add_argument("--full-size", action="store_true", help="the sizes of the models on a CPU as well")
    parser.add_argument(
        "--seconds", type=_positive, metavar="S", help="rounds of one call: so long (3; 0.4 with --quick)"
    )
    parser.add_argument("--check", action="store_true",
                        help="exit code 1 when what dispatch serves is slower than eager, or cannot run")  # fmt: skip
    parser.add_argument("--margin", type=float, default=2.0, metavar="PERCENT",
                        help="how much slower counts as equal, beyond the 95 %% interval (2)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for bench.json, bench.md and the plots")
    parser.add_argument("--list", action="store_true", help="only list cases and candidates")


def run_bench(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.out is not None:
        _make_folder(args.out)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch.profiler measures memory; it would say so each time
    # Frameworks keep their own code: it is what the kernels are compared with.
    with patched(device=args.device, ops="off") as report, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a quarantine: such a kernel is not timed, and listed
        from llm_adapt.ops.dispatch.in_force import using
        from llm_adapt.ops.dispatch.receipt import policy_text

        with using(_policy(args.ops)):
            work = _work(args)
            if args.list:
                return _list(work)
            from llm_adapt.cli.bench.candidates import absent
            from llm_adapt.cli.bench.machine import Machine

            adapter = current_adapter()
            machine = Machine(adapter.device_type, adapter.title, report.simulated)
            record: dict[str, Any] = {"policy": policy_text(), "absent": absent(work[0][3].asked)}
            rows: list[Row] = []
            try:
                rows.extend(_rows(work, machine))
            except KeyboardInterrupt:
                print("llm-adapt: stopped; what was measured so far follows", file=sys.stderr)
                record["stopped"] = True
    return _conclude(args, rows, machine, record)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _make_folder(folder: Path) -> None:
    """The folder, before an hour of measuring. Raises SettingsError where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".bench-probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise SettingsError(f"--out {folder} was asked; it cannot be written: {error}.") from None


def _policy(text: str | None) -> Policy:
    """The policy whose choices are measured: the device's own order, and what --ops puts over it."""
    from llm_adapt.ops.dispatch.policy import Policy, parse_policy

    parts = parse_policy(text) if text else {}
    return Policy(**{"order": current_adapter().kernel_libraries} | parts)


def _work(args: argparse.Namespace) -> Work:
    """Every (op, case, dtype) and how it is measured. Raises KernelError for an operator that is none."""
    from llm_adapt.cli.bench.candidates import INDUCTOR, check_peers, peer_names
    from llm_adapt.cli.bench.cases import SWEEP, cases_of
    from llm_adapt.cli.bench.measure import MODES, Settings
    from llm_adapt.ops.dispatch.registry import all_ops

    dtypes = [parse_dtype(text) for text in args.dtype or ("float32", "bfloat16")]
    ops = [op for op in all_ops().values() if args.only in op.name and any(True for _ in cases_of(op))]
    if not ops:
        known = ", ".join(op.name for op in all_ops().values() if any(True for _ in cases_of(op)))
        raise KernelError(f"bench --only {args.only} was asked; no operator with a benchmark is named so: {known}.")
    is_cpu = current_adapter().device_type == "cpu"
    scale: Any = "quick" if args.quick else "cpu" if is_cpu and not args.full_size else "full"
    compiles = frozenset() if args.quick else frozenset({INDUCTOR})
    asked = check_peers(args.peers, frozenset(peer_names()) - {INDUCTOR} | compiles)
    seconds = args.seconds or (0.4 if args.quick else 3.0)
    work: Work = []
    for op in ops:
        for number, case in enumerate(cases_of(op, args.quick)):
            spared = {INDUCTOR} if is_cpu and number and args.peers is None else set()
            settings = Settings(scale, seconds, asked - spared, args.margin / 100)
            work += [(op, case, dtype, settings) for dtype in dtypes]
        if op.name == "attention":
            sweep = Settings(scale, seconds / 3, asked - {INDUCTOR}, args.margin / 100, MODES[1:])
            work += [(op, case, dtypes[0], sweep) for case in SWEEP[: 3 if args.quick else None]]
    return work


def _rows(work: Work, machine: Machine) -> Iterator[Row]:
    """Measure, and say on standard error how it goes."""
    from llm_adapt.cli.bench.measure import measure

    start = time.perf_counter()
    print(f"copy {machine.bandwidth / 1e9:.1f} GB/s on {machine.title}", file=sys.stderr, flush=True)
    if machine.load > _BUSY * (os.cpu_count() or 1):
        words = f"load {machine.load:.1f} on {os.cpu_count()} cores: the machine is busy, and so will the figures be"
        print(f"llm-adapt: {words}", file=sys.stderr, flush=True)
    for number, (op, case, dtype, settings) in enumerate(work, 1):
        found = list(measure(op, case, dtype, machine, settings))
        minutes = (time.perf_counter() - start) / 60
        name = f"{op.name} {case.model} {str(dtype).removeprefix('torch.')}"
        print(f"[{number}/{len(work)}, {minutes:.1f} min] {name}: {_said(found)}", file=sys.stderr, flush=True)
        yield from found


def _said(rows: list[Row]) -> str:
    """What dispatch serves and how it compares, of one case."""
    parts = []
    for row in rows:
        if row.candidate == "dispatched":
            ratio = "no eager" if row.ratio is None else f"{row.ratio:.2f}x eager"
            parts.append(row.refused or f"{row.source} {ratio}")
    return ", ".join(parts) or "nothing to time"


def _list(work: Work) -> int:
    """Print the cases, and who could be asked about them."""
    from llm_adapt.cli.bench.candidates import listing

    cases = {(op.name, case.model): (case, settings) for op, case, _, settings in work}
    lines = [
        (op, model, ", ".join(f"{a} {s}" for a, s in zip(case.axes, case.sizes(settings.scale), strict=True)),
         case.scaled(settings.scale) or "nothing")
        for (op, model), (case, settings) in cases.items()
    ]  # fmt: skip
    render.table("Cases", ("op", "model", "sizes", "narrowed"), lines)
    asked = {op.name: (op, settings.asked) for op, _, _, settings in work}
    found = [(name, who, what) for name, (op, peers) in asked.items() for who, what in listing(op, peers)]
    render.table("Candidates (and the reference)", ("op", "name", "what it is"), found)
    return 0


def _conclude(args: argparse.Namespace, rows: list[Row], machine: Machine, record: dict[str, Any]) -> int:
    """Print, write, and judge."""
    from llm_adapt.cli.bench.results import COLUMNS, SCHEMA, cells, is_slower, offenders

    title = machine.title + (f", SIMULATED as {machine.simulated}: times say nothing" if machine.simulated else "")
    render.table(f"Operators on {title}", COLUMNS, [cells(row) for row in rows])
    slower = offenders(rows, args.margin / 100)
    dearer = [row for row in rows if row.error is not None and is_slower(row, args.margin / 100) and row not in slower]
    record = {
        "schema": SCHEMA,
        "benchmark": "ops",
        "command": shlex.join(["llm-adapt", "bench", *_given(args)]),
        "confidence": 0.95,
        "margin_percent": args.margin,
        **record,
        "facts": machine.facts() | {"matmul_gflop_s": _rates(rows, machine)},
        "slower_than_eager": [list(row.kind) for row in slower],
        "slower_and_more_accurate": [list(row.kind) for row in dearer],
    }
    if args.out is not None:
        _write(record, rows, title, args.out)
    broken = [row for row in rows if row.candidate == "dispatched" and row.refused.startswith("raised ")]
    for row in broken:
        print(f"cannot run: {' '.join(row.kind)}: {row.source} {row.refused}", file=sys.stderr)
    for row in slower:
        print(f"slower than eager: {_compared(row)}", file=sys.stderr)
    for row in dearer:
        times = (row.eager_error or 0.0) / max(row.error or 0.0, 1e-9)
        print(f"slower than eager: {_compared(row)}, whose error is {times:.0f} times as large", file=sys.stderr)
    compared = sum(row.candidate == "dispatched" and row.ratio is not None for row in rows)
    print(f"{compared} calls compared with eager, {len(slower)} slower", file=sys.stderr)
    return 130 if record.get("stopped") else int(args.check and bool(slower or broken))


def _compared(row: Row) -> str:
    """Who serves a call, and how it compares with eager."""
    name, interval = " ".join(row.kind[:3]), f"({row.ratio_low:.3f}-{row.ratio_high:.3f})"
    return f"{name} {row.mode}: {row.source} is {row.ratio:.3f}x eager {interval}"


def _given(args: argparse.Namespace) -> list[str]:
    """The options of this run that are not the defaults, as they are typed."""
    words = [f"--{name.replace('_', '-')}" for name in ("quick", "check", "full_size") if getattr(args, name)]
    for name in ("only", "device", "ops", "peers", "seconds", "out"):
        words += [f"--{name}", str(getattr(args, name))] if getattr(args, name) else []
    return words + [word for dtype in args.dtype or () for word in ("--dtype", dtype)]


def _rates(rows: list[Row], machine: Machine) -> dict[str, float]:
    return {
        name: round(machine.matmul_rate(parse_dtype(name)) / 1e9, 1) for name in dict.fromkeys(r.dtype for r in rows)
    }


def _write(record: dict[str, Any], rows: list[Row], title: str, folder: Path) -> None:
    from llm_adapt.cli.bench import plots
    from llm_adapt.cli.bench.results import write

    written = write(record, rows, folder)
    try:
        written += plots.draw(rows, f"{title}, {record['facts']['started'][:10]}", folder)
    except ImportError as error:
        print(f"llm-adapt: no plots: {error} (pip install llm-adapt[bench])", file=sys.stderr)
    print(f"wrote {', '.join(str(folder / name) for name in written)}", file=sys.stderr)
