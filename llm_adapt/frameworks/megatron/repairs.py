"""Repairs of single Megatron functions that assume CUDA, TransformerEngine or a certain interpreter."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm_adapt.adapters.base import DeviceAdapter
from llm_adapt.errors import PatchError
from llm_adapt.report import Report

__all__ = [
    "absent_is_older",
    "compile_helpers",
    "connections_for_fsdp",
    "never",
    "no_fuser",
    "nothing",
    "quiet_fork",
    "signal_device",
    "unfused_rope",
]


def absent_is_older(original: Callable[..., bool]) -> Callable[..., bool]:
    """A version check that answers False for a package that is not there, where Megatron's raises."""

    @functools.wraps(original)
    def is_min_version(*args: Any, **kwargs: Any) -> bool:
        try:
            return original(*args, **kwargs)
        except (ImportError, LookupError):  # includes importlib.metadata.PackageNotFoundError
            return False
        except TypeError as error:
            if "NoneType" in str(error):  # Workaround: megatron-version-none (None >= Version)
                return False
            raise

    return is_min_version


def no_fuser(function: Any = None, **options: Any) -> Any:
    """`@jit_fuser` that leaves the function as it is, with or without options."""
    return (lambda inner: inner) if function is None else function


def never(self: Any, *args: Any, **kwargs: Any) -> bool:
    """False: there is no such kernel."""
    return False


def nothing(*args: Any, **kwargs: Any) -> None:
    """Nothing to build."""


def quiet_fork(original: Callable[..., Any]) -> Callable[..., Any]:
    """`CudaRNGStatesTracker.fork` without its warning that the CPU's random state has changed.

    On the CPU the device's generator is the CPU's, so drawing from it inside a fork is what is meant; the fork
    puts the outer state back in any case.
    """
    logger = logging.getLogger("megatron.core.tensor_parallel.random")

    # Workaround: megatron-rng-warning
    def keep(record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in record.getMessage()

    @functools.wraps(original)
    @contextlib.contextmanager
    def fork(*args: Any, **kwargs: Any) -> Iterator[None]:
        logger.addFilter(keep)
        try:
            with original(*args, **kwargs):
                yield
        finally:
            logger.removeFilter(keep)

    return fork


def compile_helpers(original: Callable[[], None]) -> Callable[[], None]:
    """Build Megatron's dataset helpers with its own Makefile, for the interpreter that runs.

    The Makefile asks `python3` and `python3-config` on PATH, which may belong to another Python.

    Raises:
        PatchError: pybind11, make or a C++ compiler is missing, or the compilation fails.
    """

    @functools.wraps(original)
    def build() -> None:
        folder = Path(original.__code__.co_filename).parent
        extension = sysconfig.get_config_var("EXT_SUFFIX")
        if (folder / f"helpers_cpp{extension}").exists():
            return
        if importlib.util.find_spec("pybind11") is None:
            raise PatchError("Megatron's dataset helpers were asked; pybind11 is missing. Run: pip install pybind11")
        import pybind11

        includes = f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
        # Workaround: megatron-helpers-makefile
        command = ["make", "-C", str(folder), f"LIBEXT={extension}", f"CPPFLAGS={includes}"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise PatchError("Megatron's dataset helpers were asked; make is missing. Install make and g++.") from None
        except subprocess.CalledProcessError as error:
            raise PatchError(
                f"Megatron's dataset helpers were asked; '{' '.join(command)}' failed:\n{error.stderr[-2000:]}"
            ) from None

    return build


def signal_device(adapter: DeviceAdapter) -> Callable[[Any], Any]:
    """`get_device` of Megatron's signal handler for backends that it does not know."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_device(local_rank: int | None = None) -> Any:
            import torch

            if torch.distributed.get_backend() in ("nccl", "gloo"):
                return original(local_rank)
            return torch.device(adapter.device_type if local_rank is None else f"{adapter.device_type}:{local_rank}")

        return get_device

    return wrap


def unfused_rope(report: Report) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`TransformerConfig.__post_init__` that turns rope fusion off where nothing serves it.

    Megatron's scripts ask for it by default; its own unfused path computes the same rotation. The change is
    written to the report. Where operators are called, they serve it without TransformerEngine too (rotary.py), but
    for interleaved rope Megatron asks for TransformerEngine's version as well.
    """

    def wrap(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def post_init(self: Any) -> None:
            lacking = _rope_kernel_lacks(self) if getattr(self, "apply_rope_fusion", False) else ""
            if lacking:
                self.apply_rope_fusion = False
                report.once("apply_rope_fusion", "off", f"{lacking}; Megatron's unfused rope computes the same")
            original(self)

        return post_init

    return wrap


def _rope_kernel_lacks(config: Any) -> str:
    """What the fused rope of this config needs and does not find; empty when it is there."""
    if getattr(config, "multi_latent_attention", False):
        return "" if importlib.util.find_spec("triton") is not None else "triton is not installed"
    from megatron.core.models.common.embeddings import rope_utils

    kernels = ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd")
    if not any(getattr(rope_utils, name, None) is not None for name in kernels):
        return "TransformerEngine is not installed"
    if getattr(config, "rotary_interleaved", False) and importlib.util.find_spec("transformer_engine") is None:
        return "TransformerEngine is not installed, and its version is asked for interleaved rope"
    return ""


def connections_for_fsdp(report: Report) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`validate_args` that does not see CUDA_DEVICE_MAX_CONNECTIONS=1 where the script asks for FSDP.

    Megatron asserts that the variable is 1 with tensor parallelism and that it is not 1 with FSDP. The adapter sets
    it to 1; it orders CUDA kernels and means nothing on this device.
    """
    name = "CUDA_DEVICE_MAX_CONNECTIONS"

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def validate_args(args: Any, *more: Any, **kwargs: Any) -> Any:
            asked = [flag for flag in ("use_megatron_fsdp", "use_torch_fsdp2") if getattr(args, flag, False)]
            # Workaround: megatron-fsdp-variable
            hidden = os.environ.pop(name, None) if asked and os.environ.get(name) == "1" else None
            if hidden is not None:
                report.once(f"{name}=1", "not shown to validate_args", f"{asked[0]} refuses it; it has no effect here")
            try:
                return original(args, *more, **kwargs)
            finally:
                if hidden is not None:
                    os.environ[name] = hidden

        return validate_args

    return wrap
