"""Host: what can be seen of a machine without importing torch."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

from llm_adapt.adapters import Host, TorchBuild
from tests.adapters.fake_host import FakeHost


def test_nodes_in_numeric_order(fake: FakeHost) -> None:
    """Device nodes are listed in numeric order, so that 10 follows 9."""
    fake.nodes("/dev/davinci10", "/dev/davinci9", "/dev/davinci_manager")
    assert fake.host.nodes("/dev/davinci[0-9]*") == ("/dev/davinci9", "/dev/davinci10")


def test_read_of_an_absent_file_is_empty(fake: FakeHost) -> None:
    """An absent file reads as empty text."""
    assert fake.host.read("/proc/driver/nvidia/version") == ""


def test_which_looks_below_the_root(fake: FakeHost) -> None:
    """A command is looked for on the described machine's PATH, not on this machine's."""
    assert fake.host.which("sh") is None
    assert fake.command("hy-smi").host.which("hy-smi") == str(fake.root / "usr/bin/hy-smi")


def test_library_on_ld_library_path(fake: FakeHost) -> None:
    """A library is found in a folder of LD_LIBRARY_PATH."""
    fake.nodes("/cann/lib64/libhccl.so")
    assert fake.host.library("libhccl.so") is None
    fake.environ["LD_LIBRARY_PATH"] = "/nowhere:/cann/lib64"
    assert fake.host.library("libhccl.so") == "/cann/lib64/libhccl.so"


def test_library_in_the_loader_cache(fake: FakeHost) -> None:
    """A library that ldconfig knows is found although no listed folder has it."""
    assert fake.file("/etc/ld.so.cache", "..libhccl.so\0/opt/x").host.library("libhccl.so") == "ld.so.cache"


def test_pci_classes_of_one_vendor(fake: FakeHost) -> None:
    """PCI devices are told apart by vendor and class."""
    fake.pci("0x10de", "0x030200").pci("0x1d94", "0x060000")
    assert fake.host.pci_classes("0x10de") == ("0x030200",)
    assert fake.host.pci_classes("0xcabc") == ()


def test_bare_folder_is_not_a_package(fake: FakeHost) -> None:
    """A folder without __init__.py, as a checkout leaves it, does not count as the package."""
    (fake.site / "torch_npu").mkdir()
    assert fake.host.package("torch_npu") is None


def test_version_takes_hyphen_for_underscore(fake: FakeHost) -> None:
    """A distribution is found under both spellings of its name, and absent ones have no version."""
    fake.dist("triton_ascend", "3.2.0")
    assert fake.host.version("triton-ascend") == "3.2.0"
    assert fake.host.version("triton") is None


def test_version_without_metadata_is_none(fake: FakeHost) -> None:
    """A damaged distribution without METADATA has no version instead of raising."""
    (fake.site / "apex-0.1.dist-info").mkdir()
    assert fake.host.version("apex") is None


def test_owners_of_a_file(fake: FakeHost) -> None:
    """Every distribution that installed a file is named with its version, others are not."""
    fake.dist("triton", "3.5.1", ("triton/__init__.py",)).dist("tritonclient", "2.0", ("tritonclient/__init__.py",))
    assert fake.host.owners("triton/__init__.py") == ["triton 3.5.1"]


def test_torch_build_without_torch_is_none(fake: FakeHost) -> None:
    """Without torch there is no build."""
    assert fake.host.torch_build() is None


def test_torch_build_is_read_from_version_py(fake: FakeHost) -> None:
    """CUDA and HIP of the installed torch are known without importing it."""
    assert fake.torch("2.9.1+cu128", cuda="12.8").host.torch_build() == TorchBuild("2.9.1+cu128", "12.8", "")
    assert fake.torch("2.9.0+das", hip="6.3").host.torch_build() == TorchBuild("2.9.0+das", "", "6.3")


def test_loaded_torch_beats_the_installed_one(fake: FakeHost) -> None:
    """Once torch is imported, the loaded module is asked, whatever the files say."""
    loaded = types.ModuleType("torch")
    loaded.__version__ = "2.9.0+das.opt1"  # type: ignore[attr-defined]
    loaded.version = types.SimpleNamespace(cuda=None, hip="6.3")  # type: ignore[attr-defined]
    fake.torch("2.13.0+cpu").loaded["torch"] = loaded
    assert fake.host.torch_build() == TorchBuild("2.9.0+das.opt1", "", "6.3")


def test_entry_points_of_a_group_once(fake: FakeHost) -> None:
    """An entry point counts once although its distribution lies on the path twice."""
    fake.dist("torch_npu", "2.13.0", entry_points="[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    twice = Host(root=fake.root, environ={}, python_path=(str(fake.site), str(fake.site)), loaded={})
    assert [point.value for point in twice.entry_points("torch.backends")] == ["torch_npu:_autoload"]
    assert twice.entry_points("llm_adapt.adapters") == []


def test_closed_nodes_of_the_real_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the operating system decides what may be opened."""
    asked = []
    monkeypatch.setattr("os.access", lambda path, mode: asked.append(path) is not None)
    assert Host(root=tmp_path).closed(["/dev/kfd"]) == ("/dev/kfd",)
    assert asked == [str(tmp_path / "dev/kfd")]
