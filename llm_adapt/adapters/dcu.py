"""Hygon DCU: a ROCm-shaped torch built on DTK; device type "cuda", collectives "nccl" (RCCL).

Source: records of torch 2.9.0+das.opt1.dtk2604 on BW (gfx936), HYGON-AI/Megatron-LM-das 0685d1f (2026-08-21),
HYGON-AI train-cookbook-das f6dc109. The exact get_device_capability tuples are not public. Nothing here was
run on a real DCU by us.
"""

from __future__ import annotations

import importlib
import re

from llm_adapt.adapters.base import DeviceAdapter, Finding, FindingKind, KnownFailure, Probe
from llm_adapt.adapters.checks import any_mask, closed_nodes, foreign_build, unequal_masks
from llm_adapt.adapters.host import Host

__all__ = ["ADAPTER"]

_NODES = ("/dev/kfd", "/dev/mkfd")  # mkfd on newer drivers only
_MASKS = ("HIP_VISIBLE_DEVICES", "HCU_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
_BUILD_MARKS = ("das", "dtk")  # 2.9.0+das.opt1.dtk2604, 1.13.1+git....abi0.dtk2310
_PCI_VENDOR = "0x1d94"
# Display, co-processor, accelerator. The class matters: the bridges of Hygon CPUs carry the same vendor id.
_PCI_CLASSES = ("0x03", "0x0b40", "0x12")
_WHEELS = "Install the DAS wheel of Hygon's index or image; pip by itself would fetch a CUDA build."
_ENV = "Run: source /opt/dtk/env.sh (not in a `docker exec` or `docker build` shell by itself)."
_AMD = "AMD ROCm is not a device of llm_adapt yet"
_SIMULATED = "DCU_SIM_MODEL"  # set by llm_adapt.simulators.dcu in a process whose torch will be a simulated DCU's


def _is_dtk(version: str) -> bool:
    return any(mark in version for mark in _BUILD_MARKS)


def _marks(host: Host) -> tuple[str, ...]:
    """Evidence that the accelerator or its software is Hygon's and not AMD's, other than the torch build."""
    marks = [path for path in ("/opt/dtk", "/opt/hyhal", "/dev/mkfd") if host.exists(path)]
    if host.which("hy-smi"):
        marks.append("hy-smi")
    if any(shown.startswith(_PCI_CLASSES) for shown in host.pci_classes(_PCI_VENDOR)):
        marks.append(f"PCI vendor {_PCI_VENDOR}")
    return tuple(marks)


def _probe(host: Host) -> Probe:
    if simulated := host.environ.get(_SIMULATED):
        # Not found, so that detection never chooses it; loadable, so that who asks for it gets it.
        return Probe(False, f"this process simulates a DCU ({simulated})", loadable=True)
    nodes = tuple(node for node in _NODES if host.exists(node))
    build, marks = host.torch_build(), _marks(host)
    if build is not None and _is_dtk(build.version):
        if not nodes:
            return Probe(False, f"torch {build.version} is DTK's, but there is no /dev/kfd", loadable=True)
        evidence = f"{nodes[0]} and torch {build.version}"
        mask = any_mask(host, _MASKS)  # that "" hides all is CUDA's rule; unverified for HIP_ and HCU_
        if mask:
            return Probe(False, f"{evidence}, all masked by {mask}", masked=True, loadable=True)
        return Probe(True, f"{evidence} ({', '.join(marks) or 'no further mark'})")
    if not nodes:
        return Probe(False, "no /dev/kfd" + (f", although {', '.join(marks)}" if marks else ""))
    if marks:
        torch = f"torch {build.version} is not DTK's build" if build else "torch is not installed"
        return Probe(False, f"{nodes[0]} and {', '.join(marks)}, but {torch}")
    return Probe(False, f"{nodes[0]} without a mark of DTK: {_AMD}")


def _diagnose(host: Host) -> tuple[Finding, ...]:
    build, marks = host.torch_build(), _marks(host)
    nodes = tuple(node for node in _NODES if host.exists(node))
    dtk = build is not None and _is_dtk(build.version)
    if nodes and build is not None and build.hip and not dtk and not marks:
        what = f"{nodes[0]} and torch {build.version} (ROCm): {_AMD}."
        mend = "Run on it without llm_adapt, or set LLM_ADAPT_DEVICE=cpu."
        return (_finding(FindingKind.DEVICE, what, mend),)
    if not dtk and not (nodes and marks):
        return ()
    found: list[Finding] = []
    if not dtk:
        installed = f"torch {build.version} is not the DTK build" if build else "torch is not installed"
        what = f"A DCU is here ({', '.join(marks)}), but {installed}."
        found.append(_finding(FindingKind.PACKAGES, what, _WHEELS))
    found += closed_nodes(host, (*_NODES, "/dev/dri/renderD*"), "dcu")
    found += unequal_masks(host, _MASKS, "DTK's torch consults all of them", "dcu")
    found += _packages(host)
    return tuple(found)


def _finding(kind: FindingKind, what: str, mend: str) -> Finding:
    return Finding(kind, what, mend, "dcu")


def _packages(host: Host) -> list[Finding]:
    found = [
        finding
        for name in ("triton", "flash_attn")
        for finding in foreign_build(host, name, _BUILD_MARKS, "dcu", _WHEELS)
    ]
    numpy = host.version("numpy")
    if numpy and not numpy.startswith(("0.", "1.")):
        what = f"numpy {numpy} is installed, and DTK's torch was built against numpy 1."
        found.append(_finding(FindingKind.PACKAGES, what, "Run: pip install 'numpy<2'."))
    found += _wheel_pairs(host)
    found += _flash_attn_version(host)
    return found


def _wheel_pairs(host: Host) -> list[Finding]:
    """DAS wheels name their torch without dots: flash_attn 2.8.3+das.opt1.dtk2604.torch290."""
    build = host.torch_build()
    if build is None:
        return []
    here = "".join(re.findall(r"\d+", build.version.split("+")[0]))
    found = []
    for name in ("flash_attn", "apex", "transformer_engine", "xformers"):
        version = host.version(name) or ""
        wanted = re.search(r"\.torch(\d+)", version)
        if wanted and wanted.group(1) != here:
            what = f"{name} {version} is for torch{wanted.group(1)}; torch {build.version} is installed."
            mend = f"Install the {name} wheel whose name ends in torch{here}."
            found.append(_finding(FindingKind.VERSIONS, what, mend))
    return found


def _flash_attn_version(host: Host) -> list[Finding]:
    """The DAS wheel 2.8.3 says __version__ = "2.6.1", which version gates of Megatron and TE believe."""
    origin, wheel = host.package("flash_attn"), host.version("flash_attn")
    if origin is None or wheel is None or not origin.is_file():
        return []
    text = origin.read_text(encoding="utf-8", errors="replace")
    claimed = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    if claimed is None or wheel.startswith(claimed.group(1)):
        return []
    what = f"flash_attn says version {claimed.group(1)}, its wheel is {wheel}: version checks of scripts err."
    mend = "Nothing to do under llm_adapt, which tries the functions; elsewhere ask importlib.metadata."
    return [_finding(FindingKind.NOTE, what, mend)]


def _check_torch() -> str | None:
    torch = importlib.import_module("torch")
    version = str(torch.__version__)
    if not _is_dtk(version):
        return f"torch {version} is not DTK's build ('das' or 'dtk' in its version). {_WHEELS}"
    if torch.cuda.device_count() == 0:
        return f"torch {version} sees no DCU. Look at `hy-smi`; in a container pass /dev/kfd and /dev/dri."
    return None


_FAILURES = (
    KnownFailure(
        r"(lib(?:galaxyhip|rocm_smi64)\.so[\w.]*): cannot open shared object",
        r"DTK's \1 is on no library path (env.sh was not sourced).",
        _ENV,
    ),
    KnownFailure(
        r"(libamdhip64\.so[\w.]*): cannot open shared object",
        r"this package was built for AMD ROCm (\1); DTK has libgalaxyhip and is not ABI compatible.",
        _WHEELS,
        FindingKind.PACKAGES,
    ),
)

ADAPTER = DeviceAdapter(
    name="dcu",
    title="Hygon DCU",
    device_type="cuda",
    backend="nccl",
    probe_device=_probe,
    check_torch=_check_torch,
    diagnose_device=_diagnose,
    visible_devices=_MASKS,
    smi="hy-smi",
    kernel_libraries=("flash_attn", "lightop", "transformer_engine", "apex", "triton", "torch_native", "chunked"),
    # bfloat16 on gfx906 and gfx926 is not stated publicly; float64 follows from HIP, unverified.
    dtypes=("float32", "float16", "bfloat16", "float64"),
    chip_dtypes={"float8_e4m3fn": "gfx938, gfx92a", "float8_e5m2": "gfx938, gfx92a"},
    cuda_capability=(8, 0),
    cuda_capability_reason="DTK derives it from gfx9xx, gfx936 as (9, 3) or so, read as Hopper by CUDA code",
    needs_facade=False,
    default_env={
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # both: requirements/env.sh of Hygon's Megatron adaptor
        "HSA_FORCE_FINE_GRAIN_PCIE": "1",
    },
    version_sources=("torch", "flash_attn", "transformer_engine", "apex", "lightop", "triton", "numpy"),
    known_failures=_FAILURES,
)
