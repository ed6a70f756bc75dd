"""FakeHost: a made-up machine in a folder, for tests of detection and of the doctor."""

from __future__ import annotations

import os
from pathlib import Path

from llm_adapt.adapters import FindingKind, Host, adapters


class FakeHost:
    """Builds a machine piece by piece; `host` is how llm_adapt sees it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.site = folder / "site"
        self.root.mkdir(parents=True, exist_ok=True)
        self.site.mkdir(parents=True, exist_ok=True)
        self.environ = {"PATH": "/usr/bin"}
        self.loaded: dict[str, object] = {}
        self.closed: set[str] = set()

    @property
    def host(self) -> Host:
        """The machine as it stands now."""
        return Host(
            root=self.root,
            environ=self.environ,
            python_path=(str(self.site),),
            loaded=self.loaded,
            can_open=lambda path: "/" + os.path.relpath(path, self.root) not in self.closed,
        )

    def nodes(self, *paths: str) -> FakeHost:
        """Put empty files where device nodes, libraries or folders' marks would be."""
        for path in paths:
            self.file(path, "")
        return self

    def file(self, path: str, text: str) -> FakeHost:
        """Write a file below the root."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        return self

    def command(self, name: str) -> FakeHost:
        """Put an executable on PATH."""
        self.file(f"/usr/bin/{name}", "#!/bin/sh\n")
        (self.root / "usr/bin" / name).chmod(0o755)
        return self

    def pci(self, vendor: str, device_class: str) -> FakeHost:
        """Add a device to the PCI bus."""
        slot = f"/sys/bus/pci/devices/0000:{len(list(self.root.glob('sys/bus/pci/devices/*'))):02x}:00.0"
        return self.file(f"{slot}/vendor", f"{vendor}\n").file(f"{slot}/class", f"{device_class}\n")

    def dist(self, name: str, version: str, files: tuple[str, ...] = (), entry_points: str = "") -> FakeHost:
        """Install the metadata of a distribution."""
        info = self.site / f"{name}-{version}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files), encoding="utf-8")
        if entry_points:
            (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")
        return self

    def package(self, name: str, version: str | None = None, text: str = "") -> FakeHost:
        """Install an importable package, with metadata when a version is given."""
        folder = self.site / name
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").write_text(text, encoding="utf-8")
        return self.dist(name, version) if version else self

    def torch(self, version: str, cuda: str | None = None, hip: str | None = None) -> FakeHost:
        """Install a torch of which only version.py matters; importing it would fail the test."""
        self.package("torch", version, "raise AssertionError('torch was imported')")
        lines = f"__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\nhip: Optional[str] = {hip!r}\n"
        (self.site / "torch" / "version.py").write_text(lines, encoding="utf-8")
        return self

    def npu(self, torch: str = "2.13.0+cpu", plugin: str = "2.13.0") -> FakeHost:
        """A healthy Ascend node with eight cards."""
        self.nodes(*(f"/dev/davinci{card}" for card in range(8)))
        self.nodes("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
        self.nodes("/usr/lib/libhccl.so", "/usr/lib/libascendcl.so")
        return self.torch(torch).package("torch_npu", plugin)

    def mlu(self, torch: str = "2.7.1+cpu", plugin: str = "1.29.2+torch2.7.1") -> FakeHost:
        """A healthy Cambricon node with two cards."""
        self.nodes("/dev/cambricon_ctl", "/dev/cambricon_dev0", "/dev/cambricon_dev1").pci("0xcabc", "0x120000")
        return self.torch(torch).package("torch_mlu", plugin)

    def dcu(self, torch: str = "2.9.0+das.opt1.dtk2604") -> FakeHost:
        """A healthy Hygon node."""
        self.nodes("/dev/kfd", "/dev/mkfd", "/dev/dri/renderD128", "/opt/dtk/env.sh").command("hy-smi")
        return self.torch(torch, hip="6.3.26093").dist("numpy", "1.26.4")

    def cuda(self, torch: str = "2.9.1+cu128") -> FakeHost:
        """A healthy NVIDIA node with four GPUs."""
        self.nodes("/dev/nvidiactl", *(f"/dev/nvidia{gpu}" for gpu in range(4)))
        module = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 22:50:36 UTC 2025\n"
        return self.file("/proc/driver/nvidia/version", module).torch(torch, cuda="12.8")


def told(fake: FakeHost, name: str) -> list[tuple[FindingKind, str]]:
    """Kind and text of what an adapter finds broken."""
    return [(found.kind, found.line) for found in adapters()[name].diagnose(fake.host)]


def only(fake: FakeHost, name: str, kind: FindingKind) -> str:
    """Text of the one finding, which must be of this kind."""
    ((found, line),) = told(fake, name)
    assert found is kind
    return line
