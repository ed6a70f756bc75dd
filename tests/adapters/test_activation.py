"""activate: variables, `import torch`, the plug-in, and the explanation of what goes wrong."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_adapt.adapters import (
    ActivationError,
    DeviceAdapter,
    FindingKind,
    Probe,
    activate,
    adapters,
    explain,
    spell_error,
)
from tests.adapters.broken_plugin import ERROR, install, python
from tests.adapters.fake_host import FakeHost

ADAPTERS = adapters()


def adapter(check: Callable[[], str | None] = lambda: None, **facts: object) -> DeviceAdapter:
    """A device that any torch drives, with these facts."""
    blank = DeviceAdapter("toy", "Toy", "cpu", "gloo", lambda host: Probe(True, "toy"), check)
    return dataclasses.replace(blank, **facts)  # type: ignore[arg-type]


# -- environment -------------------------------------------------------------------------------------------


def test_defaults_are_set_and_told() -> None:
    """Each default variable is set in the environment and told in a line."""
    environ: dict[str, str] = {}
    lines = activate(adapter(default_env={"HCCL_CONNECT_TIMEOUT": "1200"}), environ)
    assert (environ, lines[0]) == ({"HCCL_CONNECT_TIMEOUT": "1200"}, "HCCL_CONNECT_TIMEOUT=1200")


def test_users_values_are_kept_and_told() -> None:
    """A variable that the user set is never overwritten, and the line says what was kept."""
    environ = {"HCCL_CONNECT_TIMEOUT": "600"}
    lines = activate(adapter(default_env={"HCCL_CONNECT_TIMEOUT": "1200"}), environ)
    assert environ == {"HCCL_CONNECT_TIMEOUT": "600"}
    assert lines[0] == "HCCL_CONNECT_TIMEOUT=600 kept (llm_adapt would set 1200)"


def masked(cuda: str, **environ: str) -> tuple[dict[str, str], list[str]]:
    """Activate a device that has the NPU's mask rule, with this CUDA_VISIBLE_DEVICES."""
    npu = ADAPTERS["npu"]
    toy = adapter(visible_devices=npu.visible_devices, mask_from_cuda=npu.mask_from_cuda)
    environ["CUDA_VISIBLE_DEVICES"] = cuda
    return environ, activate(toy, environ)


def test_cuda_mask_is_translated() -> None:
    """CUDA_VISIBLE_DEVICES selects the same ordinals on a device that does not read it, and a line says so."""
    environ, lines = masked("2,3")
    assert environ["ASCEND_RT_VISIBLE_DEVICES"] == "2,3"
    assert "ASCEND_RT_VISIBLE_DEVICES=2,3 (from CUDA_VISIBLE_DEVICES)" in lines


def test_own_mask_wins_over_the_cuda_mask() -> None:
    """A mask of the device itself is left as it is."""
    assert masked("2,3", ASCEND_RT_VISIBLE_DEVICES="5")[0]["ASCEND_RT_VISIBLE_DEVICES"] == "5"


@pytest.mark.parametrize("mask", ["", "-1"])
def test_cuda_mask_that_hides_all_is_not_translated(mask: str) -> None:
    """Hiding every CUDA device says nothing about NPUs: the mask stays unset, with a line."""
    environ, lines = masked(mask)
    assert "ASCEND_RT_VISIBLE_DEVICES" not in environ
    assert any("hides CUDA devices only" in line for line in lines)


@pytest.mark.parametrize("mask", ["3,2", "GPU-8f2e"])
def test_cuda_mask_without_counterpart_is_an_error(mask: str) -> None:
    """An order or a UUID that the device cannot take is an error, not another set of devices."""
    with pytest.raises(ActivationError, match="no counterpart") as raised:
        masked(mask)
    assert raised.value.finding.kind is FindingKind.ENVIRONMENT
    assert raised.value.finding.mend == "Set ASCEND_RT_VISIBLE_DEVICES yourself."


# -- failures ----------------------------------------------------------------------------------------------


def test_torch_that_cannot_drive_the_device_is_an_error() -> None:
    """The reason of the device's own check becomes the cause of the error."""
    with pytest.raises(ActivationError, match="Cause: torch_npu sees no NPU") as raised:
        activate(adapter(lambda: "torch_npu sees no NPU."), {})
    assert raised.value.finding.kind is FindingKind.DEVICE


