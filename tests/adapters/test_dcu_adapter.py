"""Hygon DCU: told from AMD, and what its adapter finds broken."""

from __future__ import annotations

import pytest

from llm_adapt.adapters import FindingKind, adapters, detect
from tests.adapters.fake_host import FakeHost, only, told

ADAPTERS = adapters()


def test_dcu_is_not_amd(fake: FakeHost) -> None:
    """A ROCm torch on /dev/kfd without a mark of DTK is AMD: not found, and said so."""
    fake.nodes("/dev/kfd").torch("2.9.0+rocm6.3", hip="6.3.42131")
    assert ADAPTERS["dcu"].probe(fake.host).reason.endswith("AMD ROCm is not a device of llm_adapt yet")
    assert "AMD ROCm is not a device of llm_adapt yet" in only(fake, "dcu", FindingKind.DEVICE)


def test_amd_laptop_with_cpu_torch_is_quiet(fake: FakeHost) -> None:
    """An AMD graphics driver brings /dev/kfd too; with a CPU torch that is nobody's fault."""
    assert told(fake.nodes("/dev/kfd").torch("2.13.0+cpu"), "dcu") == []


def test_dcu_with_a_torch_that_pip_replaced(fake: FakeHost) -> None:
    """A DCU whose torch is not DTK's is not found, and the finding says which torch is in the way."""
    fake.dcu(torch="2.10.0+rocm6.3")
    probe = ADAPTERS["dcu"].probe(fake.host)
    assert (probe.found, probe.loadable) == (False, False)
    line = only(fake, "dcu", FindingKind.PACKAGES)
    assert line.startswith(
        "A DCU is here (/opt/dtk, /dev/mkfd, hy-smi), but torch 2.10.0+rocm6.3 is not the DTK build."
    )


def test_dcu_is_known_by_its_card(fake: FakeHost) -> None:
    """A Hygon co-processor on the bus marks a DCU even without DTK in the image."""
    probe = ADAPTERS["dcu"].probe(fake.nodes("/dev/kfd").pci("0x1d94", "0x0b4000").torch("2.9.0+rocm6.3").host)
    assert "PCI vendor 0x1d94" in probe.reason


def test_hygon_cpu_is_no_dcu(fake: FakeHost) -> None:
    """The bridges of a Hygon CPU carry the same vendor id and mark nothing."""
    probe = ADAPTERS["dcu"].probe(fake.nodes("/dev/kfd").pci("0x1d94", "0x060000").torch("2.9.0+rocm6.3").host)
    assert "without a mark of DTK" in probe.reason


def test_old_dtk_version_string_is_known(fake: FakeHost) -> None:
    """Old DTK builds say dtk, not das."""
    assert ADAPTERS["dcu"].probe(fake.dcu(torch="1.13.1+git55d300e.abi0.dtk2310").host).found


def test_dcu_torch_without_node(fake: FakeHost) -> None:
    """DTK's torch on a node without cards is not found, and may be asked for."""
    probe = ADAPTERS["dcu"].probe(fake.torch("2.9.0+das.opt1.dtk2604", hip="6.3").host)
    assert (probe.found, probe.loadable) == (False, True)


def test_dcu_masks_that_disagree(fake: FakeHost) -> None:
    """The three masks must be equal where they are set."""
    fake.dcu().environ.update(HIP_VISIBLE_DEVICES="0,1", CUDA_VISIBLE_DEVICES="0,1")
    assert told(fake, "dcu") == []
    fake.environ["HCU_VISIBLE_DEVICES"] = "0"
    line = only(fake, "dcu", FindingKind.ENVIRONMENT)
    assert "HCU_VISIBLE_DEVICES='0'" in line
    assert "consults all of them" in line


def test_dcu_any_mask_hides(fake: FakeHost) -> None:
    """Any of the three masks hides the DCUs, whichever it is."""
    fake.dcu().environ["CUDA_VISIBLE_DEVICES"] = "-1"
    assert ADAPTERS["dcu"].probe(fake.host).masked


def test_dcu_numpy_two(fake: FakeHost) -> None:
    """numpy 2 breaks DTK's torch."""
    fake.dcu()
    (fake.site / "numpy-1.26.4.dist-info").rename(fake.site / "gone")
    assert "pip install 'numpy<2'" in only(fake.dist("numpy", "2.1.0"), "dcu", FindingKind.PACKAGES)


def test_dcu_flash_attn_lies_about_its_version(fake: FakeHost) -> None:
    """The DAS wheel says 2.6.1 and is 2.8.3: a note, because nothing is broken under llm_adapt."""
    fake.dcu().package("flash_attn", "2.8.3+das.opt1.dtk2604.torch290", '__version__ = "2.6.1"\n')
    assert "says version 2.6.1, its wheel is 2.8.3+das" in only(fake, "dcu", FindingKind.NOTE)


def test_dcu_honest_flash_attn_is_quiet(fake: FakeHost) -> None:
    """A flash_attn whose two versions agree is no finding."""
    fake.dcu().package("flash_attn", "2.8.3+das.opt1.dtk2604.torch290", '__version__ = "2.8.3"\n')
    assert told(fake, "dcu") == []


def test_dcu_wheel_of_another_torch(fake: FakeHost) -> None:
    """A DAS wheel names its torch without dots; another torch is reported."""
    fake.dcu(torch="2.10.0+das.opt1.dtk2604").dist("flash_attn", "2.8.3+das.opt1.dtk2604.torch290")
    line = only(fake, "dcu", FindingKind.VERSIONS)
    assert "is for torch290; torch 2.10.0+das" in line
    assert "ends in torch2100" in line


@pytest.mark.parametrize("package", ["triton", "flash_attn"])
def test_dcu_cuda_wheel_from_pypi(fake: FakeHost, package: str) -> None:
    """triton and flash_attn from PyPI are CUDA builds and are reported on a DCU."""
    assert f"{package} 3.6.0 is not the vendor's build" in only(
        fake.dcu().dist(package, "3.6.0"), "dcu", FindingKind.PACKAGES
    )


def test_a_simulated_dcu_is_had_by_asking_only(fake: FakeHost) -> None:
    """A process that simulates a DCU detects the CPU; who asks for dcu gets it, with the reason."""
    fake.torch("2.13.0+cpu").environ["DCU_SIM_MODEL"] = "BW1000"
    assert detect(host=fake.host).adapter.name == "cpu"
    found = detect("dcu", host=fake.host)
    assert (found.adapter.name, "simulates a DCU (BW1000)" in found.reason) == ("dcu", True)
    assert not ADAPTERS["dcu"].probe(fake.host).found
