"""patch(): detect, activate, plan, apply. unpatch(): the reverse. The only place that holds state."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llm_adapt
from llm_adapt import simulators
from llm_adapt.adapters import activate, detect
from llm_adapt.adapters.base import DeviceAdapter
from llm_adapt.errors import PatchError, SettingsError
from llm_adapt.frameworks import coexistence
from llm_adapt.frameworks.context import Context
from llm_adapt.patching import Entry, Plan
from llm_adapt.report import Line, Report, Status
from llm_adapt.settings import Settings, resolve

__all__ = ["current_adapter", "is_patched", "patch", "patch_child", "patched", "report", "unpatch"]

# Each is a module of llm_adapt.frameworks with `rows(context)`.
_TABLES = ("torch_cuda", "megatron", "transformers")
_STATUS: dict[str, Status] = {"waiting": "waiting", "skipped": "skipped", "stale": "problem"}


@dataclass(eq=False)
class _Session:
    """What unpatch() needs to put everything back.

    Attributes:
        environment: variables that patch() changed: name -> value before and after, None = not set.
        pid: the process that called patch(); a forked child is patched too, and leaves the report to its parent.
        blocks: how many `with patched()` blocks are open; None when patch() was called outside of any.
    """

    settings: Settings
    context: Context
    plan: Plan
    environment: Mapping[str, tuple[str | None, str | None]]
    pid: int
    blocks: int | None = None


_session: _Session | None = None
_lock = threading.RLock()


def patch(
    *,
    device: str | None = None,
    simulate: str | None = None,
    strict: bool | None = None,
    cpu_devices: int | None = None,
    out: str | os.PathLike[str] | None = None,
    ops: str | os.PathLike[str] | None = None,
    proof: str | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Report:
    """Make this process run CUDA-written code on the device that is here.

    A second call does nothing; it may repeat the arguments or leave them out. Everything is undone by
    `unpatch()`; if anything fails here, nothing stays patched.

    Args:
        device: "cuda", "npu", "mlu", "dcu" or "cpu"; default: LLM_ADAPT_DEVICE, else the detected device.
        simulate: "npu", "mlu" or "dcu": that device on host memory, until the process ends (LLM_ADAPT_SIMULATE;
            docs/simulators.md).
        strict: every reported skip or mismatch becomes an error (LLM_ADAPT_STRICT).
        cpu_devices: how many CUDA ordinals the CPU presents (LLM_ADAPT_CPU_DEVICES).
        out: folder that receives the report as JSON at unpatch() or the end of the process (LLM_ADAPT_OUT).
        ops: which kernel library serves which op, as text or the path of a TOML file (LLM_ADAPT_OPS; docs/ops.md);
            "off": frameworks keep their own code.
        proof: when kernels are proved: "off", "first", "strict" or "sample:N" (LLM_ADAPT_PROOF).
        cache: folder in which simulators and the CPU's kernels are built (LLM_ADAPT_CACHE).

    Returns:
        The report: what was chosen, and why. It grows as the script imports and calls more.

    Raises:
        SettingsError: an argument or an LLM_ADAPT_* variable has an unknown name or value.
        SimulatorError: the simulator cannot be built or started here.
        DeviceError: no such device, the device is not here, or two devices are and none was chosen.
        PatchError: already patched with other arguments, another tool has taken over, or a row does not resolve.
    """
    arguments: dict[str, Any] = {
        "device": device, "simulate": simulate, "strict": strict, "cpu_devices": cpu_devices, "out": out,
        "ops": ops, "proof": proof, "cache": cache,
    }  # fmt: skip
    with _lock:
        settings = _with_whole_paths(resolve(**arguments))
        if _session is None:
            return _open(settings, "LLM_ADAPT_DEVICE" if device is None else "patch(device=...)").context.report
        active = replace(_session.settings, device=_session.context.adapter.name)
        given = [name for name, value in arguments.items() if value is not None]
        other = [name for name in given if getattr(settings, name) != getattr(active, name)]
        if other:
            asked = ", ".join(f"{name}={getattr(settings, name)!r}" for name in other)
            raise PatchError(
                f"patch({asked}) was asked; this process is patched with {active}. Call llm_adapt.unpatch() first."
            )
        return _session.context.report


def _with_whole_paths(settings: Settings) -> Settings:
    """The settings with absolute paths: the script may change its folder."""
    if settings.out is not None:
        settings = replace(settings, out=os.path.abspath(settings.out))
    if settings.cache is not None:
        settings = replace(settings, cache=os.path.abspath(settings.cache))
    if settings.ops is not None and settings.ops.endswith(".toml"):
        settings = replace(settings, ops=os.path.abspath(settings.ops))
    return settings


def _open(settings: Settings, requested_by: str) -> _Session:
    """Start a session; if that fails, the environment is as before."""
    global _session
    before = dict(os.environ)
    try:
        with _collector_held():
            context, plan = _start(settings, requested_by)
    except BaseException:
        _put_back(_changes(before))
        raise
    _session = _Session(settings, context, plan, _changes(before), os.getpid())
    if settings.out is not None:
        atexit.register(_save)
    return _session


def _start(settings: Settings, requested_by: str) -> tuple[Context, Plan]:
    report = Report()
    if settings.simulate is not None:
        settings = _simulated(settings, report)
    detection = detect(settings.device, requested_by=requested_by)
    adapter = detection.adapter
    report.device = adapter.name
    report.add("device", adapter.name, adapter.title, detection.reason)
    context = Context(adapter, settings, report)
    coexistence.check_switches(context)
    coexistence.check_active(context)
    for line in activate(adapter):
        report.add("device", adapter.name, "activated", line)
    if settings.simulate is not None:
        simulators.install()
        report.sources.append(_observed)
    coexistence.check_active(context)  # again: a plug-in may start a tool of its vendor
    versions = adapter.versions()
    report.versions = {name: "absent" for name in adapter.version_sources} | versions
    policy = _policy(settings, adapter)  # before anything is written: it may be refused
    rows = [
        row
        for table in _TABLES
        for row in importlib.import_module(f"llm_adapt.frameworks.{table}").rows(context)
    ]  # fmt: skip
    plan = Plan(rows, strict=settings.strict, before_import=coexistence.on_import(context))
    plan.apply()
    report.sources.append(lambda: _lines(plan))
    _put_in_force(policy, settings, report)
    return context, plan


def _simulated(settings: Settings, report: Report) -> Settings:
    """Turn this process into one of the simulated device, and say so before anything else."""
    assert settings.simulate is not None
    if settings.cache is not None:
        os.environ["LLM_ADAPT_CACHE"] = settings.cache
    simulation = simulators.enter(settings.simulate)
    name = simulation.simulator.name
    if settings.device not in (None, name):
        raise SettingsError(
            f"Device {settings.device!r} was asked together with the simulator {settings.simulate!r}, which is of "
            f"{name!r}. Drop one of the two."
        )
    report.simulated = f"{simulation.text} ({simulation.simulator.title})"
    return replace(settings, device=name)


def _observed() -> Iterator[Line]:
    """What the simulator saw that would be worth knowing on hardware."""
    for subject, choice, reason in simulators.observed():
        yield Line("simulator", subject, choice, reason)


def _policy(settings: Settings, adapter: DeviceAdapter) -> Any:
    """Who may serve which op: the device's own order of kernel libraries, then what the user says."""
    from llm_adapt.ops.dispatch.policy import Policy, parse_policy, parse_proof

    parts = parse_policy(settings.ops) if settings.ops not in (None, "off") else {}
    return Policy(
        **{"order": adapter.kernel_libraries} | parts,
        proof=parse_proof(settings.proof),
        strict=settings.strict,
        cases="" if settings.out is None else os.path.join(settings.out, "cases"),
        device=adapter.device_type,
    )


