"""Results: one row for each candidate of each call, as JSON and Markdown, and who is slower than eager."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_adapt.cli.bench.candidates import DISPATCHED, EAGER

__all__ = ["SCHEMA", "Row", "is_more_accurate", "is_slower", "markdown", "offenders", "write"]

SCHEMA = 1  # of bench.json; changes when a field changes its meaning
_ERRORS = 3  # times the error: what rounds once more has at most twice as much
DISPATCH_S = 1e-6  # what one dispatched call may cost beyond its kernel (benchmarks/dispatch.py holds it to that)


@dataclass(frozen=True)
class Row:
    """One candidate of one call. Times in seconds, with the 95 % interval of the median; None where not measured.

    Attributes:
        scaled: what was narrowed, "" for the sizes of the model.
        mode: "forward" (no_grad), or "forward+backward".
        source: what the candidate is; of "dispatched" the library that serves.
        refused: why it was not timed, "" when it was.
        ratio: time of eager / time of this one, formed within each round; above 1 this one is faster.
        bandwidth_share, matmul_share: of the copy bandwidth and of the matmul rate that were measured in this run.
        roofline_share: the least time by these two / the time; above 1 where data stays in a cache.
        copy_share: the time in which a copy moves as many bytes in this run / the time.
        eager_error, error: of a dispatched call that is slower than eager, the largest error of both, as shares of what
            a kernel is allowed.
        peak_bytes: what one call allocates at its peak, results included.
    """

    op: str
    model: str
    scaled: str
    call: str
    dtype: str
    mode: str
    candidate: str
    source: str
    refused: str = ""
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    bytes: float | None = None
    flops: float | None = None
    bandwidth_share: float | None = None
    matmul_share: float | None = None
    roofline_share: float | None = None
    copy_share: float | None = None
    peak_bytes: float | None = None
    eager_error: float | None = None
    error: float | None = None

    @property
    def kind(self) -> tuple[str, str, str, str]:
        """Rows of one kind are candidates of one call."""
        return self.op, self.model, self.dtype, self.mode


def offenders(rows: Sequence[Row], margin: float) -> list[Row]:
    """Dispatched calls that are slower than eager beyond the interval of their ratio, and no more accurate.

    Args:
        margin: a share of the time that is allowed on top, and so is what dispatch itself costs a call, 1 us.
    """
    slower = [row for row in rows if row.candidate == DISPATCHED and is_slower(row, margin)]
    return [row for row in slower if not is_more_accurate(row)]


def is_more_accurate(row: Row) -> bool:
    """Whether eager is beyond the tolerance, and what serves is not, or eager's error is several times the other's."""
    eager, served = row.eager_error or 0.0, row.error
    return served is not None and eager > 0.0 and (eager > 1.0 >= served or eager >= _ERRORS * served)


def is_slower(row: Row, margin: float) -> bool:
    """Whether even the best end of the interval is slower than eager, with the margin."""
    if row.ratio_high is None or row.seconds is None:
        return False
    allowed = 1 + margin + DISPATCH_S / max(row.seconds * row.ratio_high, 1e-9)
    return row.ratio_high * allowed < 1.0


def write(record: dict[str, Any], rows: Sequence[Row], folder: Path) -> list[str]:
    """bench.json and bench.md in a folder that exists; the names of what was written."""
    results = [dataclasses.asdict(row) for row in rows]
    text = json.dumps(_finite(record | {"results": results}), indent=1, allow_nan=False) + "\n"
    (folder / "bench.json").write_text(text, encoding="utf-8")
    (folder / "bench.md").write_text(markdown(record, rows), encoding="utf-8")
    return ["bench.json", "bench.md"]


def _finite(value: Any) -> Any:
    """JSON has no nan: what is not a number is not there."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


COLUMNS = ("op", "model", "dtype", "mode", "candidate", "ms (95 %)", "x eager (95 %)", "% of roofline", "% of copy",
           "peak MiB")  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """A row as the tables show it."""
    name = f"{row.candidate} ({row.source})" if row.candidate == DISPATCHED else row.candidate
    head = (row.op, row.model, row.dtype, row.mode, name)
    if row.refused:
        return (*head, f"refused: {row.refused}", "", "", "", "")
    assert row.seconds is not None
    low, high = row.low or row.seconds, row.high or row.seconds
    time = f"{row.seconds * 1e3:.3g} ({low * 1e3:.3g}-{high * 1e3:.3g})"
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f} ({row.ratio_low:.2f}-{row.ratio_high:.2f})"
    roofline = "-" if row.roofline_share is None else f"{100 * row.roofline_share:.0f}"
    copy = "-" if row.copy_share is None else f"{100 * row.copy_share:.0f}"
    memory = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.4g}"
    return (*head, time, ratio, roofline, copy, memory)


def markdown(record: dict[str, Any], rows: Sequence[Row]) -> str:
    """The results for people: where, how, the dispatched choices, then every candidate."""
    facts = record["facts"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    rates = ", ".join(f"{name} {rate} Gop/s" for name, rate in facts["matmul_gflop_s"].items())
    lines = [
        f"# Operators on {facts['device']}",
        "",
        f"{facts['machine']}, {facts['cores']} cores, {facts['threads']} threads; {versions}; {facts['started']}.",
        f"Command: `{record['command']}`, policy: {record['policy']}.",
        f"Copy {facts['copy_bandwidth_gb_s']} GB/s; matmul {rates}. Peak memory: {facts['memory']}.",
        f"Not here: {', '.join(record['absent']) or 'nothing that was asked for'}.",
        f"Confidence {record['confidence']:.0%}; ratios above 1 are faster than eager.",
        "",
        *_summary(rows),
        "## Every candidate",
        "",
        *_table(COLUMNS, [cells(row) for row in rows]),
        "",
        "## What was narrowed",
        "",
        *sorted({f"- {row.op}, {row.model}: {row.scaled}" for row in rows if row.scaled}),
    ]
    return "\n".join(lines) + "\n"


def _summary(rows: Sequence[Row]) -> list[str]:
    """The dispatched choice of every call beside eager."""
    chosen = [row for row in rows if row.candidate == DISPATCHED and not row.refused]
    eager = {row.kind: row.source for row in rows if row.candidate == EAGER}
    shown = [(*cells(row), eager.get(row.kind, "none")) for row in chosen]
    return ["## What users get", "", *_table((*COLUMNS, "eager is"), shown), ""]


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return head + ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
