"""Ascend NPU: torch_npu over CANN; device type "npu", collectives "hccl".

Source: wheel torch_npu 2.13.0 (git c798c653) with torch 2.13.0, read and run without a device; torch_npu
source 9e73e708 and op-plugin 517f2e7d (2026-08-21). Nothing here was run on a real NPU by us.
"""

from __future__ import annotations

import importlib
import re

from llm_adapt.adapters.base import DeviceAdapter, Finding, FindingKind, KnownFailure, Probe
from llm_adapt.adapters.checks import closed_nodes, flag_is_set, minor, missing_nodes, probe_plugin
from llm_adapt.adapters.host import Host

__all__ = ["ADAPTER"]

_NODES = "/dev/davinci[0-9]*"
_COMPANIONS = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
_MASKS = ("ASCEND_RT_VISIBLE_DEVICES",)
_LIBRARIES = ("libhccl.so", "libascendcl.so")  # NEEDED by _C*.so and libtorch_npu.so of the 2.13.0 wheel
_SET_ENV = (
    "Run: source /usr/local/Ascend/ascend-toolkit/set_env.sh "
    "(newer CANN: /usr/local/Ascend/cann/set_env.sh). "
    "To do without the NPU: LLM_ADAPT_DEVICE=cpu; for other scripts TORCH_DEVICE_BACKEND_AUTOLOAD=0."
)
_PAIR = "Install the pair with the same major.minor, e.g. pip install torch=={0}.* torch_npu=={0}.*."


def _probe(host: Host) -> Probe:
    return probe_plugin(host, _NODES, ADAPTER.plugin, _MASKS)


def _diagnose(host: Host) -> tuple[Finding, ...]:
    nodes, installed = host.nodes(_NODES), host.package("torch_npu") is not None
    found: list[Finding] = []
    if nodes:
        found += missing_nodes(host, _COMPANIONS, "npu")
        found += closed_nodes(host, (_NODES, *_COMPANIONS), "npu")
        if not installed:
            what = f"{nodes[0]} is here, but torch_npu is not installed."
            found.append(_finding(FindingKind.PACKAGES, what, _pair(host)))
    if installed:
        found += _versions(host)
        found += _libraries(host)
        found += _environment(host)
    return tuple(found)


def _finding(kind: FindingKind, what: str, mend: str) -> Finding:
    return Finding(kind, what, mend, "npu")


def _pair(host: Host) -> str:
    build = host.torch_build()
    return _PAIR.format(minor(build.version) if build else "2.13")


def _versions(host: Host) -> list[Finding]:
    """The wheel demands `torch==2.13.0.*` of itself, but pip lets a later install break that."""
    build, plugin = host.torch_build(), host.version("torch_npu")
    if build is None or plugin is None or minor(build.version) == minor(plugin):
        return []
    what = f"torch_npu {plugin} needs torch {minor(plugin)}.*, and torch {build.version} is installed."
    return [_finding(FindingKind.VERSIONS, what, _PAIR.format(minor(plugin)))]


def _libraries(host: Host) -> list[Finding]:
    missing = [name for name in _LIBRARIES if host.library(name) is None]
    if not missing:
        return []
    what = f"torch_npu is installed, but CANN's {' and '.join(missing)} cannot be found: `import torch` raises."
    return [_finding(FindingKind.PLUGIN, what, _SET_ENV)]


