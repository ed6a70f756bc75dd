"""Which device: one adapter per device, detection with its reasons, activation. Imports no torch."""

from __future__ import annotations

from llm_adapt.adapters.activation import ActivationError, activate, explain, spell_error
from llm_adapt.adapters.base import DeviceAdapter, Finding, FindingKind, KnownFailure, Probe
from llm_adapt.adapters.detect import Detection, adapters, detect
from llm_adapt.adapters.host import Host, TorchBuild

__all__ = [
    "ActivationError",
    "Detection",
    "DeviceAdapter",
    "Finding",
    "FindingKind",
    "Host",
    "KnownFailure",
    "Probe",
    "TorchBuild",
    "activate",
    "adapters",
    "detect",
    "explain",
    "spell_error",
]
