"""Candidates: everything that could compute one call, each proved against the float64 reference or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from llm_adapt.cli.bench import peers
from llm_adapt.cli.bench.counterparts import WITHOUT, eager_of
from llm_adapt.errors import KernelError
from llm_adapt.ops.dispatch.call import Call
from llm_adapt.ops.dispatch.calling import positional
from llm_adapt.ops.dispatch.choice import refusal
from llm_adapt.ops.dispatch.dispatcher import Dispatcher, dispatchers
from llm_adapt.ops.dispatch.in_force import policy_in_force, using
from llm_adapt.ops.dispatch.proof import compare, float_dtypes, named_tensors, prove, run_op
from llm_adapt.ops.dispatch.proving_ground import apart
from llm_adapt.ops.dispatch.registry import REFERENCE, FusedOp, Kernel, library_names, load_library

__all__ = [
    "DISPATCHED",
    "EAGER",
    "INDUCTOR",
    "Candidate",
    "absent",
    "accuracy",
    "candidates",
    "check_peers",
    "listing",
    "peer_names",
]

EAGER, DISPATCHED, INDUCTOR = "eager", "dispatched", "inductor"
_FORGIVEN = 16  # times the tolerance of a kernel, for eager alone, and said beside it
_MOST_ELEMENTS = 2**20  # a larger call is proved on a part of it, as dispatch does


@dataclass(frozen=True)
class Candidate:
    """One way to compute a call.

    Attributes:
        name: "eager", "reference", "dispatched", or the name of a kernel library or peer.
        source: what it is; of "dispatched" the library that dispatch chose.
        call: takes all of the op's arguments by position; None when it is refused.
        refused: why it is not timed, "" when it is.
    """

    name: str
    source: str
    call: Callable[..., Any] | None
    refused: str = ""


def peer_names() -> list[str]:
    """Names that --peers takes."""
    return sorted({*peers.PEERS, INDUCTOR, *library_names()} - {REFERENCE})


def candidates(op: FusedOp, arguments: dict[str, Any], asked: frozenset[str]) -> list[Candidate]:
    """Everything that could compute this call: eager, the reference, what dispatch serves, libraries and peers.

    Args:
        asked: peers, and kernel libraries beyond this device's order, that are wanted.
    """
    dispatcher = dispatchers[op.name]
    call = dispatcher.describe(arguments)
    eager, kernel = _eager(op, call, arguments)
    found = [eager, Candidate(REFERENCE, "the definition of the op", positional(op, None))]
    answers = _answers(op, arguments, asked)
    found += [_dispatched(dispatcher, answers), *_libraries(op, answers)]
    if INDUCTOR in asked and INDUCTOR not in answers and kernel is not None:
        found.append(_inductor(op, call, arguments, kernel))
    for name in sorted(asked & peers.PEERS.keys()):
        kernels, _ = peers.peers_of(name)
        if op.name in kernels:
            found.append(_proved(op, kernels[op.name], call, arguments))
    return found


def absent(asked: frozenset[str]) -> dict[str, str]:
    """Libraries and peers that were asked for and cannot be imported: name -> why."""
    libraries = {*policy_in_force().order, *(asked & set(library_names()))} - {REFERENCE, INDUCTOR}
    reasons = {name: load_library(name) for name in sorted(libraries)}
    reasons |= {name: peers.peers_of(name)[1] for name in sorted(asked & peers.PEERS.keys())}
    return {name: reason for name, reason in reasons.items() if reason}


def _eager(op: FusedOp, call: Call, arguments: dict[str, Any]) -> tuple[Candidate, Kernel | None]:
    """The first formulation that takes the call and holds its proof."""
    reasons = []
    for kernel in eager_of(op.name):
        found = _proved(op, kernel, call, arguments)
        if found.call is None and "failed its proof" in found.refused:
            wider = _proved(_forgiving(op), kernel, call, arguments)
            if wider.call is not None:
                words = f"{kernel.source} (beyond the tolerance, within {_FORGIVEN} times it)"
                found = replace(wider, source=words)
        if found.call is not None:
            return found, kernel
        reasons.append(f"{kernel.source}: {found.refused}")
    nobody = WITHOUT.get(op.name, "no framework function is known for this op")
    return Candidate(EAGER, "none", None, "; ".join(reasons) or f"no counterpart: {nobody}"), None


def _forgiving(op: FusedOp) -> FusedOp:
    """The op with a wider tolerance: frameworks round between steps, and what they run is the yardstick."""
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    forward = {dtype: _FORGIVEN * op.tolerance.rtol(dtype) for dtype in dtypes}
    return replace(op, tolerance=replace(op.tolerance, forward=op.tolerance.forward | forward))


def _proved(op: FusedOp, kernel: Kernel, call: Call, arguments: dict[str, Any]) -> Candidate:
    """A candidate that dispatch's rules admit and dispatch's proof holds for, else its refusal."""
    reason = refusal(op, kernel, call)
    if not reason:
        verdict = prove(op, kernel, arguments)
        reason = "" if verdict.holds else f"failed its proof: {verdict.reason}"
    return Candidate(kernel.library, kernel.source, None if reason else positional(op, kernel), reason)


def _answers(op: FusedOp, arguments: dict[str, Any], asked: frozenset[str]) -> dict[str, str]:
    """Library -> why it does not serve, "" when it does: of this device's order, a choice, and those asked beyond."""
    policy = policy_in_force()
    chosen = {policy.chosen(op.name)} - {"", REFERENCE}
    beyond = sorted((asked & set(library_names()) - {INDUCTOR, REFERENCE} | chosen) - set(policy.order))
    with using(replace(policy, order=(*policy.order, *beyond), choose={}, layers=())), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a quarantine: its reason is shown with the candidate
        _, answers = dispatchers[op.name].ask_all(arguments)
    return {library: reason for library, (reason, _) in answers.items()}


