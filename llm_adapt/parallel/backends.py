"""Backend names: what a CUDA script calls nccl is this device's collective library."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from llm_adapt.adapters.base import DeviceAdapter
from llm_adapt.errors import CommError

__all__ = ["NcclOptions", "ProcessGroupNCCL", "translate_backend"]


def translate_backend(backend: Any, adapter: DeviceAdapter) -> Any:
    """Translate a backend argument of torch.distributed, exact names only.

    "nccl" becomes the adapter's backend, and in "cpu:gloo,cuda:nccl" the cuda part becomes this device's. On
    the CPU both parts are the CPU's, and the cuda part decides, since that is where the tensors are.

    Raises:
        CommError: a part of the form device:backend repeats a device with another backend.
    """
    if not isinstance(backend, str):
        return backend
    if ":" not in backend:
        return adapter.backend if backend.lower() == "nccl" else backend
    parts: dict[str, str] = {}
    for part in sorted(backend.split(","), key=lambda part: part.startswith("cuda:")):  # cuda last: it decides
        device, _, name = part.partition(":")
        device, is_cuda = (adapter.device_type, True) if device == "cuda" else (device, False)
        name = adapter.backend if name.lower() == "nccl" else name
        if parts.get(device, name) != name and not is_cuda:
            raise CommError(f"backend={backend!r} was asked; {device} stands there twice. Name each device once.")
        parts[device] = name
    return ",".join(f"{device}:{name}" for device, name in parts.items())


class _NcclConfig:
    """Fields of NCCL's communicator configuration (torch.distributed.ProcessGroupNCCL.NCCLConfig)."""

    __slots__ = (
        *("blocking", "cga_cluster_size", "collnet_enable", "comm_name", "cta_policy", "max_ctas", "min_ctas"),
        *("net_name", "nvls_ctas", "split_share", "traffic_class"),
    )


class NcclOptions:
    """Stand-in for ProcessGroupNCCL.Options where there is no NCCL: it can be filled, and has no effect.

    A field that NCCL does not have raises AttributeError, as the real one does.
    """

    __slots__ = (
        *("_timeout", "config", "global_ranks_in_group", "group_desc", "group_name", "is_high_priority_stream"),
        *("split_color", "split_from"),
    )

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.is_high_priority_stream = is_high_priority_stream
        self.config = _NcclConfig()
        self._timeout = timedelta(minutes=10)  # NCCL's default; a DeviceMesh reads it


class ProcessGroupNCCL:
    """Stand-in for the name; it has Options and no groups, since every group runs on another backend."""

    Options = NcclOptions
    NCCLConfig = _NcclConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise CommError(
            "ProcessGroupNCCL(...) was asked directly; there is no NCCL here. "
            "Use torch.distributed.init_process_group or new_group, which choose this device's library."
        )
