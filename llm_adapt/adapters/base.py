"""DeviceAdapter: one frozen dataclass per device; everything llm_adapt knows of a device lives there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from llm_adapt.adapters.host import Host

__all__ = ["DeviceAdapter", "Finding", "FindingKind", "KnownFailure", "Probe"]


class FindingKind(Enum):
    """What sort of trouble a finding is, most severe first; each has an exit code in `llm-adapt doctor`."""

    PLUGIN = "plug-in broken"
    VERSIONS = "versions do not pair"
    ENVIRONMENT = "environment variables conflict"
    PERMISSIONS = "device nodes cannot be opened"
    PACKAGES = "wrong or unusable packages"
    DEVICE = "device masked, absent or ambiguous"
    NOTE = "worth knowing, not broken"


@dataclass(frozen=True)
class Finding:
    """One thing that is present but broken: what it is, and what to do about it.

    Attributes:
        kind: the sort of trouble.
        what: one sentence of fact, with the evidence in it.
        mend: one sentence, a command where there is one.
        device: name of the adapter it concerns, "" when it concerns every device.
    """

    kind: FindingKind
    what: str
    mend: str
    device: str = ""

    @property
    def line(self) -> str:
        """The finding as one line."""
        return f"{self.what} {self.mend}"


@dataclass(frozen=True)
class KnownFailure:
    r"""An error text of an import that we can explain.

    Attributes:
        pattern: regular expression searched in the text of the error and of its causes.
        cause: what it means; may refer to groups of the pattern as \1.
        mend: what to do.
        kind: the sort of trouble.
    """

    pattern: str
    cause: str
    mend: str
    kind: FindingKind = FindingKind.PLUGIN


@dataclass(frozen=True)
class Probe:
    """Answer of `DeviceAdapter.probe`: whether the device is here, and how we know.

    Attributes:
        found: the device can be used, as far as can be told without importing torch.
        reason: one line of evidence, e.g. "/dev/davinci0..7 and torch_npu 2.13.0".
        problems: one line per thing that is present but broken, each with its mend.
        masked: the device is present, and a visible-devices variable hides all of it.
        loadable: the software is installed although no device was seen. An explicit request is then put to
            that software, the better judge (odd node names, emulators); detection by itself never chooses it.
    """

    found: bool
    reason: str
    problems: tuple[str, ...] = ()
    masked: bool = False
    loadable: bool = False


def _no_findings(host: Host) -> tuple[Finding, ...]:
    return ()


@dataclass(frozen=True)
class DeviceAdapter:
    """Facts about one device and the few acts that differ between devices.

    Attributes:
        name: what users type: "cuda", "npu", "mlu", "dcu", "cpu".
        title: the name people know it by, e.g. "Ascend NPU".
        device_type: `torch.device(...).type` of its tensors.
        backend: torch.distributed backend of its collectives.
        probe_device: looks for the device without importing torch.
        check_torch: called after `import torch`; None or the reason why this torch cannot drive the device.
        diagnose_device: what is present but broken, without importing torch.
        visible_devices: environment variables that mask devices, the deciding one first.
        mask_from_cuda: turns CUDA_VISIBLE_DEVICES into the value of visible_devices[0] for a device that does
            not read CUDA_VISIBLE_DEVICES; ValueError says why it has no counterpart. None = nothing to turn.
        smi: the vendor's command line monitor, "" where there is none.
        plugin: importable package that registers the device with torch, "" when torch itself does.
        kernel_libraries: `llm_adapt.ops.kernels` modules in order of preference.
        dtypes: names of torch dtypes that kernels compute in.
        chip_dtypes: further dtypes that only some chips compute in, with the chips in words.
        emulated_dtypes: dtypes accepted but computed or stored as another, {"float64": "float32"}.
        missing_reduce_ops: reduce operations that NCCL has and its collectives lack, or have with another
            effect; "AVG:int" = for integer tensors only.
        missing_collective_dtypes: dtypes its reductions refuse; "bool:reduce_scatter" = that collective only.
        cuda_capability: what CUDA code is told by get_device_capability, None = the device's own answer.
        cuda_capability_reason: why it is told that.
        needs_facade: torch.cuda code must be redirected (False where the device *is* torch.cuda).
        default_env: variables set (never overwritten) when the device is activated.
        version_sources: distributions whose version belongs in a report.
        version_files: other version sources, a name and the file whose first line tells it.
        known_failures: errors of `import torch` and of the plug-in that we can explain.
    """

    name: str
    title: str
    device_type: str
    backend: str
    probe_device: Callable[[Host], Probe]
    check_torch: Callable[[], str | None]
    diagnose_device: Callable[[Host], tuple[Finding, ...]] = _no_findings
    visible_devices: tuple[str, ...] = ()
    mask_from_cuda: Callable[[str], str] | None = None
    smi: str = ""
    plugin: str = ""
    kernel_libraries: tuple[str, ...] = ("torch_native", "chunked")
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    chip_dtypes: Mapping[str, str] = field(default_factory=dict)
    emulated_dtypes: Mapping[str, str] = field(default_factory=dict)
    missing_reduce_ops: frozenset[str] = frozenset()
    missing_collective_dtypes: frozenset[str] = frozenset()
    cuda_capability: tuple[int, int] | None = None
    cuda_capability_reason: str = ""
    needs_facade: bool = True
    default_env: Mapping[str, str] = field(default_factory=dict)
    version_sources: tuple[str, ...] = ("torch",)
    version_files: Mapping[str, str] = field(default_factory=dict)
    known_failures: tuple[KnownFailure, ...] = ()

    def probe(self, host: Host | None = None) -> Probe:
        """Look for the device without importing torch. Never raises: a failing probe is an answer."""
        host = Host() if host is None else host
        try:
            answer = self.probe_device(host)
        except Exception as error:  # noqa: BLE001 - the text of the failure is the answer, and it is shown
            return Probe(False, f"probe failed: {type(error).__name__}: {error}")
        return replace(answer, problems=answer.problems + tuple(found.line for found in self.diagnose(host)))

    def diagnose(self, host: Host | None = None) -> tuple[Finding, ...]:
        """List what is present but broken, without importing torch. Never raises."""
        try:
            return self.diagnose_device(Host() if host is None else host)
        except Exception as error:  # noqa: BLE001 - as in probe(): shown, not swallowed
            what = f"The diagnosis of {self.title} failed: {type(error).__name__}: {error}."
            return (Finding(FindingKind.DEVICE, what, "Please report it with this line.", self.name),)

    def versions(self, host: Host | None = None) -> dict[str, str]:
        """Versions that belong in a report, those that are present."""
        host = Host() if host is None else host
        found = {name: host.version(name) for name in self.version_sources}
        for name, path in self.version_files.items():
            found[name] = next(iter(host.read(path).splitlines()), "")
        return {name: version for name, version in found.items() if version}
