"""llm-adapt bench: every operator by every kernel that serves here, next to eager PyTorch, proved before timed."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import llm_adapt
from llm_adapt.cli import render
from llm_adapt.cli.explain import here, parse_dtype
from llm_adapt.errors import KernelError
from llm_adapt.session import current_adapter, patched

if TYPE_CHECKING:
    from llm_adapt.ops.dispatch.registry import FusedOp

__all__ = ["Timing", "add_parser", "run_bench"]

_EXAMPLES = """examples:
  llm-adapt bench --quick                          every operator, small shapes, under 5 minutes on 2 cores
  llm-adapt bench --only attention --dtype bf16    one operator at the shapes of large models
  llm-adapt bench --quick --out runs/bench         also writes bench.json, bench.md and bench.png
  llm-adapt bench --quick --only norm --ops "order=inductor>torch_native"     also what torch.compile makes of them

Eager PyTorch is the operator's own reference. A ratio above 1 means that the kernel is faster. Figures are medians of
torch.utils.benchmark; compare ratios, not times of different runs.
"""
_QUICK_ELEMENTS = 2**18  # of the first tensor: the shapes of large models, narrowed along their first axes


class Timing(NamedTuple):
    """One kernel on one call; times in milliseconds, NaN where there is no backward."""

    op: str
    size: str
    shape: tuple[int, ...]
    dtype: str
    library: str
    forward_ms: float
    both_ms: float
    forward_ratio: float
    both_ratio: float


def add_parser(subparsers: Any) -> None:
    """Add the command to the subparsers of `llm-adapt`."""
    parser = subparsers.add_parser(
        "bench",
        help="operators against eager PyTorch, proved before they are timed",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small shapes and short measurements")
    parser.add_argument("--only", default="", metavar="TEXT", help="operators whose name contains the text")
    parser.add_argument("--dtype", action="append", help="may be repeated (float32 and bfloat16)")
    parser.add_argument("--device", metavar="NAME", help="device instead of the detected one")
    parser.add_argument("--ops", metavar="POLICY", help="which libraries to time, e.g. order=inductor>torch_native")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for bench.json, bench.md and bench.png")
    parser.set_defaults(func=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    """Run the command."""
    rows: list[Timing] = []
    with patched(device=args.device, ops=args.ops) as report, warnings.catch_warnings():
        dtypes = [parse_dtype(text) for text in args.dtype or ("float32", "bfloat16")]
        warnings.simplefilter("ignore", RuntimeWarning)  # a quarantine: such a kernel is not timed, and listed below
        from llm_adapt.ops.dispatch.registry import all_ops

        ops = [op for op in all_ops().values() if args.only in op.name and op.example is not None]
        if not ops:
            known = ", ".join(op.name for op in all_ops().values() if op.example is not None)
            raise KernelError(f"bench --only {args.only} was asked; no operator with a benchmark is named so: {known}.")
        for op in ops:
            for size, shape in _sizes(op, args.quick):
                for dtype in dtypes:
                    print(f"  {op.name} {size} {dtype}", file=sys.stderr, flush=True)
                    rows += _timings(op, size, shape, dtype, 0.05 if args.quick else 0.5)
        device = current_adapter().title
        if report.simulated:
            device += f", SIMULATED as {report.simulated}: the times say nothing of hardware"
    render.table(f"Operators on {device}", _COLUMNS, [_cells(row) for row in rows])
    if args.out is not None:
        _write(rows, device, args.out)
    return 0


_COLUMNS = ("op", "size", "dtype", "library", "forward ms", "and backward ms", "x eager", "x eager, both")


def _cells(row: Timing) -> tuple[str, ...]:
    figures = (row.forward_ms, row.both_ms, row.forward_ratio, row.both_ratio)
    return (row.op, row.size, row.dtype, row.library, *("-" if math.isnan(f) else f"{f:.3g}" for f in figures))


def _sizes(op: FusedOp, is_quick: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The shapes to time: those of large models, or the first of them made small."""
    for size, shape in op.sizes.items():
        if not is_quick:
            yield size, shape
            continue
        small = list(shape)
        for axis in range(len(small) - 1):  # the last axis makes the kernel: it stays
            while small[axis] > 1 and _product(small) > _QUICK_ELEMENTS:
                small[axis] //= 2
        yield f"{size}, small", tuple(small)
        return


