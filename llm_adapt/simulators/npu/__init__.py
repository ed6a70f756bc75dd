"""Ascend NPU without an NPU: the vendor's own torch_npu over an emulated CANN.

The wheel of torch_npu (Python, C++, autograd nodes, ProcessGroupHCCL, allocator) runs unmodified. What it expects
of CANN is built from the C++ files here against the headers inside that wheel:

- libascendcl.so, libacl_op_compiler.so: the runtime, on host memory (runtime_*.cpp, operators_legacy.cpp,
  compiler_options.cpp); a symbol that the wheel wants and nobody wrote raises, naming itself;
- libhccl.so: collectives between processes of one machine (hccl_*.cpp);
- libopapi.so: aclnn operators in ATen (opapi_*.cpp); torch_npu itself names those that are missing;
- llm_adapt_npu_kernels: a host kernel in the place of each aten kernel of the NPU (aten_kernels.cpp).

A green run is a gate for interfaces, integration and the plumbing of numbers. It is no evidence of what real kernels
support, how accurate or how fast they are, nor of hazards between streams.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from llm_adapt.simulators.base import Library, Simulator, SimulatorError, Toolchain

__all__ = ["SIMULATOR"]

_HERE = Path(__file__).parent
_VERSION = "2.13.0"
_KERNELS = "llm_adapt_npu_kernels"
# Names that torch_npu links or opens, with nothing in them that it needs: their calls are not modelled.
_EMPTY = ("libge_runner.so", "libgraph.so", "libmsprofiler.so", "libprofapi.so", "libacl_tdt_channel.so")
_WANTED = r"(acl[A-Zrmons]|Hccl|Msprof|rt[A-Z]|halG|dcmi)"


def _libraries(toolchain: Toolchain) -> tuple[Library, ...]:
    assert toolchain.plugin is not None
    headers = toolchain.plugin / "include" / "third_party"
    cann = (headers / "acl" / "inc", headers / "hccl" / "inc")
    lib = toolchain.plugin / "lib"
    binaries = (lib / "libtorch_npu.so", lib / "libnpu_profiler.so", *toolchain.plugin.glob("_C*.so"))
    runtime = (*sorted(_HERE.glob("runtime_*.cpp")), _HERE / "operators_legacy.cpp")
    return (
        Library("libascendcl.so", runtime, cann, stubs_for=binaries, stubs_pattern=_WANTED),
        Library("libacl_op_compiler.so", (_HERE / "compiler_options.cpp",), cann, ("-lascendcl",)),
        Library(
            "libhccl.so",
            tuple(sorted(_HERE.glob("hccl*.cpp"))),
            (*cann, headers.parent, toolchain.torch / "include"),
            ("-lascendcl",),
        ),
        # torch_npu looks up HcclGroupStart and HcclGroupEnd in a library of this name.
        Library("libhcomm.so", links=("-Wl,--no-as-needed", "-lhccl")),
        Library("libopapi.so", tuple(sorted(_HERE.glob("opapi_*.cpp"))), (), ("-lascendcl",), uses_torch=True),
        *(Library(name) for name in _EMPTY),
        Library(
            f"{_KERNELS}.so",
            (_HERE / "aten_kernels.cpp",),
            (*cann, toolchain.plugin / "include"),
            ("-lascendcl", f"-L{lib}", "-Wl,--unresolved-symbols=ignore-all", "-ltorch_npu"),
            uses_torch=True,
            module=_KERNELS,
        ),
    )


def _check_number(name: str, least: float, most: float) -> None:
    text = os.environ.get(name) or str(most)
    try:
        fits = least <= float(text) <= most
    except ValueError:
        fits = False
    if not fits:
        raise SimulatorError(
            f"{name}={text!r} was set; accepted: a number from {least} to {most}. Correct or unset it."
        )


def _enter(folder: Path, model: str) -> Mapping[str, str]:
    """Load the emulated libraries: torch_npu then finds them under their names, wherever they lie."""
    for name, least, most in (("NPU_SIM_DEVICES", 0, 16), ("NPU_SIM_HBM_GB", 1e-3, 1e5)):
        _check_number(name, least, most)
    for name in ("libascendcl.so", "libacl_op_compiler.so", "libhccl.so", "libhcomm.so", *_EMPTY, "libopapi.so"):
        ctypes.CDLL(str(folder / name), mode=os.RTLD_GLOBAL | os.RTLD_NOW)
    return {"NPU_SIM_SOC": model}


def _install(folder: Path) -> None:
    """Put a host kernel into the place of each aten kernel of the NPU."""
    sys.path.insert(0, str(folder))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel.*")
            importlib.import_module(_KERNELS).install()
    finally:
        sys.path.remove(str(folder))


def _observed() -> Iterator[tuple[str, str, str]]:
    """Operators that the NPU leaves to the CPU, and the device memory that communicators take for their buffers."""
    for name, calls in sorted(importlib.import_module(_KERNELS).fallback_counts().items()):
        yield (
            name,
            "computed by the CPU",
            f"{calls} calls; the NPU has no kernel: copies there and back, slow on hardware",
        )
    report = ctypes.CDLL("libhccl.so").npusim_hccl_report
    report.restype = ctypes.c_char_p
    for group in json.loads(report())["communicators"]:
        size = f"{group['buffer_bytes'] >> 20} MB of device memory"
        yield (
            f"communicator {group['name']}",
            size,
            f"rank {group['rank']} of {group['ranks']}, {sum(group['calls'].values())} calls",
        )


SIMULATOR = Simulator(
    name="npu",
    title="Ascend NPU: the real torch_npu over an emulated CANN on host memory",
    models={
        "Ascend910B3": "A2 (Atlas 800T A2, 300T A2)",
        "Ascend910_9391": "A3 (Atlas 900 A3 SuperPoD)",
        "Ascend310P3": "310P (Atlas 300I Duo): no bfloat16, no training attention",
        "Ascend950": "A5: float8, MXFP",
        "Ascend910A": "A1: no bfloat16",
    },
    default_model="Ascend910B3",
    plugin="torch_npu",
    plugin_requirement=f"torch_npu=={_VERSION}",
    libraries=_libraries,
    enter=_enter,
    install=_install,
    observed=_observed,
    unknown=(
        "which dtypes, shapes and layouts a real kernel refuses beyond the documented limits",
        "accuracy, determinism, speed and memory use of real kernels",
        "hazards between streams: a kernel here runs when it is launched",
        "topology limits of HCCL: every device reaches every other here",
        "versions of CANN and driver: NPU_SIM_CANN_VERSION and 25.5.0 are answered",
        "cores and caches of each chip: 20 cubes, 40 vector cores, 6 AI CPUs and 192 MiB of L2 are answered for all",
        "saturation on A1 and 310P, where inf becomes 65504 and NaN 0: numbers are IEEE on every chip here",
        "what cos and sin outside of [-1, 1] give in npu_rotary_mul: the values are not looked at",
    ),
)
