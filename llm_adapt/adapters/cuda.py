"""NVIDIA CUDA: the device the scripts were written for; collectives "nccl", the yardstick of the others.

Source: torch 2.13.0 (torch/cuda/__init__.py: device_count asks NVML and does not start the driver).
"""

from __future__ import annotations

import importlib
import re

from llm_adapt.adapters.base import DeviceAdapter, Finding, FindingKind, KnownFailure, Probe
from llm_adapt.adapters.checks import any_mask, closed_nodes, spell_nodes, spell_pattern
from llm_adapt.adapters.host import Host

__all__ = ["ADAPTER"]

_NODES = "/dev/nvidia[0-9]*"
_WSL_NODE = "/dev/dxg"
_DRIVER = "/proc/driver/nvidia/version"
_MASKS = ("CUDA_VISIBLE_DEVICES",)
_PCI_VENDOR = "0x10de"
_DISPLAY = "0x03"


def _gpus(host: Host) -> tuple[str, ...]:
    if host.nodes(_NODES):
        return host.nodes(_NODES)
    wsl = host.exists(_WSL_NODE) and host.exists("/usr/lib/wsl/lib/libcuda.so.1")
    return (_WSL_NODE,) if wsl else ()


def _driver(host: Host) -> str:
    version = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", host.read(_DRIVER))
    return f"driver {version.group(1)}" if version else ""


def _probe(host: Host) -> Probe:
    gpus, build, driver = _gpus(host), host.torch_build(), _driver(host)
    built = build is not None and bool(build.cuda)
    if not gpus:
        seen = ""
        if driver:
            seen = f" although the {driver} is loaded: a container started without --gpus"
        elif any(shown.startswith(_DISPLAY) for shown in host.pci_classes(_PCI_VENDOR)):
            seen = " although an NVIDIA card is on the PCI bus: the driver is not loaded"
        return Probe(False, f"no {spell_pattern(_NODES)}{seen}", loadable=built)
    evidence = spell_nodes(gpus) + (f", {driver}" if driver else "")
    if build is None:
        return Probe(False, f"{evidence}, but torch is not installed")
    if not built:
        return Probe(False, f"{evidence}, but torch {build.version} was not built for CUDA")
    mask = any_mask(host, _MASKS)
    if mask:
        return Probe(False, f"{evidence}, all masked by {mask}", masked=True, loadable=True)
    return Probe(True, f"{evidence} and torch {build.version} built for CUDA {build.cuda}")


def _diagnose(host: Host) -> tuple[Finding, ...]:
    gpus, build = _gpus(host), host.torch_build()
    if not gpus:
        return ()
    found = list(closed_nodes(host, (_NODES, "/dev/nvidiactl", "/dev/nvidia-uvm"), "cuda"))
    if build is not None and not build.cuda and not build.hip:
        what = f"{gpus[0]} is here, but torch {build.version} is a CPU build."
        mend = "Install a CUDA build of torch for your driver: https://pytorch.org/get-started/locally."
        found.append(Finding(FindingKind.PACKAGES, what, mend, "cuda"))
    return tuple(found)


def _check_torch() -> str | None:
    torch = importlib.import_module("torch")
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was not built for CUDA. Install a CUDA build of torch."
    if torch.cuda.device_count() == 0:
        return "torch sees no GPU. Look at `nvidia-smi`: no driver, one too old for this torch, or no --gpus."
    return None


_FAILURES = (
    KnownFailure(
        r"libcuda\.so[\w.]*: cannot open shared object",
        "the NVIDIA driver's libcuda.so is on no library path.",
        "Install the driver, or start the container with --gpus all; or do without it: LLM_ADAPT_DEVICE=cpu.",
    ),
    KnownFailure(
        r"(lib(?:cu(?:dart|blas|dnn|fft|rand|sparse)\w*|nccl|nvrtc\w*)\.so[\w.]*): cannot open shared object",
        r"this torch was built for CUDA, and \1 of its CUDA packages is missing.",
        "Run: pip install --force-reinstall torch (its nvidia-* packages come with it).",
        FindingKind.PACKAGES,
    ),
)

ADAPTER = DeviceAdapter(
    name="cuda",
    title="NVIDIA CUDA",
    device_type="cuda",
    backend="nccl",
    probe_device=_probe,
    check_torch=_check_torch,
    diagnose_device=_diagnose,
    visible_devices=_MASKS,
    smi="nvidia-smi",
    kernel_libraries=(
        "flash_attn_3",
        "flash_attn",
        "transformer_engine",
        "apex",
        "triton",
        "liger",
        "torch_native",
        "chunked",
    ),
    dtypes=("float32", "float16", "bfloat16", "float64"),
    chip_dtypes={
        "float8_e4m3fn": "compute capability 8.9 and up",
        "float8_e5m2": "compute capability 8.9 and up",
    },
    needs_facade=False,
    version_sources=("torch", "flash_attn", "transformer_engine", "apex", "triton", "liger_kernel", "numpy"),
    version_files={"NVIDIA driver": _DRIVER},
    known_failures=_FAILURES,
)
