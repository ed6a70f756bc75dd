"""NVIDIA CUDA: what its adapter finds broken."""

from __future__ import annotations

from llm_adapt.adapters import FindingKind, adapters
from tests.adapters.fake_host import FakeHost, only

ADAPTERS = adapters()


def test_gpu_with_a_cpu_torch(fake: FakeHost) -> None:
    """A GPU with a CPU build of torch is not found, and the mend is a CUDA build."""
    fake.cuda().torch("2.13.0+cpu")
    probe = ADAPTERS["cuda"].probe(fake.host)
    assert (probe.found, probe.loadable) == (False, False)
    assert "torch 2.13.0+cpu is a CPU build. Install a CUDA build" in only(fake, "cuda", FindingKind.PACKAGES)


def test_container_without_gpus(fake: FakeHost) -> None:
    """A loaded driver without nodes is a container that was started without --gpus."""
    fake.file("/proc/driver/nvidia/version", "NVRM version: Kernel Module  570.86.15  Thu").torch("2.9.1", cuda="12.8")
    probe = ADAPTERS["cuda"].probe(fake.host)
    assert (probe.found, probe.loadable) == (False, True)
    assert probe.reason.endswith("although the driver 570.86.15 is loaded: a container started without --gpus")


def test_card_without_driver(fake: FakeHost) -> None:
    """An NVIDIA card on the bus without nodes and driver is said to lack the driver."""
    assert "the driver is not loaded" in ADAPTERS["cuda"].probe(fake.pci("0x10de", "0x030200").host).reason


def test_wsl_counts_as_a_gpu(fake: FakeHost) -> None:
    """Under WSL the GPU is /dev/dxg with the driver's library."""
    fake.nodes("/dev/dxg").torch("2.9.1", cuda="12.8")
    assert not ADAPTERS["cuda"].probe(fake.host).found
    assert ADAPTERS["cuda"].probe(fake.nodes("/usr/lib/wsl/lib/libcuda.so.1").host).found


def test_slurm_without_gpus_is_masked(fake: FakeHost) -> None:
    """Slurm writes NoDevFiles into the mask of a job that got no GPU."""
    fake.cuda().environ["CUDA_VISIBLE_DEVICES"] = "NoDevFiles"
    assert ADAPTERS["cuda"].probe(fake.host).masked


def test_dtk_torch_is_not_cuda(fake: FakeHost) -> None:
    """DTK's torch has device type cuda and no CUDA: the CUDA adapter does not claim it."""
    assert not ADAPTERS["cuda"].probe(fake.dcu().host).found