def test_check_that_raises_is_explained() -> None:
    """A check that raises inside the vendor's runtime is explained like a failed import."""

    def check() -> str | None:
        raise RuntimeError("libcndev.so: cannot open shared object file")

    with pytest.raises(ActivationError, match=r"Neuware's libcndev\.so is on no library path"):
        activate(adapter(check), {})


def test_missing_plugin_is_an_error() -> None:
    """A plug-in that is not installed is named with the way to get it."""
    with pytest.raises(ActivationError, match="the package no_such_plugin is not installed") as raised:
        activate(adapter(plugin="no_such_plugin"), {})
    assert raised.value.finding.kind is FindingKind.PACKAGES


def test_plugin_is_imported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plug-in of the chosen device is imported; when it is already, nothing happens."""
    monkeypatch.setitem(sys.modules, "toy_plugin", types.ModuleType("toy_plugin"))
    assert activate(adapter(plugin="toy_plugin"), {})[-1].endswith("drives Toy")


def test_foreign_plugin_that_is_already_loaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """When torch was imported before with another device's plug-in, a line says that its changes stay."""
    import torch  # noqa: F401

    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
    lines = activate(ADAPTERS["cpu"], {})
    assert any(line.startswith("torch_npu was imported before and its changes to torch stay") for line in lines)


FAILURES = [
    ("libhccl.so: cannot open shared object file", FindingKind.PLUGIN, "npu", "CANN's libhccl.so", "set_env.sh"),
    ("libascend_hal.so: cannot open shared object file", FindingKind.PLUGIN, "npu", "driver", "Install the driver"),
    ("ASCEND_OPP_PATH environment variable is not set.", FindingKind.PLUGIN, "npu", "ASCEND_OPP_PATH", "set_env.sh"),
    ("ASCEND_HOME_PATH : /x does not exist. ", FindingKind.PLUGIN, "npu", "points nowhere", "set_env.sh"),
    ("libx.so: undefined symbol: aclnnSwiGlu", FindingKind.VERSIONS, "npu", "newer CANN", "Install the CANN"),
    ("Two accelerators cannot be used at the same time", FindingKind.VERSIONS, "npu", "another acc", "CPU build"),
    ("ERR00007 PTA feature not supported", FindingKind.VERSIONS, "npu", "another accelerator", "CPU build"),
    (
        "Both PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF have been set",
        FindingKind.ENVIRONMENT, "npu", "both set", "unset",
    ),
    ("libcnrt.so: cannot open shared object file", FindingKind.PLUGIN, "mlu", "Neuware's libcnrt.so", "NEUWARE_HOME"),
    ("libgalaxyhip.so.5: cannot open shared object", FindingKind.PLUGIN, "dcu", "libgalaxyhip.so.5", "/opt/dtk/env.sh"),
    ("libamdhip64.so.6: cannot open shared object", FindingKind.PACKAGES, "dcu", "AMD ROCm", "DAS wheel"),
    ("libcuda.so.1: cannot open shared object file", FindingKind.PLUGIN, "cuda", "libcuda.so", "--gpus all"),
    ("libcublas.so.12: cannot open shared object", FindingKind.PACKAGES, "cuda", "libcublas.so.12", "pip install"),
    ("a.so: undefined symbol: _ZN5torch3fooEv", FindingKind.VERSIONS, "", "another torch", "as a pair"),
    ("libfoo.so.1: cannot open shared object", FindingKind.PLUGIN, "", "libfoo.so.1", "environment script"),
    ("version `GLIBCXX_3.4.32' not found", FindingKind.PACKAGES, "", "GLIBCXX_3.4.32", "libstdc++"),
    ("compiled using NumPy 1.x cannot be run in\nNumPy 2.1", FindingKind.PACKAGES, "", "numpy 1", "numpy<2"),
    ("Only a single TORCH_LIBRARY can be used to register the namespace", FindingKind.PLUGIN, "", "second", "anew"),
    ("No module named 'yaml'", FindingKind.PACKAGES, "", "yaml is not installed", "pip"),
    ("something new", FindingKind.PLUGIN, "", "not known to llm_adapt: ImportError: something new", "report this line"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "kind", "device", "cause", "mend"), FAILURES, ids=[row[0][:40] for row in FAILURES])
