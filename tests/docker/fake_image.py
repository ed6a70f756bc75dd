# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a vendor's image, to try docker/install.py where there is neither engine nor network.

Used by test_docker.py and test_vendor_install_line.py.
"""

from __future__ import annotations

import os
import subprocess
import venv
import zipfile
from pathlib import Path
from types import ModuleType

DAS_TORCH = "2.9.0+das.opt1.dtk2604"  # the version that Hygon's build for DTK 26.04 gives itself


def make_wheel(folder: Path, name: str, version: str, *, requires=(), files=None, command="") -> Path:
    """A pure wheel, small but complete enough for pip."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    requirements = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    contents = {
        f"{module}/__init__.py": "def main():\n    pass\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requirements}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: fake\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **(files or {}),
    }
    if command:
        contents[f"{info}/entry_points.txt"] = f"[console_scripts]\n{command} = {module}:main\n"
    contents[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"])
    wheel = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)
    return wheel


class FakeImage:
    """A virtual environment with a fake llm-adapt to install, offline, with a pip lent by the caller.

    Attributes:
        bin: folder of its python.
        site: its site-packages.
        wheels: the only "index" that its pip knows; put the temptations there.
        project: the wheel of llm-adapt, which requires torch>=2.1.
    """

    def __init__(self, folder: Path, pip: ModuleType) -> None:
        venv.create(folder / "venv", with_pip=False)
        self.bin = folder / "venv" / "bin"
        (self.site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        self.wheels = folder / "wheels"
        lent = folder / "lent"
        for made in (self.wheels, lent):
            made.mkdir()
        (lent / "pip").symlink_to(Path(pip.__file__).parent)  # many times faster than ensurepip
        self.environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "PYTHONPATH": str(lent),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "HOME": str(folder),
        }
        self.project = make_wheel(self.wheels, "llm-adapt", "0.1.0", requires=["torch>=2.1"], command="llm-adapt")

    def add(self, name: str, version: str, **options) -> None:
        """Put a distribution in place as the vendor has it: before our build begins."""
        with zipfile.ZipFile(make_wheel(self.wheels.parent, name, version, **options)) as archive:
            archive.extractall(self.site)

    def add_vendor_torch(self) -> None:
        """A torch that raises when imported, as a vendor's does where the driver is missing."""
        files = {"torch/__init__.py": "raise RuntimeError('no driver')\n", "torch/version.py": "v = 'das'\n"}
        self.add("torch", DAS_TORCH, files=files)

    def install(self, requirements: str = "", **environment: str) -> subprocess.CompletedProcess:
        """docker/install.py as a Dockerfile calls it."""
        script = Path(__file__).resolve().parents[2] / "docker" / "install.py"
        command = [self.bin / "python", script, "--with", requirements, self.project]
        environment = {**self.environment, **environment}
        return subprocess.run(command, check=False, env=environment, capture_output=True, text=True)

    def installed(self) -> set[str]:
        """Names of the dist-info folders."""
        return {path.name for path in self.site.glob("*.dist-info")}
