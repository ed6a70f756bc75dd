"""Other tools that patch torch or Megatron: compose with them, or refuse with one clear line; in either order.

Two facades over torch.cuda cannot be stacked: each would translate what the other has translated, and neither
could be undone.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

from llm_adapt.errors import PatchError
from llm_adapt.frameworks.context import Context
from llm_adapt.report import Line

__all__ = ["PEERS", "Peer", "check_active", "check_switches", "on_import"]


class Peer(NamedTuple):
    """A tool that patches.

    Attributes:
        name: as its users know it.
        modules: importing one of these makes it act, or is the first step to that.
        conflict: what it takes over; "" when llm_adapt and it can both be active.
        note: what the report says when both are active.
        acts_with: module that must be loaded for it to act at all.
        switch: environment variable with which the vendor's plug-in imports it by itself.
    """

    name: str
    modules: tuple[str, ...]
    conflict: str = ""
    note: str = ""
    acts_with: str = ""
    switch: str = ""


PEERS = (
    Peer("MindSpeed", ("mindspeed.megatron_adaptor",), "Megatron's functions"),
    Peer("MegatronAdaptor", ("megatron_adaptor",), "Megatron's functions"),
    Peer(
        "torch_npu's transfer_to_npu",
        ("torch_npu.contrib.transfer_to_npu",),
        conflict="torch.cuda",
        switch="TORCH_TRANSFER_TO_NPU",
    ),
    Peer(
        "torch_mlu's gpu_migration",
        ("torch_mlu.utils.gpu_migration", "torch_mlu.utils.model_transfer"),
        conflict="torch.cuda",
        switch="TORCH_MLU_GPU_MIGRATION",
    ),
    Peer("torchada", ("torchada",), "torch.cuda", "without torch_musa it does nothing", acts_with="torch_musa"),
    Peer(
        "Liger-Kernel", ("liger_kernel.transformers.monkey_patch",), note="the modules it replaces compute its numbers"
    ),
    Peer("FlagGems", ("flag_gems",), note="the ATen operators it replaces compute its numbers"),
)


def check_switches(context: Context) -> None:
    """Look for variables that would make the device's plug-in start a peer, before the plug-in is imported.

    Raises:
        PatchError: one of them is set.
    """
    for peer in PEERS:
        plugin = peer.modules[0].partition(".")[0]
        if plugin == context.adapter.plugin and os.environ.get(peer.switch) == "1" and _clashes(peer, context):
            raise PatchError(
                f"{peer.switch}=1 is set: {plugin} would start {peer.name}, which takes over {peer.conflict}, as "
                f"llm_adapt does. Unset it, or do not call llm_adapt.patch()."
            )


def check_active(context: Context) -> None:
    """Look for peers that are active already.

    Raises:
        PatchError: some have taken over what llm_adapt would.
    """
    active = [peer for peer in PEERS if any(module in sys.modules for module in peer.modules)]
    clashing = [f"{peer.name} ({peer.conflict})" for peer in active if _clashes(peer, context)]
    if clashing:
        raise PatchError(
            f"Another tool is active and has taken over what llm_adapt would: {', '.join(clashing)}; it cannot be "
            f"undone in this process. Use one of the two: remove its import, or do not call llm_adapt.patch()."
        )
    for peer in active:
        _compose(peer, context)


def on_import(context: Context) -> Mapping[str, Callable[[str], None]]:
    """What to do when a peer is about to be imported: module -> function that refuses or reports."""
    return {
        module: functools.partial(_refuse_or_compose, peer=peer, context=context)
        for peer in PEERS
        for module in peer.modules
    }


def _refuse_or_compose(module: str, peer: Peer, context: Context) -> None:
    if _clashes(peer, context):
        raise PatchError(
            f"import {module} was asked while llm_adapt is active; {peer.name} would take over {peer.conflict}, "
            f"which llm_adapt serves already. Remove that import, or call llm_adapt.unpatch() before it."
        )
    _compose(peer, context)


def _clashes(peer: Peer, context: Context) -> bool:
    acts = not peer.acts_with or peer.acts_with in sys.modules
    return bool(peer.conflict) and acts and context.adapter.needs_facade


def _compose(peer: Peer, context: Context) -> None:
    note = peer.note if context.adapter.needs_facade or not peer.conflict else ""
    line = Line("coexistence", peer.name, "composed", note or f"llm_adapt replaces nothing on {context.adapter.title}")
    if line not in context.report.recorded:
        context.report.add(*line)
