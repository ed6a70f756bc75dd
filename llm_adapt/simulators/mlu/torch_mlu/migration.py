"""torch_mlu.utils.gpu_migration.migration: what the vendor's own migration changes when it is imported (2024 build).

Process-wide, at once, and for good. Written from the record of what it patches (torch_mlu d578002), as another way
to run a CUDA script than llm_adapt's facade; never use both. Left out, since a simulator has nothing for them:
ProfilerActivity.CUDA, emit_nvtx, _cuda_getCurrentRawStream, FSDP's ShardedGradScaler. As there, sys.modules keeps the
original torch.cuda: names imported from it before or after are CUDA's.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

__all__: list[str] = []

_DEVICE_WORDS = ("device", "device_type", "output_device", "map_location", "device_ids", "pin_memory_device")
_FACTORIES = (
    "arange", "as_tensor", "asarray", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace",
    "load", "logspace", "ones", "ones_like", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like",
    "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros", "zeros_like",
)  # fmt: skip
_METHODS = ("is_pinned", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "pin_memory", "to")


def _translated(value: Any) -> Any:
    """ "cuda", "cuda:N", torch.device and lists and dicts of them, as the MLU's; all else as it is."""
    if isinstance(value, str):
        return "mlu" + value[4:] if value == "cuda" or value.startswith("cuda:") else value
    if isinstance(value, torch.device):
        return torch.device("mlu", value.index) if value.type == "cuda" else value
    if isinstance(value, (list, tuple)):
        return type(value)(_translated(item) for item in value)
    if isinstance(value, dict):
        return {_translated(key): _translated(item) for key, item in value.items()}
    return value


def _untyped(owner: Any) -> Any:
    """What is changed here has types that forbid it."""
    return owner


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] == "cuda")


def _takes_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its device arguments translated."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple(_translated(arg) if _is_device(arg) else arg for arg in args)
        kwargs = {name: _translated(value) if name in _DEVICE_WORDS else value for name, value in kwargs.items()}
        return function(*args, **kwargs)

    return call


def _wrap(owner: Any, *names: str) -> None:
    for name in names:
        setattr(owner, name, _takes_cuda(inspect.getattr_static(owner, name)))


def _migrate_cuda() -> None:
    mlu: Any = torch.mlu  # type: ignore[attr-defined]
    mlu.nccl, mlu.CUDAGraph, mlu.nvtx = mlu.cncl, mlu.MLUGraph, mlu.cnpx
    sys.modules["torch.cuda"]._lazy_call = mlu._lazy_call  # type: ignore[attr-defined]
    torch.cuda = mlu


def _migrate_tensors() -> None:
    for name in _FACTORIES:
        _wrap(torch, name)
    for name in _METHODS:
        setattr(torch.Tensor, name, _takes_cuda(getattr(torch.Tensor, name)))
    _wrap(torch.nn.Module, "to", "to_empty")
    _wrap(torch.amp.autocast, "__init__")
    tensor, module = _untyped(torch.Tensor), _untyped(torch.nn.Module)
    tensor.cuda, tensor.is_cuda, module.cuda = tensor.mlu, tensor.is_mlu, module.mlu


def _migrate_generator() -> None:
    class Generator(_untyped(torch._C.Generator)):  # type: ignore[misc]
        """torch.Generator that takes "cuda" for the MLU."""

        def __new__(cls, device: Any = "cpu") -> Any:
            return super().__new__(cls, _translated(device))

    torch.Generator = Generator  # type: ignore[misc, assignment]


def _with_cncl(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(function).bind_partial(*args, **kwargs)
        if isinstance(bound.arguments.get("backend"), str):
            bound.arguments["backend"] = bound.arguments["backend"].replace("nccl", "cncl").replace("cuda:", "mlu:")
        return function(*bound.args, **bound.kwargs)

    return call


def _migrate_distributed() -> None:
    for module in map(_untyped, (dist, dist.distributed_c10d)):
        for name in ("init_process_group", "new_group"):
            setattr(module, name, _with_cncl(getattr(module, name)))
        module.is_nccl_available = module.is_cncl_available
        module.ProcessGroupNCCL = module.ProcessGroupCNCL
    dist.Backend.default_device_backend_map.pop("cuda", None)


def _migrate_the_rest() -> None:
    _wrap(DataLoader, "__init__")

    def script(obj: Any, *args: Any, **kwargs: Any) -> Any:
        warnings.warn("torch.jit.script is not supported on MLU: the function is left as it is.", stacklevel=2)
        return obj

    torch.jit.script = script

    def restore(storage: Any, location: str) -> Any:
        return storage.mlu(_translated(location)) if location.split(":", maxsplit=1)[0] == "cuda" else None

    torch.serialization.register_package(11, lambda storage: None, restore)


_migrate_cuda()
_migrate_tensors()
_migrate_generator()
_migrate_distributed()
_migrate_the_rest()
