"""Cambricon MLU without an MLU: a device "mlu" on host memory, and a torch_mlu as far as public sources tell.

No wheel of torch_mlu is public, so nothing of the vendor runs here. The C++ files make a PrivateUse1 device whose
operators are torch's CPU kernels (host/kernel.h) behind the MLU's limits; torch_mlu/ and torch_mlu_ops/ have the names
and signatures that are recorded of the vendor's packages. A name, an argument or a case that is not recorded raises.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from llm_adapt.simulators.base import Library, Simulator, SimulatorError, Toolchain
from llm_adapt.simulators.mlu.finder import NATIVE, Finder, put_first

__all__ = ["SIMULATOR"]

_HERE = Path(__file__).parent
_MAJOR = {"MLU590-M9": 5, "MLU590-M9DE": 5, "MLU370": 3}


def _libraries(toolchain: Toolchain) -> tuple[Library, ...]:
    sources = (*sorted(_HERE.glob("*.cpp")), _HERE.parent / "host" / "process_group.cpp")
    return (Library(NATIVE, sources, (_HERE,), uses_torch=True, module="_native"),)


def _enter(folder: Path, model: str) -> Mapping[str, str]:
    """Make torch_mlu importable; torch's own autoload imports it, or llm_adapt does."""
    if model == "MLU370" and not os.environ.get("MLU_SIM_MEMORY_GB"):
        raise SimulatorError(
            "An MLU370 was asked; its memory is not public. Say it: MLU_SIM_MEMORY_GB=24, for example."
        )
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        put_first(Finder(folder, importlib.metadata.version("torch")))
    return {"MLU_SIM_MODEL": model, "MLU_SIM_MAJOR": str(_MAJOR[model])}


def _install(folder: Path) -> None:
    if "torch_mlu" not in sys.modules:
        raise SimulatorError(
            "The mlu simulator was entered, and nothing imported torch_mlu: torch's autoload is off "
            "(TORCH_DEVICE_BACKEND_AUTOLOAD=0). Import torch_mlu, or call llm_adapt.patch(device='mlu')."
        )


SIMULATOR = Simulator(
    name="mlu",
    title="Cambricon MLU: a device on host memory behind the limits that public sources record",
    models={
        "MLU590-M9": "capability (5, 0), 94.8 GiB",
        "MLU590-M9DE": "capability (5, 0), 94.8 GiB",
        "MLU370": "capability (3, not public), no fused attention; memory not public: set MLU_SIM_MEMORY_GB",
    },
    default_model="MLU590-M9",
    libraries=_libraries,
    enter=_enter,
    install=_install,
    unknown=(
        "flash_attn for MLU: version, signature, limits, where its wheel is",
        "apex and TransformerEngine for MLU: source, coverage, FP8",
        "xformers for MLU: coverage, and whether it has a backward",
        "whether the newest CNCL has AVG, PREMUL_SUM, float8 or the split of a communicator",
        "chips of capability 6 and up: their names, and what float8 does on them",
        "when scaled_dot_product_attention is fused after torch_mlu 1.24",
        "which names torch.mlu lacks in each version, and which operators fall back to the CPU",
        "the environment variables of CNCL and CNNL in full",
        "whether generic Triton training kernels compile and are right on Triton-MLU",
        "training speed, multi-node results, how far torch.compile goes",
        "DeviceProp beyond name, major and total_memory; complex128; memory of an MLU370",
        "the second number of an MLU370's capability",
    ),
)
