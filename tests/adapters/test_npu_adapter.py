"""Ascend NPU: what its adapter finds broken."""

from __future__ import annotations

import types

import pytest

from llm_adapt.adapters import FindingKind, adapters
from tests.adapters.fake_host import FakeHost, only, told

ADAPTERS = adapters()


def test_npu_needs_the_same_minor_of_torch(fake: FakeHost) -> None:
    """torch_npu and torch of different minor versions are reported with the pair to install."""
    line = only(fake.npu(torch="2.9.0+cpu"), "npu", FindingKind.VERSIONS)
    assert line.startswith("torch_npu 2.13.0 needs torch 2.13.*, and torch 2.9.0+cpu is installed. Install the pair")


def test_npu_patch_release_pairs(fake: FakeHost) -> None:
    """A post or patch release of torch_npu pairs with every torch of its minor version."""
    assert told(fake.npu(torch="2.7.0+cpu", plugin="2.7.1.post8"), "npu") == []


def test_npu_without_cann_is_explained(fake: FakeHost) -> None:
    """torch_npu without CANN's libraries on the path is explained before anything is imported."""
    fake.npu()
    (fake.root / "usr/lib/libhccl.so").unlink()
    line = only(fake, "npu", FindingKind.PLUGIN)
    assert "CANN's libhccl.so cannot be found: `import torch` raises. Run: source" in line


def test_npu_allocator_variables_conflict(fake: FakeHost) -> None:
    """Two allocator variables abort the process in torch_npu, so they are reported; one alone is not."""
    fake.npu().environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    assert told(fake, "npu") == []
    fake.environ["PYTORCH_NPU_ALLOC_CONF"] = "expandable_segments:True"
    assert "are both set: torch_npu aborts" in only(fake, "npu", FindingKind.ENVIRONMENT)


def test_npu_cuda_allocator_variable_is_noted(fake: FakeHost) -> None:
    """A CUDA allocator setting that torch_npu does not read is worth a note."""
    fake.npu().environ["PYTORCH_CUDA_ALLOC_CONF"] = "max_split_size_mb:128"
    assert "torch_npu does not read it" in only(fake, "npu", FindingKind.NOTE)


def test_npu_second_redirection_is_refused(fake: FakeHost) -> None:
    """transfer_to_npu, by variable or already imported, conflicts with llm_adapt."""
    fake.npu().environ["TORCH_TRANSFER_TO_NPU"] = "1"
    assert "transfer_to_npu is switched on" in only(fake, "npu", FindingKind.ENVIRONMENT)
    fake.environ["TORCH_TRANSFER_TO_NPU"] = "0"
    assert told(fake, "npu") == []
    fake.loaded["torch_npu.contrib.transfer_to_npu"] = types.ModuleType("x")
    assert "transfer_to_npu is switched on" in only(fake, "npu", FindingKind.ENVIRONMENT)


@pytest.mark.parametrize(
    ("mask", "complaint"), [("1,0", "CANN needs"), ("0,0", "CANN needs"), ("GPU-1", "only ordinals")]
)
def test_npu_mask_must_be_ascending_ordinals(fake: FakeHost, mask: str, complaint: str) -> None:
    """CANN reads ordinals in ascending order only; any other mask is reported."""
    fake.npu().environ["ASCEND_RT_VISIBLE_DEVICES"] = mask
    assert complaint in only(fake, "npu", FindingKind.ENVIRONMENT)


@pytest.mark.parametrize("mask", ["0", "0, 2,10"])
def test_npu_good_mask_is_quiet(fake: FakeHost, mask: str) -> None:
    """A mask in ascending order is no finding."""
    fake.npu().environ["ASCEND_RT_VISIBLE_DEVICES"] = mask
    assert told(fake, "npu") == []


def test_npu_card_without_plugin(fake: FakeHost) -> None:
    """A card without torch_npu is not found, and the mend is the pip command for the torch that is there."""
    fake.nodes("/dev/davinci0", "/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc").torch("2.9.0+cpu")
    probe = ADAPTERS["npu"].probe(fake.host)
    assert (probe.found, probe.reason) == (False, "/dev/davinci0, but torch_npu is not installed")
    assert "torch_npu==2.9.*" in only(fake, "npu", FindingKind.PACKAGES)
