"""Cambricon MLU: what its adapter finds broken."""

from __future__ import annotations

import types

from llm_adapt.adapters import FindingKind, adapters
from tests.adapters.fake_host import FakeHost, only, told

ADAPTERS = adapters()


def test_mlu_suffix_names_its_torch(fake: FakeHost) -> None:
    """torch_mlu's +torch suffix decides the pair; a version without it gives no verdict."""
    line = only(fake.mlu(torch="2.9.0+cpu"), "mlu", FindingKind.VERSIONS)
    assert line.startswith("torch_mlu 1.29.2+torch2.7.1 was built for torch 2.7; torch 2.9.0+cpu is installed.")


def test_mlu_without_suffix_gives_no_verdict(fake: FakeHost) -> None:
    """A torch_mlu whose version does not name a torch is not accused."""
    assert told(fake.mlu(torch="2.9.0", plugin="1.29.2"), "mlu") == []


def test_mlu_masks_that_disagree(fake: FakeHost) -> None:
    """Two different masks are reported with the order in which torch_mlu obeys them; equal ones are not."""
    fake.mlu().environ.update(CN_VISIBLE_DEVICES="0,1", CUDA_VISIBLE_DEVICES="0, 1")
    assert told(fake, "mlu") == []
    fake.environ["CUDA_VISIBLE_DEVICES"] = "1"
    assert "obeys CN_VISIBLE_DEVICES before MLU_VISIBLE_DEVICES" in only(fake, "mlu", FindingKind.ENVIRONMENT)


def test_mlu_first_mask_decides(fake: FakeHost) -> None:
    """An empty CUDA mask does not hide MLUs that MLU_VISIBLE_DEVICES shows."""
    fake.mlu().environ.update(MLU_VISIBLE_DEVICES="0", CUDA_VISIBLE_DEVICES="")
    assert ADAPTERS["mlu"].probe(fake.host).found


def test_mlu_cuda_mask_alone_hides(fake: FakeHost) -> None:
    """torch_mlu reads CUDA_VISIBLE_DEVICES when neither of its own variables is set."""
    fake.mlu().environ["CUDA_VISIBLE_DEVICES"] = ""
    assert ADAPTERS["mlu"].probe(fake.host).masked


def test_mlu_second_redirection_is_refused(fake: FakeHost) -> None:
    """The vendor's gpu_migration conflicts with llm_adapt."""
    fake.mlu().environ["TORCH_MLU_GPU_MIGRATION"] = "1"
    assert "gpu_migration is switched on" in only(fake, "mlu", FindingKind.ENVIRONMENT)


def test_mlu_triton_first_is_reported(fake: FakeHost) -> None:
    """triton imported before torch_mlu is reported; after it, not."""
    fake.mlu().loaded["triton"] = types.ModuleType("triton")
    assert "triton was imported before torch_mlu" in only(fake, "mlu", FindingKind.ENVIRONMENT)
    fake.loaded["torch_mlu"] = types.ModuleType("torch_mlu")
    assert told(fake, "mlu") == []


def test_mlu_foreign_triton(fake: FakeHost) -> None:
    """Upstream Triton beside torch_mlu is reported, the vendor's build is not."""
    assert told(fake.mlu().dist("triton", "3.2.0+mlu1.7.2"), "mlu") == []
    fake.dist("triton", "3.0.0")  # sorts first, so it is the one that metadata finds
    (fake.site / "triton-3.2.0+mlu1.7.2.dist-info").rename(fake.site / "gone")
    assert "no 'mlu' in its version" in only(fake, "mlu", FindingKind.PACKAGES)


def test_mlu_on_the_bus_without_a_node(fake: FakeHost) -> None:
    """Cards on the PCI bus without a node hint at the driver or the container."""
    probe = ADAPTERS["mlu"].probe(fake.pci("0xcabc", "0x120000").package("torch_mlu", "1.29.2").host)
    assert (probe.found, probe.loadable) == (False, True)
    assert "1 cards on the PCI bus: is the driver loaded" in probe.reason


def test_mlu_card_without_plugin(fake: FakeHost) -> None:
    """A card without torch_mlu is reported with where to get it."""
    fake.nodes("/dev/cambricon_ctl", "/dev/cambricon_dev0")
    assert "torch_mlu is not installed. Install the wheel" in only(fake, "mlu", FindingKind.PACKAGES)
