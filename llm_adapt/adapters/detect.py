"""detect: which device this machine has, and why; the only place where adapters are gathered."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass

from llm_adapt.adapters.base import DeviceAdapter, Probe
from llm_adapt.adapters.host import Host
from llm_adapt.errors import DeviceError

__all__ = ["ENTRY_POINTS", "Detection", "adapters", "detect"]

ENTRY_POINTS = "llm_adapt.adapters"
_BUILT_IN = ("mlu", "npu", "dcu", "cuda", "cpu")  # one file each; the order of probing and of every list
_BY_HAND = "LLM_ADAPT_DEVICE=<name> or patch(device=<name>)"


@dataclass(frozen=True)
class Detection:
    """The device chosen, why, and what every adapter's probe answered."""

    adapter: DeviceAdapter
    reason: str
    probes: tuple[tuple[str, Probe], ...]


def adapters(host: Host | None = None) -> dict[str, DeviceAdapter]:
    """Gather the adapters: built in, then third parties of the entry-point group `llm_adapt.adapters`.

    An entry point names a DeviceAdapter. One that cannot be loaded stays in the list, as a device that is not
    found for that reason.

    Raises:
        DeviceError: an entry point claims a name that is already taken.
    """
    gathered: dict[str, DeviceAdapter] = {}
    for name in _BUILT_IN:
        gathered[name] = importlib.import_module(f"llm_adapt.adapters.{name}").ADAPTER
    for point in (Host() if host is None else host).entry_points(ENTRY_POINTS):
        try:
            adapter = point.load()
            if not isinstance(adapter, DeviceAdapter):
                raise TypeError(f"it names a {type(adapter).__name__}, not a DeviceAdapter")
        except Exception as error:  # noqa: BLE001 - somebody else's package; its failure becomes the reason
            adapter = _unloadable(point.name, f"entry point {point.value} failed: {type(error).__name__}: {error}")
        if adapter.name in gathered:
            raise DeviceError(
                f"Entry point {point.name} = {point.value} adds {adapter.name!r}, a name that is taken. "
                f"Uninstall the package that brings it, or ask its author for another name."
            )
        gathered[adapter.name] = adapter
    return gathered


def _unloadable(name: str, reason: str) -> DeviceAdapter:
    return DeviceAdapter(
        name=name,
        title=f"{name} (third party)",
        device_type=name,
        backend="",
        probe_device=lambda host: Probe(False, reason),
        check_torch=lambda: reason,
    )


def detect(
    requested: str | None = None, requested_by: str = "patch(device=...)", host: Host | None = None
) -> Detection:
    """Choose the device: the requested one, else the one that is here, else the CPU. Does not import torch.

    Args:
        requested: name of an adapter, None = look for it.
        requested_by: who asked, for the reason and the errors, e.g. "LLM_ADAPT_DEVICE".
        host: the machine to look at, None = this one.

    Raises:
        DeviceError: the name is unknown, the device asked for is absent or masked, or two devices are here.
    """
    host = Host() if host is None else host
    known = adapters(host)
    probes = tuple((name, adapter.probe(host)) for name, adapter in known.items())
    if requested is not None:
        return _requested(requested, requested_by, known, probes)
    here = [(name, probe) for name, probe in probes if probe.found and name != "cpu"]
    if len(here) > 1:
        found = " and ".join(f"{name} ({probe.reason})" for name, probe in here)
        raise DeviceError(f"No device was asked for, and {len(here)} are here: {found}. Choose one: {_BY_HAND}.")
    if here:
        name, probe = here[0]
        return Detection(known[name], f"found {probe.reason}", probes)
    looked = ", ".join(name for name in known if name != "cpu")
    near = [f"; {name}: {probe.reason}" for name, probe in probes if _is_near(probe) and name != "cpu"]
    return Detection(known["cpu"], f"no accelerator found (looked for {looked}{''.join(near)})", probes)


def _is_near(probe: Probe) -> bool:
    """Whether part of the device is here, so that the user may have expected it to be chosen."""
    return probe.masked or probe.loadable or bool(probe.problems)


def _requested(name: str, by: str, known: dict[str, DeviceAdapter], probes: tuple[tuple[str, Probe], ...]) -> Detection:
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DeviceError(f"{by} asked for {name!r}, which is no device.{hint}\n{_choices(probes)}")
    probe = dict(probes)[name]
    if probe.found:
        return Detection(known[name], f"asked for by {by}; {probe.reason}", probes)
    if probe.loadable and not probe.masked:
        return Detection(known[name], f"asked for by {by}, although {probe.reason}", probes)
    state = "all masked" if probe.masked else "not here"
    problems = "".join(f"\n  {line}" for line in probe.problems[:3])
    asked = f"{by} asked for {name!r}, which is {state}: {probe.reason}."
    raise DeviceError(f"{asked}{problems}\n{_choices(probes)}")


def _choices(probes: tuple[tuple[str, Probe], ...]) -> str:
    rows = (f"  {name:<5}{'here' if probe.found else 'not here'}: {probe.reason}" for name, probe in probes)
    return "\n".join(("Choices:", *rows, f"Change or drop the request ({_BY_HAND})."))
