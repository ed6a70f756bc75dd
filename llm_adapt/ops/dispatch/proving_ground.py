"""Where a proof runs: a thread of its own, on a device that must go on computing after a kernel has failed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from llm_adapt.errors import KernelError

__all__ = ["apart", "check_device"]

T = TypeVar("T")


def apart(act: Callable[[], T], device: str = "cpu") -> T:
    """Do something in a thread of its own, where nothing is in force that belongs to the calling thread.

    Except the current device and stream of that type: kernels are launched there, and behind what made the inputs.
    """
    take_place = _place_of_caller(device)
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            take_place()
            results.append(act())
        except BaseException as error:  # noqa: BLE001 - raised in the calling thread, below
            errors.append(error)

    thread = threading.Thread(target=run, name="llm_adapt proof")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _place_of_caller(device: str) -> Callable[[], None]:
    """What puts another thread on the current device and stream of this one."""
    module: Any = getattr(torch, device, None)
    if device == "cpu" or not all(hasattr(module, name) for name in ("set_device", "set_stream")):
        return lambda: None
    index, stream = module.current_device(), module.current_stream()

    def take_place() -> None:
        module.set_device(index)
        module.set_stream(stream)

    return take_place


def check_device(device: torch.device, kernel: str, reason: str) -> None:
    """Ask the device for numbers after a kernel ("library.op") failed its proof for that reason.

    A kernel may fail and be quarantined only where the device goes on computing.

    Once a launch in torch_npu's queue has failed and somebody has caught the error, every later operator is dropped
    without a word; a CUDA device refuses everything after a fault.

    Raises:
        KernelError: the device does not compute any more.
    """
    if device.type == "cpu":
        return
    numbers = torch.arange(257, dtype=torch.float32)
    try:
        found = numbers.to(device).mul(3.0).cpu()
        state = "" if torch.equal(found, numbers * 3.0) else "it answers with other numbers"
    except Exception as error:  # noqa: BLE001 - whatever it raises, the device has stopped
        state = f"it raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if state:
        op = kernel.rpartition(".")[2]
        raise KernelError(
            f"Kernel {kernel} failed its proof ({reason}), and {device} does not compute any more: {state}. Nothing "
            f"that this process computes from here on could be trusted. Start again with LLM_ADAPT_OPS={op}=reference."
        )