def _product(sizes: list[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _timings(op: FusedOp, size: str, shape: tuple[int, ...], dtype: Any, min_run_s: float) -> Iterator[Timing]:
    """The reference and every kernel that serves this call and holds its proof."""
    import torch

    from llm_adapt.ops.dispatch.calling import positional
    from llm_adapt.ops.dispatch.dispatcher import dispatchers

    assert op.example is not None
    arguments = here(op.bind(**op.example(torch.Generator().manual_seed(0), dtype, shape)))
    _, answers = dispatchers[op.name].ask_all(arguments)
    serving = ["reference", *(library for library, (reason, _) in answers.items() if not reason)]
    base: tuple[float, float] | None = None
    for library in serving:
        call = positional(op, op.kernels.get(library))
        times = _measure(op, call, arguments, min_run_s)
        base = base or times
        ratios = (base[0] / times[0], base[1] / times[1])
        yield Timing(op.name, size, shape, str(dtype).removeprefix("torch."), library, *times, *ratios)


def _measure(op: FusedOp, call: Callable[..., Any], arguments: dict[str, Any], min_run_s: float) -> tuple[float, float]:
    """Median milliseconds of forward, and of forward and backward (NaN where there is no gradient)."""
    import torch
    from torch.utils.benchmark import Timer

    from llm_adapt.ops.dispatch.proof import differentiable, named_tensors

    leaves = {name: _leaf(value) for name, value in arguments.items()}
    wanted = [tensor.requires_grad_() for _, tensor in differentiable(op, leaves)]
    values = list(leaves.values())

    def forward() -> Any:
        with torch.no_grad() if not op.mutates else contextlib.nullcontext():
            return call(*values)

    def both() -> None:
        outputs = [value for _, value in named_tensors("", call(*values)) if value.requires_grad]
        torch.autograd.grad([value.sum() for value in outputs], wanted, allow_unused=True)

    median = Timer("act()", globals={"act": forward}).blocked_autorange(min_run_time=min_run_s).median * 1e3
    if not wanted:
        return median, float("nan")
    return median, Timer("act()", globals={"act": both}).blocked_autorange(min_run_time=min_run_s).median * 1e3


def _leaf(value: Any) -> Any:
    import torch

    if isinstance(value, (list, tuple)):
        return type(value)(_leaf(item) for item in value)
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _write(rows: list[Timing], device: str, folder: Path) -> None:
    """bench.json, bench.md and, where matplotlib is installed, bench.png."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": "bench",
        "device": device,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"llm_adapt": llm_adapt.__version__, "torch": torch.__version__},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "results": [row._asdict() for row in rows],
    }
    (folder / "bench.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    head = f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}\n"
    lines = "".join(f"| {' | '.join(_cells(row))} |\n" for row in rows)
    (folder / "bench.md").write_text(f"{device}, torch {torch.__version__}, {record['date']}\n\n{head}{lines}", "utf-8")
    _plot(rows, device, folder / "bench.png")
    print(f"wrote {folder}/bench.json, bench.md, bench.png", file=sys.stderr)


def _plot(rows: list[Timing], device: str, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("llm-adapt: no plot: matplotlib is not installed (pip install llm-adapt[bench])", file=sys.stderr)
        return
    bars = [row for row in rows if row.library != "reference"]
    figure = Figure(figsize=(9, max(2.0, 0.28 * len(bars) + 1)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row.op} {row.dtype} ({row.library})" for row in bars]
    ratios = [row.forward_ratio if math.isnan(row.both_ratio) else row.both_ratio for row in bars]
    axes.barh(names, ratios, color=["tab:green" if ratio >= 1 else "tab:red" for ratio in ratios])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set(title=f"Speed relative to eager PyTorch on {device}", xlabel="x eager, forward and backward (1 = eager)")
    figure.savefig(path, dpi=120)
