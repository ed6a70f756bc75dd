"""Coexistence: other tools that patch, already active or coming later, on devices with and without a facade."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

import llm_adapt
from llm_adapt import session
from llm_adapt.adapters import adapters
from llm_adapt.errors import PatchError
from llm_adapt.frameworks import coexistence
from llm_adapt.frameworks.coexistence import PEERS, Peer
from llm_adapt.frameworks.context import Context
from llm_adapt.report import Report
from llm_adapt.settings import Settings
from tests.patching.toys import load, toys

MODULES = [(peer, module) for peer in PEERS for module in peer.modules]
REFUSED = [(peer, module) for peer, module in MODULES if peer.conflict and not peer.acts_with]
COMPOSED = [(peer, module) for peer, module in MODULES if not peer.conflict]


def stub(module: str) -> dict[str, str]:
    """Sources of a module and its parent packages; the module leaves a mark when it acts."""
    parts = module.split(".")
    sources = {".".join(parts[:count]): "" for count in range(1, len(parts))}
    return {**sources, module: "import sys\nsys.peer_acted = True"}


@pytest.fixture
def acted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that tells whether a stub has acted; no table of rows is applied."""
    monkeypatch.setattr(session, "_TABLES", ())
    yield lambda: getattr(sys, "peer_acted", False)
    llm_adapt.unpatch()
    vars(sys).pop("peer_acted", None)


def notes() -> dict[str, str]:
    """Peer -> note, from the report."""
    return {line.subject: line.reason for line in llm_adapt.report().lines if line.section == "coexistence"}


@pytest.mark.parametrize(("peer", "module"), REFUSED, ids=[module for _, module in REFUSED])
def test_a_rival_that_is_active_is_named_and_nothing_is_patched(acted: Any, peer: Peer, module: str) -> None:
    """patch() refuses with one line: who is active, what it has taken over, and the two ways out."""
    with toys(stub(module)):
        load(module)
        with pytest.raises(PatchError) as error:
            llm_adapt.patch(device="cpu")
    assert not llm_adapt.is_patched()
    assert "\n" not in str(error.value)
    assert f"{peer.name} ({peer.conflict})" in str(error.value)
    assert "remove its import, or do not call llm_adapt.patch()" in str(error.value)


@pytest.mark.parametrize(("peer", "module"), REFUSED, ids=[module for _, module in REFUSED])
def test_a_rival_that_comes_later_is_refused_before_it_acts(acted: Any, peer: Peer, module: str) -> None:
    """Its import raises one line, its code never runs, llm_adapt stays; after unpatch() it can be imported."""
    with toys(stub(module)):
        llm_adapt.patch(device="cpu")
        with pytest.raises(PatchError) as error:
            load(module)
        assert (acted(), module in sys.modules, llm_adapt.is_patched()) == (False, False, True)
        assert "\n" not in str(error.value)
        assert f"import {module} was asked while llm_adapt is active; {peer.name} would take over" in str(error.value)
        llm_adapt.unpatch()
        load(module)
        assert acted()


@pytest.mark.parametrize(("peer", "module"), COMPOSED, ids=[module for _, module in COMPOSED])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_friend_is_composed_with_in_either_order(acted: Any, peer: Peer, module: str, is_first: bool) -> None:
    """A tool that replaces other things is let be, and the report says what that means, once."""
    with toys(stub(module)):
        for act in [lambda: load(module), lambda: llm_adapt.patch(device="cpu")][:: 1 if is_first else -1]:
            act()
        assert (acted(), notes()) == (True, {peer.name: peer.note})
        assert len([line for line in llm_adapt.report().lines if line.section == "coexistence"]) == 1


@pytest.mark.parametrize("is_first", [True, False])
def test_torchada_without_its_device_does_nothing(acted: Any, is_first: bool) -> None:
    """Where torch_musa is not loaded torchada is inert: composed, with that note."""
    with toys(stub("torchada")):
        for act in [lambda: load("torchada"), lambda: llm_adapt.patch(device="cpu")][:: 1 if is_first else -1]:
            act()
        assert notes() == {"torchada": "without torch_musa it does nothing"}


@pytest.mark.parametrize("is_first", [True, False])
def test_torchada_with_its_device_is_a_rival(acted: Any, is_first: bool) -> None:
    """Where torch_musa is loaded torchada is refused like any other facade."""
    first, second = [lambda: load("torchada"), lambda: llm_adapt.patch(device="cpu")][:: 1 if is_first else -1]
    with toys({**stub("torchada"), "torch_musa": ""}):
        load("torch_musa")
        first()
        with pytest.raises(PatchError, match="torchada"):
            second()


def test_several_rivals_are_named_together(acted: Any) -> None:
    """MindSpeed brings transfer_to_npu with it: the line names both."""
    with toys({**stub("mindspeed.megatron_adaptor"), **stub("torch_npu.contrib.transfer_to_npu")}):
        load("mindspeed.megatron_adaptor")
        load("torch_npu.contrib.transfer_to_npu")
        with pytest.raises(PatchError, match=r"MindSpeed \(Megatron's functions\), torch_npu's transfer_to_npu"):
            llm_adapt.patch(device="cpu")


def test_asking_whether_a_rival_is_installed_is_allowed(acted: Any) -> None:
    """Libraries look for torch_npu and flag_gems with find_spec all the time; that is no import."""
    import importlib.util

    with toys(stub("megatron_adaptor")):
        llm_adapt.patch(device="cpu")
        assert importlib.util.find_spec("megatron_adaptor") is not None
        assert not acted()


def context(device: str) -> Context:
    """What a table knows on this device."""
    return Context(adapters()[device], Settings(), Report())


@pytest.mark.parametrize("device", ["cuda", "dcu"])
@pytest.mark.parametrize(("peer", "module"), MODULES, ids=[module for _, module in MODULES])
def test_devices_that_are_torch_cuda_clash_with_nobody(device: str, peer: Peer, module: str) -> None:
    """Where llm_adapt replaces nothing there is nothing to clash with; the report still tells of the tool."""
    here = context(device)
    with toys(stub(module)):
        load(module)
        coexistence.check_active(here)
        coexistence.on_import(here)[module](module)
        vars(sys).pop("peer_acted", None)
    (line,) = here.report.lines
    assert (line.subject, line.choice, bool(line.reason)) == (peer.name, "composed", True)


@pytest.mark.parametrize(("device", "variable"), [("npu", "TORCH_TRANSFER_TO_NPU"), ("mlu", "TORCH_MLU_GPU_MIGRATION")])
def test_a_switch_of_the_vendors_plugin_is_refused_before_the_plugin(
    device: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that makes the plug-in start its own facade is an error while that can still be avoided."""
    monkeypatch.setenv(variable, "1")
    with pytest.raises(PatchError, match=f"{variable}=1 is set: .*Unset it"):
        coexistence.check_switches(context(device))
    coexistence.check_switches(context("cpu"))  # its plug-in is not imported here
    monkeypatch.setenv(variable, "0")
    coexistence.check_switches(context(device))


def test_a_rival_that_the_plugin_starts_is_noticed(acted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool that becomes active while the device is activated is refused like one that was there before."""

    def activate(adapter: Any) -> list[str]:
        load("torch_mlu.utils.gpu_migration")
        return []

    monkeypatch.setattr(session, "activate", activate)
    with toys(stub("torch_mlu.utils.gpu_migration")):
        with pytest.raises(PatchError, match="torch_mlu's gpu_migration"):
            llm_adapt.patch(device="cpu")
    assert not llm_adapt.is_patched()