def _put_in_force(policy: Any, settings: Settings, report: Report) -> None:
    from llm_adapt.ops.dispatch.in_force import start_over
    from llm_adapt.ops.dispatch.receipt import policy_text, receipt

    start_over(policy)
    if settings.ops == "off":
        report.add("ops", "callers", "off", "ops=off: frameworks keep their own code")
    else:
        report.add("ops", "policy", policy_text(), f"kernels are proved: {policy.proof.words}")
    report.sources.append(_op_lines)
    report.parts["ops"] = receipt
    report.parts["environment"] = _environment


# Variables that choose devices, kernels, numbers or libraries, whoever reads them.
_TELLING = ("LLM_ADAPT_", "TORCH", "PYTORCH_", "CUDA_", "ASCEND_", "HCCL_", "NCCL_", "MLU_", "CNCL_", "HIP_", "TRITON_")


def _environment() -> dict[str, str]:
    """The variables in force that choose devices, kernels or numbers."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_TELLING)}


def _op_lines() -> Iterator[Line]:
    """One line for each kind of call that an op served; a quarantined kernel is a problem."""
    from llm_adapt.ops.dispatch.receipt import receipt

    for row in receipt():
        subject = " ".join(part for part in (row["op"], row["variant"], row["dtype"], row["layer"]) if part)
        refusals = "; ".join(f"{library}: {reason}" for library, reason in row["refusals"].items())
        reason = f"{row['reason']}{', ' + refusals if refusals else ''}; {row['calls']} calls"
        yield Line("op", subject, row["library"], reason, "problem" if "quarantine" in row else "ok")


def _lines(plan: Plan) -> Iterator[Line]:
    """The present state of every row: rows of modules imported since patch() are applied."""
    for row, status, detail in plan.outcomes():
        subject = f"{row.target}[{row.label or repr(row.key)}]" if isinstance(row, Entry) else row.target
        yield Line("patch", subject, status, detail or row.reason, _STATUS.get(status, "ok"))


@contextlib.contextmanager
def _collector_held() -> Iterator[None]:
    """No garbage collection inside: rows are no garbage, and one pass over torch's objects takes longer than they."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def unpatch() -> None:
    """Put everything back as it was before patch(); without a patch, do nothing.

    What somebody else has put in the place of a replacement since is left alone, with a warning.
    """
    global _session
    with _lock:
        if _session is None:
            return
        atexit.unregister(_save)
        try:
            _save()
        finally:
            session, _session = _session, None
            try:
                session.plan.undo()
            finally:
                _take_policy_back()
                _put_back(session.environment)


