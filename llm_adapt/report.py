"""Report: what was chosen, and why; one object that prints as text and as JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

__all__ = ["Line", "Report", "Status"]

log = logging.getLogger("llm_adapt")

Status = Literal["ok", "waiting", "skipped", "problem"]


class Line(NamedTuple):
    """One choice: its section (device, patch, effect ...), its subject, what was chosen, and the reason."""

    section: str
    subject: str
    choice: str
    reason: str
    status: Status = "ok"


@dataclass(eq=False)
class Report:
    """Everything patch() chose in this process, from detection to the last translated argument.

    Attributes:
        device: name of the adapter in use.
        simulated: what stands in for the device, "" on real hardware; then the report's first line says it.
        versions: distribution -> installed version, "absent" when not installed.
        recorded: the choices that were made once, in their order.
        sources: asked anew for their lines at each look, since their choices change as the script imports.
        parts: further parts of the JSON, asked anew likewise: name -> function that gives plain data.
    """

    device: str = ""
    simulated: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    recorded: list[Line] = field(default_factory=list)
    sources: list[Callable[[], Iterable[Line]]] = field(default_factory=list)
    parts: dict[str, Callable[[], object]] = field(default_factory=dict)
    _seen: dict[tuple[str, str], object] = field(default_factory=dict, repr=False)

    @property
    def lines(self) -> list[Line]:
        """All choices as they stand now."""
        return [*self.recorded, *(line for source in self.sources for line in source())]

    def add(self, section: str, subject: str, choice: str, reason: str, status: Status = "ok") -> None:
        """Record one choice."""
        self.recorded.append(Line(section, subject, choice, reason, status))

    def once(self, subject: str, choice: str, reason: str) -> None:
        """Record, at its first use, something of the script that has no effect or another effect here."""
        key = (subject, choice)
        if key in self._seen:  # the common case
            return
        mine = object()
        if self._seen.setdefault(key, mine) is mine:  # the first of several threads; no lock that a fork could catch
            self.add("effect", subject, choice, reason)
            log.info("%s: %s (%s)", subject, choice, reason)

    def as_dict(self) -> Mapping[str, object]:
        """Plain data for JSON."""
        return {
            **({"simulated": self.simulated} if self.simulated else {}),
            "device": self.device,
            "versions": self.versions,
            "choices": [line._asdict() for line in self.lines],
            **{name: part() for name, part in self.parts.items()},
        }

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def save(self, path: Path) -> None:
        """Write the JSON, creating the folder; never leaves half a file behind."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(self.to_json() + "\n", encoding="utf-8")
        partial.replace(path)

    def to_text(self) -> str:
        """The report as text: one line a choice, applied patches counted per module."""
        rows = [f"SIMULATED on host memory, not on hardware: {self.simulated}"] if self.simulated else []
        rows.append(f"llm_adapt on {self.device}")
        rows += [f"  {name} {version}" for name, version in self.versions.items()]
        applied: dict[str, int] = {}
        for line in self.lines:
            if line.section == "patch" and line.choice in ("applied", "waiting"):
                key = f"{line.subject.partition(':')[0]} ({line.choice})"
                applied[key] = applied.get(key, 0) + 1
            else:
                rows.append(f"  [{line.status}] {line.section}: {line.subject}: {line.choice} - {line.reason}")
        rows += [f"  {count:4d} {'names' if count > 1 else 'name '} in {module}" for module, count in applied.items()]
        return "\n".join(rows)

    __str__ = to_text