def accuracy(op: FusedOp, item: Candidate, arguments: dict[str, Any]) -> float:
    """The largest error of eager, or of who serves a dispatched call, as a share of what a kernel is allowed."""
    if item.name == EAGER:
        kernel = next(kernel for kernel in eager_of(op.name) if item.source.startswith(kernel.source))
        op = _forgiving(op)
    else:
        plain = Kernel(op.name, REFERENCE, op.reference, "the definition of the op")
        kernel = op.kernels.get(item.source, plain)
    share = _FORGIVEN if item.name == EAGER else 1
    return share * max(prove(op, kernel, arguments).errors.values(), default=0.0)


def _libraries(op: FusedOp, answers: dict[str, str]) -> list[Candidate]:
    """The kernels of this op. A library that has none is not listed; one that is not here is listed once for all."""
    kernels = ((op.kernels[library], reason) for library, reason in answers.items() if library in op.kernels)
    return [Candidate(k.library, k.source, None if reason else positional(op, k), reason) for k, reason in kernels]


def _dispatched(dispatcher: Dispatcher, answers: dict[str, str]) -> Candidate:
    """The entry that users call, and whom it calls; an explicit choice never falls back."""
    policy = policy_in_force()
    chosen = policy.chosen(dispatcher.op.name)
    serves = chosen or next((name for name in policy.order if not answers[name]), REFERENCE)
    refused = answers.get(chosen, "")
    return Candidate(DISPATCHED, serves, None if refused else dispatcher.entry, refused)


def _inductor(op: FusedOp, call: Call, arguments: dict[str, Any], eager: Kernel) -> Candidate:
    """The eager formulation compiled; proved once, since every kind of call costs a compilation."""
    kernel = peers.inductor(eager)
    reason = refusal(op, kernel, call)
    if not reason:
        try:
            reason = apart(lambda: _difference(op, kernel, arguments), call.device)
        except Exception as error:  # noqa: BLE001 - a compiler may raise anything; it is the reason that is shown
            reason = f"it raised {type(error).__name__}: {error}".partition("\n")[0]
    return Candidate(INDUCTOR, kernel.source, None if reason else positional(op, kernel), reason)


def _difference(op: FusedOp, kernel: Kernel, arguments: dict[str, Any]) -> str:
    """What differs from the float64 reference, "" when nothing does beyond the tolerance."""
    elements = sum(tensor.numel() for value in arguments.values() for _, tensor in named_tensors("", value))
    if elements > _MOST_ELEMENTS and op.shrink is not None:
        arguments = op.shrink(arguments)
    if op.random:
        arguments = arguments | {op.random: 0.0}
    expected = run_op(op, op.reference, arguments, oracle=op.oracle)
    ours = run_op(op, kernel.function, {name: arguments[name] for name in kernel.honours})
    verdict = compare(op, ours, expected, float_dtypes(arguments))
    return "" if verdict.holds else f"failed its proof: {verdict.reason}"


def check_peers(text: str | None, default: frozenset[str]) -> frozenset[str]:
    """The peers that --peers names: "all", "none", or names separated by commas.

    Raises:
        KernelError: a name that is none.
    """
    if text is None:
        return default
    known = set(peer_names())
    if text in ("all", "none"):
        return frozenset(known if text == "all" else ())
    names = {name.strip() for name in text.split(",") if name.strip()}
    if unknown := sorted(names - known):
        raise KernelError(f"--peers {', '.join(unknown)} was asked; there are: all, none, {', '.join(sorted(known))}.")
    return frozenset(names)


def listing(op: FusedOp, asked: frozenset[str]) -> Iterator[tuple[str, str]]:
    """(name, what it is) of everything that could be asked about an op; nothing is imported but peers."""
    kernels = eager_of(op.name)
    yield EAGER, "; ".join(kernel.source for kernel in kernels) or f"none: {WITHOUT.get(op.name, 'none is known')}"
    for library in policy_in_force().order:
        if library in op.kernels:
            yield library, op.kernels[library].source
    for name in sorted(asked & peers.PEERS.keys()):
        offered, reason = peers.peers_of(name)
        if reason or op.name in offered:
            yield name, f"not here: {reason}" if reason else offered[op.name].source
