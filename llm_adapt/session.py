"""patch(): detect, activate, plan, apply. unpatch(): the reverse. The only place that holds state."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_adapt.adapters import activate, detect
from llm_adapt.adapters.base import DeviceAdapter
from llm_adapt.errors import PatchError
from llm_adapt.frameworks import coexistence
from llm_adapt.frameworks.context import Context
from llm_adapt.patching import Entry, Plan
from llm_adapt.report import Report
from llm_adapt.settings import Settings, resolve

__all__ = ["current_adapter", "is_patched", "patch", "patch_child", "patched", "report", "unpatch"]

# Each is a module of llm_adapt.frameworks with `rows(context)`.
_TABLES = ("torch_cuda", "megatron")


@dataclass
class _Session:
    """What unpatch() needs to put everything back."""

    settings: Settings
    context: Context
    plan: Plan
    environment: dict[str, str]

    def refresh(self) -> Report:
        """The report with the present state of every row (rows of modules imported since are applied)."""
        report = self.context.report
        report.lines = [line for line in report.lines if line.section != "patch" or line.reason.startswith("=")]
        for outcome in self.plan.outcomes.values():
            row = outcome.row
            status: Any = {"applied": "ok", "waiting": "waiting", "skipped": "skipped", "stale": "problem"}
            subject = f"{row.target}[{row.key!r}]" if isinstance(row, Entry) else row.target
            report.add("patch", subject, outcome.status, outcome.detail or row.reason, status[outcome.status])
        return report


_session: _Session | None = None
_lock = threading.RLock()


def patch(
    *,
    device: str | None = None,
    strict: bool | None = None,
    cpu_devices: int | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Report:
    """Make this process run CUDA-written code on the device that is here.

    A second call with the same arguments does nothing. Everything is undone by `unpatch()`; if anything fails
    here, nothing stays patched.

    Args:
        device: "cuda", "npu", "mlu", "dcu" or "cpu"; default: LLM_ADAPT_DEVICE, else the detected device.
        strict: every reported skip or mismatch becomes an error (LLM_ADAPT_STRICT).
        cpu_devices: how many CUDA ordinals the CPU presents (LLM_ADAPT_CPU_DEVICES).
        out: folder that receives the report as JSON when the process ends (LLM_ADAPT_OUT).

    Returns:
        The report: what was chosen, and why. It grows as the script imports and calls more.

    Raises:
        SettingsError: an argument or an LLM_ADAPT_* variable has an unknown name or value.
        DeviceError: no such device, the device is not here, or two devices are and none was chosen.
        PatchError: already patched with other arguments, another tool has taken over, or a row does not resolve.
    """
    global _session
    with _lock:
        settings = resolve(device=device, strict=strict, cpu_devices=cpu_devices, out=out)
        if _session is not None:
            if settings != _session.settings:
                raise PatchError(
                    f"patch() was asked with {settings}; this process is patched with {_session.settings}. "
                    "Call llm_adapt.unpatch() first."
                )
            return _session.refresh()
        environment = dict(os.environ)
        try:
            requested_by = "patch(device=...)" if device is not None else "LLM_ADAPT_DEVICE"
            _session = _start(settings, requested_by, environment)
        except BaseException:
            _restore_environment(environment)
            raise
        if settings.out is not None:
            atexit.register(_save_at_exit)
        return _session.refresh()


def _start(settings: Settings, requested_by: str, environment: dict[str, str]) -> _Session:
    report = Report()
    detection = detect(settings.device, requested_by=requested_by)
    adapter = detection.adapter
    report.device = adapter.name
    report.add("device", adapter.name, adapter.title, detection.reason)
    context = Context(adapter, settings, report)
    coexistence.check_active(context)
    for line in activate(adapter):
        report.add("device", adapter.name, "activated", line)
    report.add_versions(adapter.version_sources)
    rows = [
        row
        for table in _TABLES
        for row in importlib.import_module(f"llm_adapt.frameworks.{table}").rows(context)
    ]  # fmt: skip
    plan = Plan(
        rows,
        strict=settings.strict,
        refused=coexistence.refused_modules(context),
        before_import=coexistence.refuse_import,
    )
    plan.apply()
    return _Session(settings, context, plan, environment)


def unpatch() -> None:
    """Put everything back as it was before patch(); without a patch, do nothing."""
    global _session
    with _lock:
        session, _session = _session, None
        if session is None:
            return
        atexit.unregister(_save_at_exit)
        session.plan.undo()
        _restore_environment(session.environment, only=session.context.adapter.default_env)


@contextlib.contextmanager
def patched(**arguments: Any) -> Iterator[Report]:
    """`with patched(...):` patch inside the block, whatever way it ends. Arguments as for `patch`.

    Inside a process that is patched already, the block changes nothing, on entry or on exit.
    """
    with _lock:
        outermost = _session is None
        found = patch(**arguments)
    try:
        yield found
    finally:
        if outermost:
            unpatch()


def patch_child(arguments: dict[str, Any]) -> str:
    """Patch a spawned child process as its parent is patched; called while the child unpickles its start data."""
    return patch(**arguments).device


def is_patched() -> bool:
    """True between patch() and unpatch()."""
    return _session is not None


def report() -> Report:
    """What patch() chose so far.

    Raises:
        PatchError: this process is not patched.
    """
    return _active("report()").refresh()


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


def _restore_environment(before: dict[str, str], only: Any = None) -> None:
    """Put variables back: all of them after a failed patch(), those of the adapter after unpatch()."""
    for name in set(os.environ) | set(before) if only is None else only:
        if name in before:
            os.environ[name] = before[name]
        else:
            os.environ.pop(name, None)


def _save_at_exit() -> None:
    session = _session
    if session is not None and session.settings.out is not None:
        rank = int(os.environ.get("RANK", "0"))
        name = "report.json" if rank == 0 else f"report.rank{rank}.json"
        session.refresh().save(Path(session.settings.out) / name)
