"""The same facade on Ascend NPU and Cambricon MLU: translation and names, with a fake plug-in and no device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_vendor
import pytest
import vendor_checks

CHECKS = Path(__file__).with_name("vendor_checks.py")
ROOT = Path(__file__).parents[3]
DEFAULT = [name for name in vendor_checks.CHECKS if name != "real_libraries"]


@pytest.fixture(scope="module", params=["npu", "mlu"])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Outcome of every check, from one process in which the vendor's plug-in is the fake one."""
    return run_checks(request.param, tmp_path_factory.mktemp(request.param), *DEFAULT)


def run_checks(vendor: str, folder: Path, *names: str) -> dict[str, str]:
    """Run checks in a process of their own."""
    fake_vendor.write_plugin(vendor, folder)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LLM_ADAPT_", "CUDA_"))}
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, str(CHECKS), vendor, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", DEFAULT)
def test_a_vendor_s_device(outcomes: dict[str, str], name: str) -> None:
    """Each check of vendor_checks.py holds on both vendors' devices; its docstring says what it is."""
    assert outcomes[name] == "", outcomes[name]


def test_every_check_says_what_it_is() -> None:
    """Every check has a sentence that reads as the specification."""
    assert all(check.__doc__ and check.__doc__.endswith(".") for check in vendor_checks.CHECKS.values())


@pytest.mark.slow
@pytest.mark.parametrize("vendor", ["npu", "mlu"])
def test_real_libraries_choose_the_vendor_s_device(vendor: str, tmp_path: Path) -> None:
    """accelerate, peft and transformers themselves choose the NPU or MLU under the facade, not its CUDA."""
    outcome = run_checks(vendor, tmp_path, "real_libraries")["real_libraries"]
    if outcome.startswith("skip:"):
        pytest.skip(outcome)
    assert outcome == "", outcome
