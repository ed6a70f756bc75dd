"""Looks that several devices share: node lists, masks, version pairs. Facts stay in each device's file."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llm_adapt.adapters.base import Finding, FindingKind, Probe
from llm_adapt.adapters.host import Host

__all__ = [
    "any_mask",
    "closed_nodes",
    "deciding_mask",
    "flag_is_set",
    "foreign_build",
    "minor",
    "missing_nodes",
    "probe_plugin",
    "spell_nodes",
    "spell_pattern",
    "unequal_masks",
]

_HIDES_ALL = re.compile(r"\s*(-|NoDevFiles|$)")  # "-1" by custom, "NoDevFiles" by Slurm, "" = none


def spell_nodes(nodes: tuple[str, ...]) -> str:
    """Write a list of nodes short: /dev/davinci0..7."""
    if len(nodes) < 2:
        return "".join(nodes)
    last = re.search(r"\d+$", nodes[-1])
    return f"{nodes[0]}..{last.group()}" if last else f"{nodes[0]} and {len(nodes) - 1} more"


def spell_pattern(pattern: str) -> str:
    """Write a node pattern as people do: /dev/davinci*."""
    return pattern.replace("[0-9]*", "*")


def deciding_mask(host: Host, variables: tuple[str, ...]) -> str | None:
    """Assignment that hides every device where the first variable that is set decides; None = not hidden."""
    name = next((name for name in variables if name in host.environ), None)
    return any_mask(host, (name,)) if name else None


def any_mask(host: Host, variables: tuple[str, ...]) -> str | None:
    """Assignment that hides every device where each variable is consulted; None = not hidden."""
    for name in variables:
        value = host.environ.get(name)
        if value is not None and _HIDES_ALL.match(value):
            return f"{name}={value!r}"
    return None


def unequal_masks(host: Host, variables: tuple[str, ...], rule: str, device: str) -> tuple[Finding, ...]:
    """Report visible-devices variables that are set to different values; `rule` says who wins."""
    values = {name: host.environ[name].replace(" ", "") for name in variables if name in host.environ}
    if len(set(values.values())) < 2:
        return ()
    listed = ", ".join(f"{name}={value!r}" for name, value in values.items())
    mend = f"Set all of them to the same value, or unset all but {variables[0]}."
    return (Finding(FindingKind.ENVIRONMENT, f"{listed} disagree: {rule}.", mend, device),)


def closed_nodes(host: Host, patterns: Iterable[str], device: str) -> tuple[Finding, ...]:
    """Report device nodes that exist and may not be opened by this user."""
    closed = host.closed(node for pattern in patterns for node in host.nodes(pattern))
    if not closed:
        return ()
    others = f" and {len(closed) - 1} more nodes" if len(closed) > 1 else ""
    what = f"{closed[0]}{others} cannot be opened by this user."
    mend = f"Join the group that owns it (ls -l {closed[0]}), or start the container with --device={closed[0]}."
    return (Finding(FindingKind.PERMISSIONS, what, mend, device),)


def missing_nodes(host: Host, companions: Iterable[str], device: str) -> tuple[Finding, ...]:
    """Report control nodes that a container was not given although it was given the devices."""
    missing = [node for node in companions if not host.exists(node)]
    if not missing:
        return ()
    mend = "Start the container with " + " ".join(f"--device={node}" for node in missing) + "."
    what = f"The device nodes are here, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not."
    return (Finding(FindingKind.PERMISSIONS, what, mend, device),)


def minor(version: str) -> str:
    """Major and minor number of a version: minor("2.13.0+cpu") == "2.13"."""
    return ".".join(re.findall(r"\d+", version)[:2])


def flag_is_set(host: Host, variable: str) -> bool:
    """Whether a 0/1 variable is on."""
    return host.environ.get(variable, "0").strip() not in ("", "0")


def foreign_build(host: Host, distribution: str, marks: tuple[str, ...], device: str, mend: str) -> tuple[Finding, ...]:
    """Report an installed distribution whose version carries none of the vendor's marks."""
    version = host.version(distribution)
    if version is None or any(mark in version for mark in marks):
        return ()
    wanted = " or ".join(f"'{mark}'" for mark in marks)
    what = f"{distribution} {version} is not the vendor's build (no {wanted} in its version)."
    return (Finding(FindingKind.PACKAGES, what, mend, device),)


def probe_plugin(host: Host, nodes: str, plugin: str, variables: tuple[str, ...], hint: str = "") -> Probe:
    """Probe a device that needs both device nodes and a torch plug-in; `hint` explains absent nodes."""
    seen, wanted = host.nodes(nodes), spell_pattern(nodes)
    installed = host.package(plugin) is not None
    software = f"{plugin} {host.version(plugin) or 'of unknown version'}"
    if not seen and not installed:
        return Probe(False, f"no {wanted}{hint}, {plugin} is not installed")
    if not seen:
        why = hint or ": a login node, or a container started without --device"
        return Probe(False, f"{software} is installed, but there is no {wanted}{why}", loadable=True)
    if not installed:
        return Probe(False, f"{spell_nodes(seen)}, but {plugin} is not installed")
    evidence, mask = f"{spell_nodes(seen)} and {software}", deciding_mask(host, variables)
    if mask:
        return Probe(False, f"{evidence}, all masked by {mask}", masked=True, loadable=True)
    return Probe(True, evidence)
