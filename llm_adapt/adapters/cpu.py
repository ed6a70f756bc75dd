"""CPU: development and CI; always available; collectives "gloo".

Source: every dtype and reduce operation of gloo was tried with torch 2.13.0+cpu.
"""

from __future__ import annotations

from llm_adapt.adapters.base import DeviceAdapter, Probe
from llm_adapt.adapters.host import Host

__all__ = ["ADAPTER"]


def _probe(host: Host) -> Probe:
    return Probe(True, "always available")


def _check_torch() -> str | None:
    return None


ADAPTER = DeviceAdapter(
    name="cpu",
    title="CPU",
    device_type="cpu",
    backend="gloo",
    probe_device=_probe,
    check_torch=_check_torch,
    dtypes=("float32", "float16", "bfloat16", "float64"),
    kernel_libraries=("openmp", "torch_native", "chunked"),
    missing_reduce_ops=frozenset({"PREMUL_SUM", "AVG:int"}),
    missing_collective_dtypes=frozenset({"float8_e4m3fn", "float8_e5m2", "int16", "uint16", "uint32", "uint64"}),
    cuda_capability=(8, 0),
    cuda_capability_reason="a CPU has none; (8, 0) is our choice: bfloat16 paths, no fp8, no Hopper paths",
    default_env={"CUDA_DEVICE_MAX_CONNECTIONS": "1"},  # Megatron asserts it; without meaning on a CPU
    version_sources=("torch", "numpy"),
)
