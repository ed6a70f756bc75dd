"""Backend arguments: exact names only, each device's part its own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_adapt.adapters import adapters
from llm_adapt.errors import CommError
from llm_adapt.parallel.backends import NcclOptions, ProcessGroupNCCL, translate_backend


@pytest.mark.parametrize(("device", "library"), [("cpu", "gloo"), ("npu", "hccl"), ("mlu", "cncl"), ("cuda", "nccl")])
def test_nccl_is_the_device_s_library(device, library):
    """nccl, by itself or as cuda's part, becomes the device's library."""
    adapter = adapters()[device]
    assert translate_backend("nccl", adapter) == library
    assert translate_backend("cuda:nccl", adapter) == f"{adapter.device_type}:{library}"
    assert translate_backend("cpu:gloo", adapter) == "cpu:gloo"
    assert translate_backend(None, adapter) is None


def test_both_parts_of_a_hybrid_backend():
    """The parts of cpu:gloo,cuda:nccl stay apart on an accelerator and fall together on the CPU."""
    assert translate_backend("cpu:gloo,cuda:nccl", adapters()["npu"]) == "cpu:gloo,npu:hccl"
    assert translate_backend("cpu:gloo,cuda:nccl", adapters()["mlu"]) == "cpu:gloo,mlu:cncl"
    assert translate_backend("cpu:gloo,cuda:nccl", adapters()["cpu"]) == "cpu:gloo"


@pytest.mark.parametrize("backend", ["cpu:mpi,cuda:nccl", "cuda:nccl,cpu:mpi", "cuda:NCCL,cpu:gloo", "cuda:nccl"])
def test_cuda_s_part_decides_on_the_cpu(backend):
    """Where both parts are the CPU's, cuda's decides, in whatever order they stand: that is where the tensors are."""
    assert translate_backend(backend, adapters()["cpu"]) == "cpu:gloo"


def test_a_device_stands_once():
    """A backend that names one device with two libraries is refused, with the device."""
    with pytest.raises(CommError, match="cpu stands there twice"):
        translate_backend("cpu:gloo,cpu:mpi,cuda:nccl", adapters()["npu"])


@given(st.lists(st.sampled_from(["cpu:gloo", "cuda:nccl", "xpu:xccl", "meta:fake"]), min_size=1, unique=True))
def test_every_other_part_stays(parts):
    """Of a hybrid backend only cuda's part changes, whatever stands beside it."""
    found = translate_backend(",".join(parts), adapters()["npu"]).split(",")
    expected = ["npu:hccl" if part == "cuda:nccl" else part for part in parts]
    assert sorted(found) == sorted(expected)


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz_", min_size=1))
def test_other_names_are_left_alone(name):
    """A backend that is not nccl is somebody else's and is never touched."""
    if name != "nccl":
        assert translate_backend(name, adapters()["cpu"]) == name


def test_options_take_only_what_nccl_has():
    """The stand-in for NCCL's options takes NCCL's fields and refuses others."""
    options = ProcessGroupNCCL.Options(is_high_priority_stream=True)
    assert isinstance(options, NcclOptions)
    assert options.is_high_priority_stream
    options.config.max_ctas = 8
    with pytest.raises(AttributeError):
        options.no_such_field = 1
    with pytest.raises(AttributeError):
        options.config.no_such_field = 1