def test_known_failures_are_explained(
    fake: FakeHost, text: str, kind: FindingKind, device: str, cause: str, mend: str
) -> None:
    """Each error text that users meet has its cause, its mend, its class and its device."""
    found = explain(f"RuntimeError: outer\nImportError: {text}", ADAPTERS.values(), fake.host)
    assert (found.kind, found.device) == (kind, device)
    assert cause in found.what
    assert mend in found.mend


def test_version_pair_explains_an_unknown_failure_of_its_plugin(fake: FakeHost) -> None:
    """When a plug-in fails for an unknown reason and does not pair with torch, the pair is the cause."""
    host = fake.npu(torch="2.9.0+cpu").host
    failed = "Failed to load the backend extension: torch_npu\nAttributeError: no attribute _foo"
    assert explain(failed, ADAPTERS.values(), host).kind is FindingKind.VERSIONS
    assert explain("AttributeError: no attribute _foo", ADAPTERS.values(), host).kind is FindingKind.PLUGIN


def test_error_is_spelt_with_its_causes_root_last() -> None:
    """The root cause, which torch hides behind its own error, is the last line."""
    error = RuntimeError("Failed to load")
    error.__cause__ = ImportError("libhccl.so")
    assert spell_error(error) == "RuntimeError: Failed to load\nImportError: libhccl.so"


# -- the real thing, in child processes --------------------------------------------------------------------

ACTIVATE = """
import sys
from llm_adapt.adapters import activate, adapters
try:
    print(activate(adapters()[{name!r}]))
except RuntimeError as error:
    print(type(error).__name__, error)
print("torch" in sys.modules, "torch_npu" in sys.modules)
"""


def test_premise_a_broken_plugin_breaks_import_torch(tmp_path: Path) -> None:
    """With torch_npu installed and CANN absent, `import torch` itself raises."""
    done = python("import torch", install(tmp_path))
    assert done.returncode == 1
    assert "Failed to load the backend extension: torch_npu" in done.stderr


def test_cpu_works_beside_a_broken_plugin(tmp_path: Path) -> None:
    """Activating the CPU turns autoload off before torch is imported, so a broken plug-in does not matter."""
    done = python(ACTIVATE.format(name="cpu"), install(tmp_path))
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0, so that torch does not load torch_npu" in done.stdout
    assert done.stdout.endswith("True False\n")


def test_broken_plugin_asked_for_is_explained(tmp_path: Path) -> None:
    """Activating the NPU with CANN absent gives one error with cause and mend instead of a stack trace."""
    done = python(ACTIVATE.format(name="npu"), install(tmp_path))
    assert done.stdout.startswith("ActivationError Ascend NPU was chosen, and `import torch` failed: RuntimeError:")
    assert "\nCause: torch_npu is installed, but CANN's libascendcl.so is on no library path" in done.stdout
    assert "\nMend: Run: source /usr/local/Ascend/ascend-toolkit/set_env.sh" in done.stdout
    assert done.stdout.endswith("False False\n")


def test_chosen_plugin_is_loaded_although_another_is_held_back(tmp_path: Path) -> None:
    """With two plug-ins installed only the chosen one is imported, by name and with autoload off."""
    good = "import torch, types\ntorch.npu = types.SimpleNamespace(device_count=lambda: 1)\ndef _autoload(): pass\n"
    site = install(tmp_path, good)
    FakeHost(tmp_path).package("flagcx", "1.0", "raise AssertionError('loaded')").dist(
        "flagcx", "1.0", entry_points="[torch.backends]\nflagcx = flagcx:init\n"
    )
    done = python(ACTIVATE.format(name="npu"), site)
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0, so that torch does not load flagcx" in done.stdout
    assert done.stdout.endswith("True True\n")


def test_half_imported_torch_is_refused(tmp_path: Path) -> None:
    """After `import torch` failed once in a process, activation says so instead of failing inside torch."""
    code = "try:\n    import torch\nexcept RuntimeError:\n    pass\n" + ACTIVATE.format(name="cpu")
    done = python(code, install(tmp_path))
    assert (
        "ActivationError CPU was chosen, and torch is half imported.\nCause: An earlier `import torch`" in done.stdout
    )
    assert ERROR not in done.stdout
