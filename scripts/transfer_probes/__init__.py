"""What CUDA scripts do, and what CUDA answers: the probes of compare_transfer.py, one module per room of the API.

In a probe `folder` is an empty folder whose path contains "cuda", `undo()` takes the patch back, `start()` patches
(again), and torch, os and io are imported.
"""

from __future__ import annotations

from transfer_probes import around, computing, devices, names, processes
from transfer_probes.probe import Probe

__all__ = ["PROBES", "Probe"]

PROBES: list[Probe] = [*names.PROBES, *devices.PROBES, *computing.PROBES, *around.PROBES, *processes.PROBES]