def _take_policy_back() -> None:
    from llm_adapt.ops.dispatch.in_force import start_over
    from llm_adapt.ops.dispatch.policy import Policy

    start_over(Policy())


@contextlib.contextmanager
def patched(**arguments: Any) -> Iterator[Report]:
    """`with patched(...):` patch inside the block, whatever way it ends. Arguments as for `patch`.

    Blocks may be nested and may overlap in several threads: the last one to end unpatches. Inside a process
    that is patched already, a block changes nothing, on entry or on exit.
    """
    with _lock:
        is_outermost = _session is None
        found = patch(**arguments)
        session = _session
        assert session is not None
        if is_outermost:
            session.blocks = 0
        if session.blocks is not None:
            session.blocks += 1
    try:
        yield found
    finally:
        with _lock:
            if session.blocks is not None:
                session.blocks -= 1
                if session.blocks == 0 and _session is session:
                    unpatch()


def patch_child(arguments: dict[str, Any]) -> str:
    """Patch a spawned child process as its parent is patched; called while the child unpickles its start data.

    The report is the parent's to write.
    """
    with _lock:
        session = _session or _open(replace(resolve(**arguments), out=None), "the parent process")
        return session.context.adapter.name


def is_patched() -> bool:
    """True between patch() and unpatch()."""
    return _session is not None


def report() -> Report:
    """What patch() chose so far.

    Raises:
        PatchError: this process is not patched.
    """
    return _active("report()").context.report


def current_adapter() -> DeviceAdapter:
    """The adapter of the device in use.

    Raises:
        PatchError: this process is not patched.
    """
    return _active("current_adapter()").context.adapter


def _active(asked: str) -> _Session:
    if _session is None:
        raise PatchError(f"llm_adapt.{asked} was asked; this process is not patched. Call llm_adapt.patch() first.")
    return _session


def _changes(before: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    """Variables that differ from `before`: name -> value before and now."""
    names = before.keys() | os.environ.keys()
    pairs = {name: (before.get(name), os.environ.get(name)) for name in names}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def _put_back(changes: Mapping[str, tuple[str | None, str | None]]) -> None:
    """Undo changes of the environment, except where a variable has been changed again since."""
    for name, (old, new) in changes.items():
        if os.environ.get(name) == new:
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old


def _save() -> None:
    """Write the report where it was asked for."""
    session = _session
    if session is not None and session.settings.out is not None and session.pid == os.getpid():
        rank = os.environ.get("RANK", "") or "0"
        name = "report.json" if rank == "0" else f"report.rank{rank}.json"
        session.context.report.save(Path(session.settings.out) / name)


# The import of the submodule of that name has just taken the function's place in the package.
llm_adapt.report = report
