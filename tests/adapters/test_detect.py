"""detect: which device a machine has, and why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_adapt.adapters import DeviceAdapter, Probe, adapters, detect
from llm_adapt.errors import DeviceError
from tests.adapters.fake_host import FakeHost

ROOT = Path(__file__).resolve().parents[2]


def test_importing_the_adapters_leaves_torch_alone() -> None:
    """Importing llm_adapt.adapters, detecting and listing does not import torch or a vendor's plug-in."""
    code = (
        "import sys; from llm_adapt.adapters import adapters, detect; adapters(); detect();"
        "print(sorted({'torch', 'torch_npu', 'torch_mlu'} & sys.modules.keys()))"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", ["npu", "mlu", "dcu", "cuda"])
def test_healthy_node_is_detected_with_its_evidence(fake: FakeHost, name: str) -> None:
    """Each device is chosen on its own healthy node, by the evidence of nodes and packages."""
    detection = detect(host=getattr(fake, name)().host)
    evidence = {
        "npu": "/dev/davinci0..7 and torch_npu 2.13.0",
        "mlu": "/dev/cambricon_dev0..1 and torch_mlu 1.29.2+torch2.7.1",
        "dcu": "/dev/kfd and torch 2.9.0+das.opt1.dtk2604 (/opt/dtk, /dev/mkfd, hy-smi)",
        "cuda": "/dev/nvidia0..3, driver 570.86.15 and torch 2.9.1+cu128 built for CUDA 12.8",
    }
    assert (detection.adapter.name, detection.reason) == (name, f"found {evidence[name]}")
    assert [probed for probed, probe in detection.probes if probe.found] == [name, "cpu"]


@pytest.mark.parametrize("name", ["npu", "mlu", "dcu", "cuda"])
def test_healthy_node_has_no_problems(fake: FakeHost, name: str) -> None:
    """On a healthy node no adapter reports a problem."""
    detection = detect(host=getattr(fake, name)().host)
    assert [line for _, probe in detection.probes for line in probe.problems] == []


def test_bare_machine_falls_to_the_cpu(fake: FakeHost) -> None:
    """Without any device the CPU is chosen, and the reason says what was looked for."""
    detection = detect(host=fake.torch("2.13.0+cpu").host)
    reason = "no accelerator found (looked for mlu, npu, dcu, cuda)"
    assert (detection.adapter.name, detection.reason) == ("cpu", reason)


def test_near_miss_is_part_of_the_reason(fake: FakeHost) -> None:
    """A login node with a plug-in and no card falls to the CPU and says why the NPU was not chosen."""
    detection = detect(host=fake.torch("2.13.0+cpu").package("torch_npu", "2.13.0").host)
    assert detection.adapter.name == "cpu"
    assert "npu: torch_npu 2.13.0 is installed, but there is no /dev/davinci*: a login node" in detection.reason


def test_request_is_obeyed_and_named(fake: FakeHost) -> None:
    """A request wins over what is found, and the reason names who asked."""
    detection = detect("cpu", "LLM_ADAPT_DEVICE", fake.npu().host)
    assert (detection.adapter.name, detection.reason) == ("cpu", "asked for by LLM_ADAPT_DEVICE; always available")


def test_unknown_name_lists_choices_and_the_nearest(fake: FakeHost) -> None:
    """An unknown device is an error that names who asked, the nearest name, every choice and its state."""
    with pytest.raises(DeviceError) as raised:
        detect("NPUs", "LLM_ADAPT_DEVICE", fake.npu().host)
    text = str(raised.value)
    assert text.startswith("LLM_ADAPT_DEVICE asked for 'NPUs', which is no device. Did you mean 'npu'?\nChoices:\n")
    assert "  npu  here: /dev/davinci0..7 and torch_npu 2.13.0\n" in text
    assert "  cuda not here: no /dev/nvidia*\n" in text


def test_absent_device_asked_for_is_an_error(fake: FakeHost) -> None:
    """A device that is asked for and absent is an error that lists the choices and the reasons."""
    with pytest.raises(DeviceError, match="asked for 'mlu', which is not here: no /dev/cambricon_dev") as raised:
        detect("mlu", host=fake.npu().host)
    assert "npu  here" in str(raised.value)


def test_asking_for_a_card_without_its_plugin_tells_the_mend(fake: FakeHost) -> None:
    """Cards without torch_npu: the error carries the command that installs it."""
    fake.nodes("/dev/davinci0", "/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc").torch("2.9.0+cpu")
    with pytest.raises(DeviceError, match=r"pip install torch==2\.9\.\* torch_npu==2\.9\.\*"):
        detect("npu", host=fake.host)


def test_plugin_without_nodes_may_be_asked_for(fake: FakeHost) -> None:
    """An explicit request is put to an installed plug-in although no node is seen: it is the better judge."""
    detection = detect("npu", host=fake.torch("2.13.0").package("torch_npu", "2.13.0").host)
    assert detection.adapter.name == "npu"
    assert detection.reason.startswith("asked for by patch(device=...), although torch_npu 2.13.0 is installed")


def test_masked_device_asked_for_is_an_error(fake: FakeHost) -> None:
    """A device that is asked for and masked is an error that names the variable."""
    fake.npu().environ["ASCEND_RT_VISIBLE_DEVICES"] = ""
    with pytest.raises(DeviceError, match=r"all masked: .* masked by ASCEND_RT_VISIBLE_DEVICES=''"):
        detect("npu", host=fake.host)


def test_two_claimants_are_an_error(fake: FakeHost) -> None:
    """Two devices that are both here are an error that names both and how to choose."""
    fake.mlu().npu(torch="2.7.1+cpu", plugin="2.7.1")
    with pytest.raises(DeviceError, match=r"2 are here: mlu .* and npu .*LLM_ADAPT_DEVICE=<name>"):
        detect(host=fake.host)
    assert detect("mlu", host=fake.host).adapter.name == "mlu"


def test_foreign_plugin_beside_a_gpu_is_no_claimant(fake: FakeHost) -> None:
    """torch_npu left installed on an NVIDIA node does not take part: it has no card."""
    assert detect(host=fake.cuda().package("torch_npu", "2.9.0").host).adapter.name == "cuda"


def test_probe_that_raises_is_an_answer() -> None:
    """A probe that raises is not found, and its error is the reason."""

    def probe(host: object) -> Probe:
        raise OSError("bus error")

    adapter = DeviceAdapter("x", "X", "x", "x", probe, check_torch=lambda: None)
    assert adapter.probe() == Probe(False, "probe failed: OSError: bus error")


THIRD_PARTY = """
from llm_adapt.adapters import DeviceAdapter, Probe
ADAPTER = DeviceAdapter("{name}", "Moore", "musa", "mccl", lambda host: Probe(True, "/dev/mtgpu0"), lambda: None)
"""


def _third_party(fake: FakeHost, monkeypatch: pytest.MonkeyPatch, text: str) -> FakeHost:
    module = f"third_party_{abs(hash(text))}"
    fake.package(module, "1.0", text)
    fake.dist(module, "1.0", entry_points=f"[llm_adapt.adapters]\nmusa = {module}:ADAPTER\n")
    monkeypatch.syspath_prepend(fake.site)
    return fake


def test_third_party_adapter_takes_part(fake: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with an entry point adds a device that is detected like a built-in one."""
    _third_party(fake, monkeypatch, THIRD_PARTY.format(name="musa"))
    assert list(adapters(fake.host)) == ["mlu", "npu", "dcu", "cuda", "cpu", "musa"]
    assert detect(host=fake.host).reason == "found /dev/mtgpu0"


def test_third_party_adapter_that_fails_is_shown(fake: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose entry point cannot be loaded becomes a device that is not found for that reason."""
    _third_party(fake, monkeypatch, "import no_such_package")
    probe = adapters(fake.host)["musa"].probe(fake.host)
    assert not probe.found
    assert probe.reason.endswith("failed: ModuleNotFoundError: No module named 'no_such_package'")


def test_third_party_adapter_of_another_type_is_shown(fake: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point that names something else than a DeviceAdapter says so."""
    _third_party(fake, monkeypatch, "ADAPTER = 5")
    assert "names a int, not a DeviceAdapter" in adapters(fake.host)["musa"].probe(fake.host).reason


def test_third_party_adapter_may_not_take_a_name(fake: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second adapter of a taken name is refused with the entry point that brings it."""
    _third_party(fake, monkeypatch, THIRD_PARTY.format(name="npu"))
    with pytest.raises(DeviceError, match=r"musa = third_party_.*adds 'npu', a name that is taken"):
        adapters(fake.host)
