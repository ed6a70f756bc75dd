"""Exceptions of llm_adapt.

Every message says three things: what was asked, what was found, what to do.
"""

from __future__ import annotations

__all__ = ["CommError", "DeviceError", "KernelError", "LlmAdaptError", "PatchError", "SettingsError"]


class LlmAdaptError(Exception):
    """Base of every error that llm_adapt raises on purpose."""


class DeviceError(LlmAdaptError, RuntimeError):
    """No device, the wrong device, or more than one device answers the request."""


class KernelError(LlmAdaptError, RuntimeError):
    """A requested kernel cannot serve the call, or failed its proof."""


class PatchError(LlmAdaptError, RuntimeError):
    """A patch row does not resolve, conflicts with another, or cannot be undone."""


class CommError(LlmAdaptError, RuntimeError):
    """A process group or collective cannot do what was asked on this backend."""


class SettingsError(LlmAdaptError, ValueError):
    """An LLM_ADAPT_* variable or a patch() argument has an unknown name or value."""
