"""The facade on a simulated NPU: what only a device that computes can show (pytest --simulate npu)."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import llm_adapt

pytestmark = pytest.mark.simulator("npu")


@pytest.fixture(autouse=True)
def facade() -> Iterator[None]:
    """CUDA is the simulated NPU inside the test."""
    with llm_adapt.patched(simulate="npu"):
        yield


def test_a_generator_of_cuda_has_the_current_ordinal() -> None:
    """torch.Generator("cuda") says which device it is of, as CUDA's does."""
    assert torch.Generator("cuda").device == torch.device("cuda:0")
    assert torch.Generator(device=torch.device("cuda")).manual_seed(1).device.index == 0
    assert torch.Generator().device.type == "cpu"


def test_streams_and_events_without_a_vendors_name() -> None:
    """torch.Stream and torch.Event of cuda are the NPU's."""
    assert torch.Stream("cuda").query()
    assert torch.Stream(device="cuda").device == torch.device("cuda:0")
    assert torch.Event(device="cuda", enable_timing=True).query()
    assert isinstance(torch.cuda.Event(), torch.Event)
    assert issubclass(torch.cuda.Stream, torch.Stream)


def test_a_stream_is_found_again_by_its_handle() -> None:
    """cuda_stream is the handle that ExternalStream takes."""
    stream = torch.cuda.Stream()
    assert stream.cuda_stream == stream.npu_stream
    assert torch.cuda.ExternalStream(stream.cuda_stream, "cuda:0").cuda_stream == stream.cuda_stream


COMPILED = """
import llm_adapt
llm_adapt.patch(simulate="npu")
import torch

def step(x):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y = x + 1
    torch.cuda.current_stream().wait_stream(stream)
    return y

print(torch.compile(step, backend="eager")(torch.ones(2, device="cuda")).tolist())
"""


def test_streams_in_compiled_code() -> None:
    """torch.compile traces the making and waiting of streams: in a process that is patched once, as scripts are.

    The compiler keeps the class of contexts that it saw first: after unpatch() and a second patch() it is another.
    """
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False, timeout=200)
    assert done.stdout.splitlines()[-1:] == ["[2.0, 2.0]"], done.stderr[-3000:]


def test_storages_are_on_cuda() -> None:
    """A storage of the NPU is what the script calls a cuda storage."""
    assert torch.ones(1, device="cuda").untyped_storage().is_cuda
    assert torch.ones(1).untyped_storage().cuda().is_cuda
    assert not torch.ones(1).untyped_storage().is_cuda


def test_pinned_for_cuda() -> None:
    """pin_memory("cuda") pins for the NPU."""
    assert torch.ones(1).pin_memory("cuda").is_pinned()
    assert torch.ones(1).pin_memory().is_pinned("cuda")
    assert not torch.ones(1).is_pinned()


def test_a_checkpoint_of_this_device_follows_a_map_of_cuda() -> None:
    """map_location={"cuda:0": "cpu"} holds for a file that was written here."""
    file = io.BytesIO()
    torch.save(torch.ones(1, device="cuda"), file)
    file.seek(0)
    assert torch.load(file, map_location={"cuda:0": "cpu"}).device.type == "cpu"


def test_a_custom_op_of_cuda_runs() -> None:
    """A kernel registered for cuda serves tensors of the NPU."""

    @torch.library.custom_op("llm_adapt_facade::twice", mutates_args=(), device_types="cuda")
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    assert twice(torch.ones(1, device="cuda")).item() == 2


def test_the_default_generators_are_there_in_a_lazy_call() -> None:
    """Megatron-Core reads default_generators[i] in a lazy call of its own."""
    seen: list[int] = []
    torch.cuda._lazy_call(lambda: seen.append(torch.cuda.default_generators[0].get_state().numel()))
    torch.cuda.init()
    assert seen[0] > 0
