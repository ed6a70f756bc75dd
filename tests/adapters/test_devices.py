"""What holds for every device: facts, masks, nodes, and probes that never fail inside."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapt.adapters import DeviceAdapter, FindingKind, adapters
from tests.adapters.fake_host import FakeHost, only

ADAPTERS = adapters()


def test_cuda_and_dcu_alone_need_no_facade() -> None:
    """Where the device is torch.cuda itself nothing is redirected, elsewhere everything is."""
    assert {name for name, adapter in ADAPTERS.items() if not adapter.needs_facade} == {"cuda", "dcu"}


def test_backends_are_the_vendors() -> None:
    """Each device brings its own collectives."""
    expected = {"cuda": "nccl", "npu": "hccl", "mlu": "cncl", "dcu": "nccl", "cpu": "gloo"}
    assert {name: adapter.backend for name, adapter in ADAPTERS.items()} == expected


@pytest.mark.parametrize("name", ["npu", "mlu", "dcu", "cpu"])
def test_capability_told_to_cuda_code_is_ampere_with_a_reason(name: str) -> None:
    """No device but CUDA may read as Maxwell, as Hopper or as None: all present (8, 0) and say why."""
    assert ADAPTERS[name].cuda_capability == (8, 0)
    assert ADAPTERS[name].cuda_capability_reason


def test_cuda_tells_its_own_capability() -> None:
    """CUDA code on CUDA is told the truth."""
    assert ADAPTERS["cuda"].cuda_capability is None


@pytest.mark.parametrize("name", ["npu", "mlu", "dcu", "cuda"])
@pytest.mark.parametrize("mask", ["", "-1"])
def test_masked_devices_are_present_but_masked(fake: FakeHost, name: str, mask: str) -> None:
    """A variable that hides all devices makes them present but masked, with the variable in the reason."""
    variable = ADAPTERS[name].visible_devices[0]
    getattr(fake, name)().environ[variable] = mask
    probe = ADAPTERS[name].probe(fake.host)
    assert (probe.found, probe.masked) == (False, True)
    assert probe.reason.endswith(f"all masked by {variable}={mask!r}")


@pytest.mark.parametrize("name", ["npu", "mlu", "dcu", "cuda"])
def test_mask_that_leaves_a_device_is_no_mask(fake: FakeHost, name: str) -> None:
    """A variable that selects some devices leaves the device found."""
    getattr(fake, name)().environ[ADAPTERS[name].visible_devices[0]] = "1"
    assert ADAPTERS[name].probe(fake.host).found


@pytest.mark.parametrize(
    ("name", "node"),
    [("npu", "/dev/davinci3"), ("mlu", "/dev/cambricon_ctl"), ("dcu", "/dev/kfd"), ("cuda", "/dev/nvidiactl")],
)
def test_closed_node_is_a_permission_problem(fake: FakeHost, name: str, node: str) -> None:
    """A device node that this user may not open is reported with both mends, group and container."""
    getattr(fake, name)().closed.add(node)
    line = only(fake, name, FindingKind.PERMISSIONS)
    assert line.startswith(f"{node} cannot be opened by this user. Join the group")
    assert f"--device={node}" in line


@pytest.mark.parametrize(("name", "companion"), [("npu", "/dev/hisi_hdc"), ("mlu", "/dev/cambricon_ctl")])
def test_missing_control_node_is_reported(fake: FakeHost, name: str, companion: str) -> None:
    """A container that got the cards but not their control node is told which option it lacks."""
    getattr(fake, name)()
    (fake.root / companion.lstrip("/")).unlink()
    assert f"Start the container with --device={companion}." in only(fake, name, FindingKind.PERMISSIONS)


MARKS: dict[str, Callable[[FakeHost], Any]] = {
    "npu node": lambda fake: fake.nodes("/dev/davinci0"),
    "npu plug-in": lambda fake: fake.package("torch_npu", "2.13.0"),
    "npu plug-in without metadata": lambda fake: fake.package("torch_npu"),
    "npu mask": lambda fake: fake.environ.update(ASCEND_RT_VISIBLE_DEVICES="1,x,"),
    "mlu node": lambda fake: fake.nodes("/dev/cambricon_dev0"),
    "mlu plug-in": lambda fake: fake.package("torch_mlu", "1.0+torch"),
    "mlu mask": lambda fake: fake.environ.update(CN_VISIBLE_DEVICES="GPU-uuid", MLU_VISIBLE_DEVICES=""),
    "kfd": lambda fake: fake.nodes("/dev/kfd"),
    "mkfd": lambda fake: fake.nodes("/dev/mkfd"),
    "dtk": lambda fake: fake.nodes("/opt/dtk/env.sh"),
    "dtk torch": lambda fake: fake.torch("2.9.0+das.opt1.dtk2604", hip="6.3"),
    "cpu torch": lambda fake: fake.torch("2.13.0+cpu"),
    "torch without version.py": lambda fake: fake.package("torch"),
    "torch of a strange version": lambda fake: fake.torch("unknown"),
    "flash_attn": lambda fake: fake.package("flash_attn", "2.8.3+das.torch", "__version__ ="),
    "numpy": lambda fake: fake.dist("numpy", "2"),
    "nvidia": lambda fake: fake.nodes("/dev/nvidia0").file("/proc/driver/nvidia/version", "?"),
    "wsl": lambda fake: fake.nodes("/dev/dxg", "/usr/lib/wsl/lib/libcuda.so.1"),
    "pci": lambda fake: fake.pci("0x1d94", "").pci("0xcabc", "0x120000").pci("0x10de", "0x030000"),
    "closed": lambda fake: fake.closed.update(("/dev/kfd", "/dev/davinci0", "/dev/nvidia0")),
    "no PATH": lambda fake: fake.environ.pop("PATH", None),
}


@settings(max_examples=60, deadline=None)
@given(marks=st.sets(st.sampled_from(sorted(MARKS))))
def test_no_probe_and_no_diagnosis_ever_raises(marks: set[str]) -> None:
    """Whatever mixture of marks a machine shows, every adapter answers with a reason and never fails inside."""
    with tempfile.TemporaryDirectory() as folder:
        fake = FakeHost(Path(folder))
        for mark in sorted(marks):
            MARKS[mark](fake)
        for adapter in ADAPTERS.values():
            probe = adapter.probe(fake.host)
            assert probe.reason
            assert not probe.reason.startswith("probe failed")
            assert not any("diagnosis of" in line for line in probe.problems)


def test_diagnosis_that_raises_is_a_finding(fake: FakeHost) -> None:
    """A diagnosis that fails inside becomes a finding that carries its error."""

    def diagnose(host: object) -> tuple[()]:
        raise KeyError("slot")

    adapter = DeviceAdapter("x", "X", "x", "x", lambda host: None, lambda: None, diagnose)  # type: ignore[arg-type, return-value]
    (found,) = adapter.diagnose(fake.host)
    assert found.what == "The diagnosis of X failed: KeyError: 'slot'."


def test_versions_of_what_is_present(fake: FakeHost) -> None:
    """A report carries the versions of the packages and drivers that are present, and no others."""
    fake.npu().file("/usr/local/Ascend/driver/version.info", "Version=25.2.0\nmore\n")
    expected = {"torch": "2.13.0+cpu", "torch_npu": "2.13.0", "Ascend driver": "Version=25.2.0"}
    assert ADAPTERS["npu"].versions(fake.host) == expected
