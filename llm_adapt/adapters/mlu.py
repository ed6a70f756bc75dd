"""Cambricon MLU: torch_mlu over Neuware; device type "mlu", collectives "cncl".

Source: Cambricon/torch_mlu d578002 (1.22.2+torch2.1.0, 2024-09, C++ and Python), the Python part of a 2026
torch_mlu (about torch 2.9), and third-party records on MLU590 (2026-09). Whether the newest CNCL has AVG,
PREMUL_SUM or fp8 is not public. Nothing here was run on a real MLU by us.
"""

from __future__ import annotations

import importlib
import re

from llm_adapt.adapters.base import DeviceAdapter, Finding, FindingKind, KnownFailure, Probe
from llm_adapt.adapters.checks import (
    closed_nodes,
    flag_is_set,
    foreign_build,
    minor,
    missing_nodes,
    probe_plugin,
    unequal_masks,
)
from llm_adapt.adapters.host import Host

__all__ = ["ADAPTER"]

_NODES = "/dev/cambricon_dev[0-9]*"
_COMPANIONS = ("/dev/cambricon_ctl",)
_MASKS = ("CN_VISIBLE_DEVICES", "MLU_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
_MASK_RULE = "torch_mlu obeys CN_VISIBLE_DEVICES before MLU_VISIBLE_DEVICES before CUDA_VISIBLE_DEVICES"
_PCI_VENDOR = "0xcabc"
_NEUWARE = (
    "Run: export NEUWARE_HOME=/usr/local/neuware LD_LIBRARY_PATH=/usr/local/neuware/lib64:$LD_LIBRARY_PATH "
    "(the vendor's images have it set). To do without the MLU: LLM_ADAPT_DEVICE=cpu."
)


def _probe(host: Host) -> Probe:
    on_bus = len(host.pci_classes(_PCI_VENDOR))
    hint = f" ({on_bus} cards on the PCI bus: is the driver loaded, the node passed in?)" if on_bus else ""
    return probe_plugin(host, _NODES, ADAPTER.plugin, _MASKS, hint)


def _diagnose(host: Host) -> tuple[Finding, ...]:
    nodes, installed = host.nodes(_NODES), host.package("torch_mlu") is not None
    found: list[Finding] = []
    if nodes:
        found += missing_nodes(host, _COMPANIONS, "mlu")
        found += closed_nodes(host, (_NODES, *_COMPANIONS), "mlu")
        if not installed:
            what = f"{nodes[0]} is here, but torch_mlu is not installed."
            mend = "Install the wheel of Cambricon's image or index that names your torch (+torchX.Y.Z)."
            found.append(Finding(FindingKind.PACKAGES, what, mend, "mlu"))
    if installed:
        found += _versions(host)
        found += _environment(host)
        vendor = "Install Cambricon's wheel (version +mlu...); upstream Triton has no MLU backend."
        found += foreign_build(host, "triton", ("mlu",), "mlu", vendor)
    return tuple(found)


def _versions(host: Host) -> list[Finding]:
    """`1.22.0+torch2.4.0`: the suffix names the torch; a torch_mlu without it gives no verdict."""
    build, plugin = host.torch_build(), host.version("torch_mlu") or ""
    wanted = re.search(r"torch(\d+\.\d+)", plugin)
    if build is None or wanted is None or wanted.group(1) == minor(build.version):
        return []
    what = f"torch_mlu {plugin} was built for torch {wanted.group(1)}; torch {build.version} is installed."
    mend = f"Install torch {wanted.group(1)} (CPU build), or the torch_mlu for torch {minor(build.version)}."
    return [Finding(FindingKind.VERSIONS, what, mend, "mlu")]


def _environment(host: Host) -> list[Finding]:
    kind = FindingKind.ENVIRONMENT
    found = list(unequal_masks(host, _MASKS, _MASK_RULE, "mlu"))
    migration = "torch_mlu.utils.gpu_migration"
    if flag_is_set(host, "TORCH_MLU_GPU_MIGRATION") or migration in host.loaded:
        what = f"{migration} is switched on: it redirects torch.cuda, and so does llm_adapt."
        mend = "Use one of the two: unset TORCH_MLU_GPU_MIGRATION and drop the import."
        found.append(Finding(kind, what, mend, "mlu"))
    if "triton" in host.loaded and "torch_mlu" not in host.loaded:
        what = "triton was imported before torch_mlu: its MLU driver then fails to start."
        found.append(Finding(kind, what, "Call llm_adapt.patch() before anything imports triton.", "mlu"))
    return found


def _check_torch() -> str | None:
    torch = importlib.import_module("torch")
    mlu = getattr(torch, "mlu", None)
    if mlu is None:
        return "torch_mlu was imported but did not register torch.mlu."
    if mlu.device_count() == 0:
        return "torch_mlu sees no MLU. Look at `cnmon`; in a container pass cambricon_ctl and cambricon_dev0."
    return None


_FAILURES = (
    KnownFailure(
        r"(lib(?:cn\w+|mluop\w*)\.so)[\w.]*: cannot open shared object",
        r"torch_mlu is installed, but Neuware's \1 is on no library path.",
        _NEUWARE,
    ),
)

ADAPTER = DeviceAdapter(
    name="mlu",
    title="Cambricon MLU",
    device_type="mlu",
    backend="cncl",
    probe_device=_probe,
    check_torch=_check_torch,
    diagnose_device=_diagnose,
    visible_devices=_MASKS,
    smi="cnmon",
    plugin="torch_mlu",
    # flash_attn and apex for MLU exist inside Cambricon's images; their limits are not public.
    kernel_libraries=("flash_attn", "torch_mlu", "apex", "triton", "torch_native", "chunked"),
    dtypes=("float32", "float16", "bfloat16"),
    chip_dtypes={  # is_fp8_supported() = major >= 6; the chips are not named publicly, unverified
        "float8_e4m3fn": "capability 6.0 and up",
        "float8_e5m2": "capability 6.0 and up",
    },
    emulated_dtypes={"float64": "float32"},
    missing_reduce_ops=frozenset({"AVG", "PREMUL_SUM"}),  # torch_mlu 2024 source; newer CNCL unknown
    missing_collective_dtypes=frozenset({"float8_e4m3fn", "float8_e5m2", "int16", "uint16", "uint32", "uint64"}),
    cuda_capability=(8, 0),
    cuda_capability_reason="an MLU590 answers (5, 0), which CUDA code reads as Maxwell without bfloat16",
    default_env={
        "PYTORCH_CNDEV_BASED_MLU_CHECK": "1",  # is_available() leaves the driver alone: fork stays possible
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron asserts it; without meaning on an MLU
    },
    version_sources=("torch", "torch_mlu", "torch_mlu_ops", "triton", "flash_attn", "apex", "numpy"),
    known_failures=_FAILURES,
)
