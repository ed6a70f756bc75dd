"""activate: set variables, import torch and the vendor's plug-in once, explain what goes wrong."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable, MutableMapping

from llm_adapt.adapters.base import DeviceAdapter, Finding, FindingKind, KnownFailure
from llm_adapt.adapters.checks import any_mask
from llm_adapt.adapters.detect import adapters
from llm_adapt.adapters.host import Host
from llm_adapt.errors import DeviceError

__all__ = ["AUTOLOAD", "ActivationError", "activate", "explain", "spell_error"]

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # torch >= 2.5 loads each entry point of torch.backends unless "0"
_CUDA_MASK = "CUDA_VISIBLE_DEVICES"

_OF_TRACE = re.compile(r"frame #\d+:|Exception raised from ")  # torch's C++ errors carry their stack

_GENERAL_FAILURES = (
    KnownFailure(
        r"undefined symbol: (\w+)",
        r"a library was built for another torch: it looks for \1, which this torch does not have.",
        "Reinstall torch and the vendor's packages as a pair that the vendor names.",
        FindingKind.VERSIONS,
    ),
    KnownFailure(
        r"Only a single TORCH_LIBRARY can be used to register the namespace",
        "torch is being imported a second time after its first import failed in this process.",
        "Start anew and call llm_adapt.patch() before the first `import torch`, or use `llm-adapt run`.",
    ),
    KnownFailure(
        r"version `((?:GLIBCXX|CXXABI|GLIBC)_[\d.]+)' not found",
        r"a package was built for a newer system library: \1 is missing.",
        "Use the vendor's image, or put a newer libstdc++ first on LD_LIBRARY_PATH.",
        FindingKind.PACKAGES,
    ),
    KnownFailure(
        r"compiled using NumPy 1\.x cannot be run in\s+NumPy 2",
        "a package was built against numpy 1 and numpy 2 is installed.",
        "Run: pip install 'numpy<2'.",
        FindingKind.PACKAGES,
    ),
    KnownFailure(
        r"([\w.+-]+\.so[\w.]*): cannot open shared object",
        r"the shared library \1 is on no library path.",
        "Source the vendor's environment script, or install the package that brings the library.",
    ),
    KnownFailure(
        r"No module named '([\w.]+)'",
        r"the package \1 is not installed.",
        "Install it with pip into this environment.",
        FindingKind.PACKAGES,
    ),
)


class ActivationError(DeviceError):
    """The chosen device cannot be driven; `finding` says the same in parts."""

    def __init__(self, asked: str, finding: Finding) -> None:
        super().__init__(f"{asked}\nCause: {finding.what}\nMend: {finding.mend}")
        self.finding = finding


def activate(adapter: DeviceAdapter, environ: MutableMapping[str, str] | None = None) -> list[str]:
    """Make torch drive this device: variables, `import torch`, the plug-in, the device's own check of torch.

    The caller snapshots the environment before and restores it.

    Returns:
        one line per act, for the report.

    Raises:
        ActivationError: an import failed or this torch cannot drive the device; with cause and mend.
    """
    environ = os.environ if environ is None else environ
    host = Host(environ=environ)
    lines = _set_environment(adapter, environ, host)
    lines += _hold_back_plugins(adapter, environ, host)
    _refuse_half_imported_torch(adapter)
    for package in filter(None, ("torch", adapter.plugin)):
        _import(package, adapter, host)
    try:
        reason = adapter.check_torch()
    except Exception as error:
        raise _failed(adapter, "asking torch for its devices", error, host) from error
    if reason:
        mend = "Run `llm-adapt doctor` for the whole picture, or choose another device with LLM_ADAPT_DEVICE."
        finding = Finding(FindingKind.DEVICE, reason, mend, adapter.name)
        raise ActivationError(f"{adapter.title} was chosen, and this torch cannot drive it.", finding)
    build = host.torch_build()
    return [*lines, f"torch {build.version if build else ''} drives {adapter.title}"]


def _set_environment(adapter: DeviceAdapter, environ: MutableMapping[str, str], host: Host) -> list[str]:
    lines = []
    for name, value in adapter.default_env.items():
        if environ.setdefault(name, value) == value:
            lines.append(f"{name}={value}")
        else:
            lines.append(f"{name}={environ[name]} kept (llm_adapt would set {value})")
    cuda_mask, translate = environ.get(_CUDA_MASK), adapter.mask_from_cuda
    if cuda_mask is None or translate is None or any(name in environ for name in adapter.visible_devices):
        return lines
    mask = adapter.visible_devices[0]
    if any_mask(host, (_CUDA_MASK,)):
        return [*lines, f"{_CUDA_MASK}={cuda_mask!r} hides CUDA devices only; {mask} left unset"]
    try:
        environ[mask] = translate(cuda_mask)
    except ValueError as error:
        what = f"{_CUDA_MASK}={cuda_mask} has no counterpart on {adapter.title}: {error}."
        finding = Finding(FindingKind.ENVIRONMENT, what, f"Set {mask} yourself.", adapter.name)
        asked = f"{adapter.title} was chosen, and it does not read {_CUDA_MASK}."
        raise ActivationError(asked, finding) from None
    return [*lines, f"{mask}={environ[mask]} (from {_CUDA_MASK})"]


def _hold_back_plugins(adapter: DeviceAdapter, environ: MutableMapping[str, str], host: Host) -> list[str]:
    """Keep torch from loading the plug-ins of devices that were not chosen."""
    if "torch" in sys.modules:
        others = {other.plugin for other in adapters().values()} - {"", adapter.plugin}
        return [
            f"{plugin} was imported before and its changes to torch stay; to avoid it "
            f"call llm_adapt.patch() before `import torch`, or set {AUTOLOAD}=0"
            for plugin in sorted(others & sys.modules.keys())
        ]
    points = host.entry_points("torch.backends")
    foreign = [point for point in points if point.module.split(".")[0] != adapter.plugin]
    if not foreign or environ.get(AUTOLOAD, "1") != "1":
        return []
    environ[AUTOLOAD] = "0"
    return [f"{AUTOLOAD}=0, so that torch does not load {', '.join(point.name for point in foreign)}"]


def _refuse_half_imported_torch(adapter: DeviceAdapter) -> None:
    if "torch" in sys.modules or "torch._C" not in sys.modules:
        return
    what = "An earlier `import torch` failed in this process (a vendor's plug-in?); torch cannot start twice."
    mend = "Start anew and call llm_adapt.patch() before the first `import torch`, or use `llm-adapt run`."
    asked = f"{adapter.title} was chosen, and torch is half imported."
    raise ActivationError(asked, Finding(FindingKind.PLUGIN, what, mend, adapter.name))


def _import(package: str, adapter: DeviceAdapter, host: Host) -> None:
    try:
        importlib.import_module(package)
    except Exception as error:
        raise _failed(adapter, f"`import {package}`", error, host) from error


def _failed(adapter: DeviceAdapter, act: str, error: Exception, host: Host) -> ActivationError:
    text = spell_error(error)
    asked = f"{adapter.title} was chosen, and {act} failed: {text.splitlines()[0]}"
    return ActivationError(asked, explain(f"{act}\n{text}", adapters().values(), host))


def spell_error(error: BaseException | None) -> str:
    """Write an error and its causes, the root last: torch hides a plug-in's own error behind its own."""
    parts: list[str] = []
    while error is not None and len(parts) < 9:
        parts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(parts)