def _environment(host: Host) -> list[Finding]:
    kind = FindingKind.ENVIRONMENT
    found = []
    if {"PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} <= host.environ.keys():
        what = "PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF are both set: torch_npu aborts the process."
        found.append(_finding(kind, what, "Run: unset PYTORCH_ALLOC_CONF (or the other one)."))
    transfer = "torch_npu.contrib.transfer_to_npu"
    if flag_is_set(host, "TORCH_TRANSFER_TO_NPU") or transfer in host.loaded:
        what = f"{transfer} is switched on: it redirects torch.cuda for good, and so does llm_adapt."
        mend = "Use one of the two: unset TORCH_TRANSFER_TO_NPU and drop the import."
        found.append(_finding(kind, what, mend))
    if "PYTORCH_CUDA_ALLOC_CONF" in host.environ and "PYTORCH_NPU_ALLOC_CONF" not in host.environ:
        what = "PYTORCH_CUDA_ALLOC_CONF is set; torch_npu does not read it."
        found.append(_finding(FindingKind.NOTE, what, "Set PYTORCH_NPU_ALLOC_CONF for the NPU."))
    mask = host.environ.get(_MASKS[0], "")
    try:
        _ascending(mask)
    except ValueError as error:
        what = f"{_MASKS[0]}={mask!r}: {error}."
        found.append(_finding(kind, what, "List ordinals in ascending order: 0,1,2."))
    return found


def _ascending(mask: str) -> str:
    """Return the mask when CANN accepts it: ordinals in ascending order, anything else ends the list.

    Raises:
        ValueError: the mask names devices otherwise, or in another order.
    """
    parts = [part.strip() for part in mask.split(",")] if mask.strip() else []
    if any(not re.fullmatch(r"\d+", part) for part in parts) and parts != ["-1"]:
        raise ValueError("only ordinals can name an NPU")
    if [int(part) for part in parts] != sorted({int(part) for part in parts}):
        raise ValueError("CANN needs the ordinals in ascending order")
    return ",".join(parts)


def _check_torch() -> str | None:
    torch = importlib.import_module("torch")
    npu = getattr(torch, "npu", None)
    if npu is None:
        return "torch_npu was imported but did not register torch.npu."
    if npu.device_count() == 0:  # does not initialise a device, so a later fork stays possible
        return "torch_npu sees no NPU. Look at `npu-smi info`; in a container pass /dev/davinci0 and its kin."
    return None


_FAILURES = (
    KnownFailure(
        r"lib(hccl|ascendcl|acl_op_compiler|ge_runner|graph|opapi)\.so[\w.]*: cannot open shared object",
        r"torch_npu is installed, but CANN's lib\1.so is on no library path (set_env.sh was not sourced).",
        _SET_ENV,
    ),
    KnownFailure(
        r"libascend_hal\.so[\w.]*: cannot open shared object",
        "the Ascend driver's libascend_hal.so is on no library path.",
        "Install the driver; in a container mount /usr/local/Ascend/driver and put lib64 on LD_LIBRARY_PATH.",
    ),
    KnownFailure(
        r"(ASCEND_(?:HOME|OPP)_PATH)\b[^\n]*(?:not exist|not set)",
        r"\1 is missing or points nowhere, and torch_npu refuses to start.",
        _SET_ENV,
    ),
    KnownFailure(
        r"undefined symbol: (acl\w*|Hccl\w*|rt[A-Z]\w*|_ZN2ge\w*)",
        r"this torch_npu needs a newer CANN: the installed one has no \1.",
        "Install the CANN that torch_npu's release notes pair with it, or an older torch_npu and its torch.",
        FindingKind.VERSIONS,
    ),
    KnownFailure(
        r"Both PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF have been set",
        "PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF are both set.",
        "Run: unset PYTORCH_ALLOC_CONF (or the other one).",
        FindingKind.ENVIRONMENT,
    ),
    KnownFailure(
        r"ERR00007|Two accelerators cannot be used at the same time",
        "torch_npu was loaded into a torch that was built for another accelerator.",
        "Install the CPU build of torch beside torch_npu, or choose the other device with LLM_ADAPT_DEVICE.",
        FindingKind.VERSIONS,
    ),
)

ADAPTER = DeviceAdapter(
    name="npu",
    title="Ascend NPU",
    device_type="npu",
    backend="hccl",
    probe_device=_probe,
    check_torch=_check_torch,
    diagnose_device=_diagnose,
    visible_devices=_MASKS,
    mask_from_cuda=_ascending,
    smi="npu-smi",
    plugin="torch_npu",
    kernel_libraries=("torch_npu", "torch_native", "chunked", "triton"),
    dtypes=("float32", "float16", "bfloat16"),  # bfloat16 not on Atlas A1 (Ascend910A..910B) and 310P
    chip_dtypes={"float8_e4m3fn": "Ascend950", "float8_e5m2": "Ascend950"},
    emulated_dtypes={"float64": "float32"},
    # PREMUL_SUM multiplies the caller's input in place; AVG divides after the sum and raises on integers.
    missing_reduce_ops=frozenset({"PREMUL_SUM", "AVG:int"}),
    # float64 and uint64: refused on A2 and A3, accepted on 950. torch itself hands complex over as real.
    missing_collective_dtypes=frozenset(
        {"float64", "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64"}
        | {"bool:reduce_scatter", "uint8:reduce_scatter"}
    ),
    cuda_capability=(8, 0),
    cuda_capability_reason=(
        "torch_npu has none (None unless TORCH_NPU_DEVICE_CAPABILITY is set); (8, 0) is our choice: "
        "CUDA code then takes its bfloat16 paths and leaves fp8 and Hopper paths alone"
    ),
    default_env={
        "TORCH_NPU_DEVICE_CAPABILITY": "8.0",
        "TORCH_NPU_USE_COMPATIBLE_IMPL": "1",  # gelu, matmul, LayerNorm, SDPA, gather as upstream does
        "HCCL_CONNECT_TIMEOUT": "1200",  # the default of 120 s is too short for slow ranks (error EI0006)
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron asserts it; without meaning on an NPU
    },
    version_sources=("torch", "torch_npu", "triton_ascend", "triton", "numpy"),
    version_files={"Ascend driver": "/usr/local/Ascend/driver/version.info"},
    known_failures=_FAILURES,
)
