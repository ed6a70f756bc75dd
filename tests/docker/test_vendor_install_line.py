"""The install line of README.md for a vendor's image: torch stays, or pip refuses."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fake_image import DAS_TORCH, FakeImage, make_wheel

README = Path(__file__).resolve().parents[2] / "README.md"
PIN = """from importlib.metadata import version; print("torch==" + version("torch"))"""


@pytest.fixture
def image(tmp_path):
    """An image with a vendor's torch and an index that offers a newer one."""
    pip = pytest.importorskip("pip")
    made = FakeImage(tmp_path, pip)
    made.add_vendor_torch()
    make_wheel(made.wheels, "torch", "99.0")
    return made


def install(image: FakeImage, tmp_path: Path, requirement: str) -> subprocess.CompletedProcess:
    """README.md's two commands."""
    python = image.bin / "python"
    pins = subprocess.run([python, "-c", PIN], check=True, capture_output=True, text=True, env=image.environment)
    constraint = tmp_path / "torch.txt"
    constraint.write_text(pins.stdout)
    command = [python, "-m", "pip", "install", "--constraint", constraint, requirement]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=image.environment)


def torch_versions(image: FakeImage) -> set[str]:
    return {name for name in image.installed() if name.startswith("torch-")}


def test_the_line_is_the_one_that_readme_shows():
    """README.md shows the commands that are tested here."""
    text = README.read_text(encoding="utf-8")
    assert f"python -c '{PIN}' > torch.txt" in text
    assert "pip install --constraint torch.txt" in text


def test_a_requirement_that_the_vendor_torch_satisfies_is_installed(image, tmp_path):
    """An extra whose packages accept the vendor's torch is installed, and torch stays."""
    make_wheel(image.wheels, "content", "1.0", requires=["torch>=2.1"])
    done = install(image, tmp_path, "content")
    assert done.returncode == 0, done.stderr
    assert torch_versions(image) == {f"torch-{DAS_TORCH}.dist-info"}


def test_a_requirement_that_needs_another_torch_is_refused(image, tmp_path):
    """pip refuses what would replace torch; without the constraint it would have replaced it."""
    make_wheel(image.wheels, "demanding", "1.0", requires=["torch>=50"])
    done = install(image, tmp_path, "demanding")
    assert done.returncode != 0
    assert "torch==2.9.0+das" in done.stdout + done.stderr, "pip names the constraint"
    assert torch_versions(image) == {f"torch-{DAS_TORCH}.dist-info"}
    command = [image.bin / "python", "-m", "pip", "install", "demanding"]
    subprocess.run(command, check=True, capture_output=True, env=image.environment)
    assert torch_versions(image) == {"torch-99.0.dist-info"}


def test_packaging_names_no_torch():
    """llm-adapt itself requires nothing, so that installing it can never replace torch."""
    setup = README.with_name("setup.py").read_text(encoding="utf-8")
    assert "install_requires=" not in setup
