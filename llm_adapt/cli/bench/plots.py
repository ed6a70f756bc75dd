"""Plots: ratio to eager, share of the roofline, and attention against the length of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_adapt.cli.bench.candidates import DISPATCHED, EAGER
from llm_adapt.cli.bench.cases import SWEEP_MODEL
from llm_adapt.cli.bench.results import Row

__all__ = ["draw"]

# Distinct for people who do not tell red from green.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999")


def draw(rows: Sequence[Row], title: str, folder: Path) -> list[str]:
    """Write the plots that these rows have something for; the names of the files."""
    measured = [row for row in rows if row.seconds is not None]
    calls = [row for row in measured if not row.model.startswith(SWEEP_MODEL)]
    plots = {
        "ratio_to_eager.png": (_ratios, [row for row in _whole(calls) if row.candidate == DISPATCHED and row.ratio]),
        "roofline.png": (_roofline, [row for row in _whole(calls) if row.candidate in (DISPATCHED, EAGER)]),
        "attention_length.png": (_lengths, [row for row in measured if row.model.startswith(SWEEP_MODEL)]),
    }
    written = []
    for name, (plot, shown) in plots.items():
        if shown:
            figure = plot(shown, title)
            figure.savefig(folder / name, dpi=130)
            written.append(name)
    return written


def _whole(rows: Sequence[Row]) -> list[Row]:
    """Of each call the forward with backward; the forward where there is no backward."""
    trained = {(row.op, row.model, row.dtype) for row in rows if row.mode != "forward"}
    return [row for row in rows if row.mode != "forward" or (row.op, row.model, row.dtype) not in trained]


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # an extra: the command says so where it is not installed

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def _label(row: Row) -> str:
    return f"{row.op}, {row.model}" + (" (forward)" if row.mode == "forward" else "")


def _ratios(rows: Sequence[Row], title: str) -> Any:
    """One line a call: the ratio with its interval, a colour a dtype, the library beside it."""
    labels = list(dict.fromkeys(map(_label, rows)))
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    figure, axes = _figure(10, max(2.5, 0.3 * len(labels) + 1.2))
    for number, dtype in enumerate(dtypes):
        shown = [row for row in rows if row.dtype == dtype]
        places = [labels.index(_label(row)) + 0.3 * (number / max(len(dtypes) - 1, 1) - 0.5) for row in shown]
        values = [row.ratio or 0.0 for row in shown]
        errors = [
            [max(0.0, v - (row.ratio_low or v)) for row, v in zip(shown, values, strict=True)],
            [max(0.0, (row.ratio_high or v) - v) for row, v in zip(shown, values, strict=True)],
        ]
        colour = _COLOURS[number % len(_COLOURS)]
        axes.errorbar(values, places, xerr=errors, fmt="o", color=colour, label=dtype, markersize=5, capsize=2)
        for row, value, place in zip(shown, values, places, strict=True):
            axes.annotate(row.source, (value, place), (6, 3), textcoords="offset points", fontsize=6, color=colour)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}x")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("speed of what dispatch serves relative to eager, with 95 % interval (right of 1: faster)")
    axes.set_title(title, fontsize=9)
    axes.legend()
    return figure


def _roofline(rows: Sequence[Row], title: str) -> Any:
    """One line a call: how near eager and the dispatched kernel come to what the machine measured."""
    rows = [row for row in rows if row.roofline_share is not None]
    dtype = rows[0].dtype if rows else ""
    rows = [row for row in rows if row.dtype == dtype]
    labels = list(dict.fromkeys(map(_label, rows)))
    figure, axes = _figure(10, max(2.5, 0.26 * len(labels) + 1.2))
    for colour, name, marker in ((_COLOURS[7], EAGER, "s"), (_COLOURS[0], DISPATCHED, "o")):
        shown = [row for row in rows if row.candidate == name]
        values = [100 * (row.roofline_share or 0.0) for row in shown]
        axes.plot(values, [labels.index(_label(row)) for row in shown], marker, color=colour, label=name)
    axes.axvline(100.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(f"share of the measured roofline, {dtype} (beyond 100 %: the data stays in a cache)")
    axes.set_title(title, fontsize=9)
    axes.legend()
    return figure


def _lengths(rows: Sequence[Row], title: str) -> Any:
    """Time and peak memory of attention against the length, on logarithmic axes."""
    figure, (times, memory) = _figure(11, 4.5, 2)
    names = list(dict.fromkeys(row.candidate for row in rows))
    for number, name in enumerate(names):
        shown = sorted((int(row.model.removeprefix(SWEEP_MODEL)), row) for row in rows if row.candidate == name)
        label = f"{name} ({shown[-1][1].source})" if name == DISPATCHED else name
        style = {"color": _COLOURS[number % len(_COLOURS)], "marker": "osv^dPX*"[number % 8], "label": label}
        times.plot([n for n, _ in shown], [1e3 * (row.seconds or 0.0) for _, row in shown], **style)
        known = [(n, row.peak_bytes / 2**20) for n, row in shown if row.peak_bytes]
        memory.plot([n for n, _ in known], [size for _, size in known], **style)
    for axes, what in ((times, "forward and backward, ms"), (memory, "peak memory of a call, MiB")):
        low = min(line.get_ydata()[0] for line in axes.lines if len(line.get_ydata()))
        lengths = sorted({int(row.model.removeprefix(SWEEP_MODEL)) for row in rows})
        for power, dashes, words in ((1, ":", "linear"), (2, "--", "quadratic")):
            guide = [low * (length / lengths[0]) ** power for length in lengths]
            axes.plot(lengths, guide, dashes, color="grey", linewidth=1, label=words)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set(xlabel="length of the sequence", ylabel=what)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.3)
    times.legend(fontsize=7)
    figure.suptitle(f"Attention, 4 heads of 64, causal, {rows[0].dtype}: {title}", fontsize=9)
    return figure
