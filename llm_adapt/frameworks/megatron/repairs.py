"""Repairs of single Megatron functions that assume CUDA, TransformerEngine or a certain interpreter."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm_adapt.adapters.base import DeviceAdapter
from llm_adapt.errors import PatchError

__all__ = ["absent_is_older", "compile_helpers", "never", "no_fuser", "nothing", "quiet_fork", "signal_device"]


def absent_is_older(original: Callable[..., bool]) -> Callable[..., bool]:
    """A version check that answers False for a package that is not there, where Megatron's raises."""

    @functools.wraps(original)
    def is_min_version(*args: Any, **kwargs: Any) -> bool:
        try:
            return original(*args, **kwargs)
        except (ImportError, LookupError):  # includes importlib.metadata.PackageNotFoundError
            return False
        except TypeError as error:
            if "NoneType" in str(error):  # None >= Version: there is no version
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