def explain(text: str, known: Iterable[DeviceAdapter], host: Host) -> Finding:
    """Find the cause of a failed import in its text: vendors' tables, then version pairs, then general ones.

    Args:
        text: the error and its causes as `spell_error` writes them.
        known: adapters whose tables are searched.
        host: where to look whether a plug-in that the text names pairs with its torch.
    """
    known = tuple(known)
    for adapter in known:
        for failure in adapter.known_failures:
            if match := re.search(failure.pattern, text):
                return _as_finding(failure, match, adapter.name)
    for adapter in known:
        if adapter.plugin and adapter.plugin in text:
            for finding in adapter.diagnose(host):
                if finding.kind is FindingKind.VERSIONS:
                    return finding
    for failure in _GENERAL_FAILURES:
        if match := re.search(failure.pattern, text):
            return _as_finding(failure, match, "")
    said = (line for line in text.splitlines() if line.strip() and not _OF_TRACE.match(line))
    last = list(said)[-1:] or ["no message"]
    mend = "If `import torch` fails without llm_adapt too, reinstall torch; else report this line."
    return Finding(FindingKind.PLUGIN, f"not known to llm_adapt: {last[0].strip()}", mend)


def _as_finding(failure: KnownFailure, match: re.Match[str], device: str) -> Finding:
    return Finding(failure.kind, match.expand(failure.cause), failure.mend, device)
