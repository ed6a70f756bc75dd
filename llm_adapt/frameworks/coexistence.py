"""Other tools that patch torch or Megatron: compose with them, or refuse with one clear line; in either order.

Two facades over torch.cuda cannot be stacked: each would translate what the other has translated, and neither
could be undone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from llm_adapt.errors import PatchError
from llm_adapt.frameworks.context import Context

__all__ = ["PEERS", "Peer", "check_active", "refuse_import", "refused_modules"]


@dataclass(frozen=True)
class Peer:
    """A tool that patches on import.

    Attributes:
        name: as its users know it.
        modules: importing one of these makes it act.
        conflict: what it takes over; "" when llm_adapt and it can both be active.
        note: what a report says when both are active.
        acts_with: module that must be loaded for it to act at all.
    """

    name: str
    modules: tuple[str, ...]
    conflict: str = ""
    note: str = ""
    acts_with: str = ""


PEERS = (
    Peer("torch_npu's transfer_to_npu", ("torch_npu.contrib.transfer_to_npu",), "torch.cuda"),
    Peer(
        "torch_mlu's gpu_migration", ("torch_mlu.utils.gpu_migration", "torch_mlu.utils.model_transfer"), "torch.cuda"
    ),
    Peer("torchada", ("torchada",), "torch.cuda", "without torch_musa it does nothing", acts_with="torch_musa"),
    Peer("MindSpeed", ("mindspeed.megatron_adaptor",), "Megatron's functions"),
    Peer("MegatronAdaptor", ("megatron_adaptor",), "Megatron's functions"),
    Peer(
        "Liger-Kernel", ("liger_kernel.transformers.monkey_patch",), note="the modules it replaces compute its numbers"
    ),
    Peer("FlagGems", ("flag_gems",), note="the ATen operators it replaces compute its numbers"),
)


def _acts(peer: Peer) -> bool:
    return not peer.acts_with or peer.acts_with in sys.modules


def check_active(context: Context) -> None:
    """Look for peers that are active already.

    Raises:
        PatchError: one of them has taken over what llm_adapt would.
    """
    for peer in PEERS:
        if not any(module in sys.modules for module in peer.modules):
            continue
        if peer.conflict and _acts(peer) and context.adapter.needs_facade:
            raise PatchError(
                f"{peer.name} is active and has taken over {peer.conflict}; it cannot be undone in this process. "
                f"Use one of the two: remove its import, or do not call llm_adapt.patch()."
            )
        context.report.add("coexistence", peer.name, "composed", peer.note)


def refused_modules(context: Context) -> frozenset[str]:
    """Modules whose import must be refused while llm_adapt is active on this device."""
    if not context.adapter.needs_facade:
        return frozenset()
    return frozenset(module for peer in PEERS if peer.conflict for module in peer.modules)


def refuse_import(module: str) -> None:
    """Called when one of `refused_modules` is about to be imported.

    Raises:
        PatchError: always, unless the peer does nothing on this machine.
    """
    for peer in PEERS:
        if module in peer.modules and peer.conflict and _acts(peer):
            raise PatchError(
                f"import {module} was asked while llm_adapt is active; {peer.name} would take over {peer.conflict}, "
                f"which llm_adapt serves already. Remove that import, or call llm_adapt.unpatch() before it."
            )
