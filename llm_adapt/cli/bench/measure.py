"""Measure: all candidates of one call, forward and with backward, timed in turn; counts, shares and peak memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from llm_adapt.cli.bench.candidates import DISPATCHED, EAGER, Candidate, accuracy, candidates
from llm_adapt.cli.bench.cases import Case, Scale
from llm_adapt.cli.bench.counts import Counts, count
from llm_adapt.cli.bench.machine import Machine
from llm_adapt.cli.bench.results import Row, is_slower
from llm_adapt.cli.bench.timing import interval, ratio, take_turns
from llm_adapt.ops.dispatch.call import describe
from llm_adapt.ops.dispatch.proof import differentiable, named_tensors
from llm_adapt.ops.dispatch.registry import FusedOp

__all__ = ["MODES", "Settings", "measure"]

MODES = ("forward", "forward+backward")
_AGAIN = 3  # times the budget for a dispatched call that seems slower than eager


@dataclass(frozen=True)
class Settings:
    """How a case is measured.

    Attributes:
        budget_s: for the rounds of one call in one mode.
        asked: peers that are wanted.
        margin: of results.offenders: a dispatched call that is beyond it is measured again, longer.
    """

    scale: Scale
    budget_s: float
    asked: frozenset[str]
    margin: float = 0.02
    modes: tuple[str, ...] = MODES


@dataclass
class _Act:
    """One candidate on one call: what is timed, and what one run of it gave."""

    candidate: Candidate
    act: Callable[[], Any]
    counts: Counts | None


def measure(op: FusedOp, case: Case, dtype: torch.dtype, machine: Machine, settings: Settings) -> Iterator[Row]:
    """The rows of one case in one dtype."""
    given = case.arguments(op, dtype, settings.scale, "cpu" if machine.is_host else machine.device.type)
    for mode in settings.modes:
        arguments = {name: _leaf(value, machine.device) for name, value in given.items()}
        wanted = [tensor for _, tensor in differentiable(op, arguments)] if op.differentiable != () else []
        with_backward = mode == "forward+backward"
        if with_backward and not wanted:
            continue
        for tensor in wanted:
            tensor.requires_grad_(with_backward)
        yield from _measure_mode(op, case, dtype, machine, settings, (mode, arguments, wanted if with_backward else []))


def _measure_mode(
    op: FusedOp,
    case: Case,
    dtype: torch.dtype,
    machine: Machine,
    settings: Settings,
    of_mode: tuple[str, dict[str, Any], list[torch.Tensor]],
) -> Iterator[Row]:
    mode, arguments, wanted = of_mode
    plain = Row(
        op.name, case.model, case.scaled(settings.scale), str(describe(op.name, op.signature, arguments, op.lists)),
        str(dtype).removeprefix("torch."), mode, "", "",
    )  # fmt: skip
    found, acts = [], {}
    for item in candidates(op, arguments, settings.asked):
        reason = item.refused
        try:
            if item.call is not None:
                acts[item.name] = _act(op, item, arguments, wanted)
        except Exception as error:  # noqa: BLE001 - out of memory, say: it is listed, and the others are measured
            reason = f"raised {type(error).__name__}: {error}".partition("\n")[0]
        found.append(replace(item, refused=reason))
    timed = {name: one.act for name, one in acts.items()}
    samples = take_turns(timed, machine.clock, settings.budget_s) if timed else {}
    rows = [_row(plain, item, acts, samples, machine, dtype, bool(wanted)) for item in found]
    for place, row in enumerate(rows):
        if row.candidate == DISPATCHED and is_slower(row, settings.margin):
            pair = {name: acts[name].act for name in (EAGER, DISPATCHED)}
            again = take_turns(pair, machine.clock, _AGAIN * settings.budget_s, most_rounds=90)
            slower = _row(plain, found[place], acts, again, machine, dtype, bool(wanted))
            errors = [accuracy(op, item, arguments) for item in (found[0], found[place])]
            rows[place] = replace(slower, eager_error=errors[0], error=errors[1])
    for row in rows:
        memory = None if row.refused else machine.peak_bytes(acts[row.candidate].act)
        yield replace(row, peak_bytes=memory)


def _row(
    plain: Row,
    item: Candidate,
    acts: Mapping[str, _Act],
    samples: Mapping[str, list[float]],
    machine: Machine,
    dtype: torch.dtype,
    with_backward: bool,
) -> Row:
    row = replace(plain, candidate=item.name, source=item.source, refused=item.refused)
    if item.refused:
        return row
    time = interval(samples[item.name])
    row = replace(row, seconds=time.median, low=time.low, high=time.high, rounds=len(samples[item.name]))
    if EAGER in samples:
        speed = ratio(samples[EAGER], samples[item.name])
        row = replace(row, ratio=speed.median, ratio_low=speed.low, ratio_high=speed.high)
    # One count for all: what the call needs, not what this candidate does; the first that was run has the results.
    counts = next(iter(acts.values())).counts
    if counts is None:
        return row
    moved, operations = counts.of(with_backward)
    rate = machine.matmul_rate(dtype)
    least = max(moved / machine.bandwidth, operations / rate)
    return replace(
        row,
        bytes=moved,
        flops=operations,
        bandwidth_share=moved / machine.bandwidth / time.median,
        matmul_share=operations / rate / time.median,
        roofline_share=least / time.median,
        copy_share=machine.copy_seconds(int(moved)) / time.median,
    )


def _act(op: FusedOp, item: Candidate, arguments: dict[str, Any], wanted: list[torch.Tensor]) -> _Act:
    """A candidate as an act without arguments; it is run once, for the shapes of its results."""
    call, values = item.call, list(arguments.values())
    assert call is not None

    def forward() -> Any:
        with torch.no_grad() if not op.mutates else contextlib.nullcontext():
            return call(*values)

    results = call(*values) if wanted else forward()
    outputs = [value for _, value in named_tensors("", results)]
    counts = count(op, arguments, outputs, wanted)
    if not wanted:
        return _Act(item, forward, counts)
    places = [place for place, value in enumerate(outputs) if value.requires_grad]
    # A gradient as a model's: dense, its numbers those of no special case.
    upstream = [torch.randn(outputs[p].shape, device=outputs[p].device).to(outputs[p].dtype) for p in places]

    def both() -> Any:
        values_out = [value for _, value in named_tensors("", call(*values))]
        return torch.autograd.grad([values_out[p] for p in places], wanted, upstream, allow_unused=True)

    return _Act(item, both, counts)


def _leaf(value: Any, device: torch.device) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_leaf(item, device) for item in value)
    return value.detach().clone().to(device) if isinstance(value, torch.Tensor) else value
