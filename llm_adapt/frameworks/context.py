"""What a table of rows may know when it is built: the device, the settings in force, and the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llm_adapt.adapters.base import DeviceAdapter
from llm_adapt.report import Report
from llm_adapt.settings import Settings

__all__ = ["Context"]


@dataclass(frozen=True)
class Context:
    """Given to every `rows(context)` function in this folder."""

    adapter: DeviceAdapter
    settings: Settings
    report: Report

    @property
    def serves_operators(self) -> bool:
        """Whether frameworks call our operators: with ops="off" they keep their own code."""
        return self.settings.ops != "off"

    def teller(self, subject: str, choice: str, reason: str) -> Callable[[], None]:
        """What a replacement calls before it hands a call to the original: a line of the report, at the first one."""

        def told() -> None:
            self.report.once(subject, choice, reason)

        told._dynamo_marked_constant = True  # type: ignore[attr-defined]  # compiled code: told while it is traced
        return told
