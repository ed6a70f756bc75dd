"""What the doctor looks at: the settings, every device's own diagnosis, packages that break any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llm_adapt.adapters import Detection, DeviceAdapter, Finding, FindingKind, Host, Probe, adapters, detect
from llm_adapt.adapters.activation import AUTOLOAD
from llm_adapt.cli.doctor_start import PLAIN, Start
from llm_adapt.errors import DeviceError, SettingsError
from llm_adapt.settings import SETTINGS, read_environment

__all__ = ["EXIT_CODES", "Diagnosis", "examine"]

EXIT_CODES = {
    FindingKind.PLUGIN: 10,
    FindingKind.VERSIONS: 11,
    FindingKind.ENVIRONMENT: 12,
    FindingKind.PERMISSIONS: 13,
    FindingKind.PACKAGES: 14,
    FindingKind.DEVICE: 15,
    FindingKind.NOTE: 0,
}
_VARIABLE = SETTINGS["device"].variable
_SEVERITY = list(FindingKind)


@dataclass(frozen=True)
class Diagnosis:
    """What this machine has, what would be chosen and why, and what is broken."""

    requested: str | None
    detection: Detection | None
    probes: tuple[tuple[str, Probe], ...]
    versions: dict[str, str]
    starts: tuple[Start, ...]
    findings: tuple[Finding, ...]  # the most severe first

    @property
    def exit_code(self) -> int:
        """Code of the most severe finding, 0 when nothing is broken."""
        return EXIT_CODES[self.findings[0].kind] if self.findings else 0


def examine(host: Host, requested: str | None, start: Callable[[str], Start] | None) -> Diagnosis:
    """Look at the machine, detect, and let `start` try torch in a child process (None = do not try)."""
    by = "--device" if requested else _VARIABLE
    requested = requested or host.environ.get(_VARIABLE, "").strip() or None
    findings, detection, known = _settings(host), None, adapters(host)
    try:
        detection = detect(requested, by, host)
        probes = detection.probes
        findings += _hidden_devices(known, probes, requested)
    except DeviceError as error:
        probes = tuple((name, adapter.probe(host)) for name, adapter in known.items())
        mend = f"Change or drop the request: {_VARIABLE}=<name>, patch(device=<name>)."
        findings.append(Finding(FindingKind.DEVICE, str(error).splitlines()[0], mend))
    for adapter in known.values():
        findings += adapter.diagnose(host)
    for check in (_torch, _plugins, _tritons, _apex, _transformer_engine):
        findings += check(host)
    starts = _starts(host, detection, start) if start and host.torch_build() else ()
    findings = _prefer_tried(findings, starts)
    findings.sort(key=lambda found: _SEVERITY.index(found.kind))
    versions = known[detection.adapter.name if detection else "cpu"].versions(host)
    return Diagnosis(requested, detection, probes, versions, starts, tuple(findings))


def _settings(host: Host) -> list[Finding]:
    try:
        simulate = read_environment(host.environ).simulate
    except SettingsError as error:
        mend = "Correct or unset it: patch() and the other commands refuse to start."
        return [Finding(FindingKind.ENVIRONMENT, str(error), mend)]
    if simulate is None:
        return []
    what = f"LLM_ADAPT_SIMULATE={simulate}: patch() and the other commands run on that simulated device."
    return [Finding(FindingKind.NOTE, what, "Unset it to run on the device chosen above.")]


def _hidden_devices(
    known: dict[str, DeviceAdapter], probes: tuple[tuple[str, Probe], ...], requested: str | None
) -> list[Finding]:
    """Report devices that are masked or whose plug-in has no device, unless another was asked for."""
    findings = []
    for name, probe in probes:
        if requested not in (None, name) or probe.found:
            continue
        if probe.masked:
            mend = f"Unset the variable, or accept the choice with {_VARIABLE}=cpu."
            findings.append(Finding(FindingKind.DEVICE, f"{probe.reason}.", mend, name))
        elif probe.loadable and known[name].plugin:
            mend = f"Run on a node that has the device, or accept the choice with {_VARIABLE}=cpu."
            findings.append(Finding(FindingKind.DEVICE, f"{probe.reason}.", mend, name))
    return findings


def _torch(host: Host) -> list[Finding]:
    if host.torch_build() is not None:
        return []
    mend = "Install the torch that the vendor of your device names."
    return [Finding(FindingKind.PACKAGES, "torch is not installed.", mend)]


def _plugins(host: Host) -> list[Finding]:
    points = host.entry_points("torch.backends")
    if len(points) < 2:
        return []
    what = f"`import torch` loads {len(points)} plug-ins: {', '.join(point.name for point in points)}."
    mend = f"If they conflict, uninstall one or set {AUTOLOAD}=0; llm_adapt loads only the chosen one."
    return [Finding(FindingKind.NOTE, what, mend)]


def _tritons(host: Host) -> list[Finding]:
    owners = host.owners("triton/__init__.py")
    if len(owners) < 2:
        return []
    what = f"{' and '.join(owners)} share the folder triton/: the one installed last overwrote the rest."
    mend = "Uninstall all of them (pip uninstall -y), then install only the one for your device."
    return [Finding(FindingKind.PACKAGES, what, mend)]


def _apex(host: Host) -> list[Finding]:
    origin = host.package("apex")
    if origin is None or any((origin.parent / part).exists() for part in ("normalization", "optimizers")):
        return []
    what = f"apex {host.version('apex') or ''} is not NVIDIA's apex: PyPI has another project of that name."
    mend = "Run: pip uninstall -y apex; then build NVIDIA/apex, take the vendor's wheel, or do without."
    return [Finding(FindingKind.PACKAGES, what, mend)]


def _transformer_engine(host: Host) -> list[Finding]:
    """The wheel transformer_engine is Python only; a twin (transformer_engine_cu12, ...) brings the core."""
    origin = host.package("transformer_engine")
    if origin is None or any(origin.parent.rglob("*.so*")):
        return []
    if any(origin.parent.parent.glob("transformer_engine_*.so")):
        return []
    version = host.version("transformer_engine") or ""
    what = f"transformer_engine {version} has no compiled core: importing it raises, and breaks megatron.core."
    mend = "Run: pip uninstall -y transformer_engine (or install it with [pytorch], or the vendor's wheel)."
    return [Finding(FindingKind.PACKAGES, what, mend)]


def _starts(host: Host, detection: Detection | None, start: Callable[[str], Start]) -> tuple[Start, ...]:
    """Try the chosen device; try a plain import as well where a plug-in makes it another act."""
    acts = []
    if host.environ.get(AUTOLOAD, "1") == "1" and host.entry_points("torch.backends"):
        acts.append(PLAIN)
    if detection:
        acts.append(detection.adapter.name)
    return tuple(start(act) for act in acts)


def _prefer_tried(findings: list[Finding], starts: tuple[Start, ...]) -> list[Finding]:
    """Drop plug-in findings that were only read where a start confirms or refutes them; add what failed."""
    failed = [one.finding for one in starts if one.finding]
    tried = {found.device for found in failed} | {one.device for one in starts}
    if any(one.device == PLAIN and one.finding is None for one in starts):  # every plug-in loaded
        tried |= {found.device for found in findings}
    read = (found for found in findings if found.kind is not FindingKind.PLUGIN or found.device not in tried)
    findings = [*read, *failed]
    unique = {(found.kind, found.device, found.mend): found for found in reversed(findings)}
    return list(reversed(unique.values()))
