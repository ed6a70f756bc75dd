"""Report: what was chosen, and why; one dataclass that prints as text and as JSON."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

__all__ = ["Line", "Report"]

log = logging.getLogger("llm_adapt")

Status = Literal["ok", "waiting", "skipped", "problem"]


@dataclass(frozen=True)
class Line:
    """One choice: its section (device, patch, effect ...), its subject, what was chosen, and the reason."""

    section: str
    subject: str
    choice: str
    reason: str
    status: Status = "ok"


@dataclass
class Report:
    """Everything patch() chose in this process, from detection to the last translated argument.

    Attributes:
        device: name of the adapter in use.
        lines: the choices, in the order they were made.
        versions: distribution -> installed version, "absent" when not installed.
    """

    device: str = ""
    lines: list[Line] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    _seen: set[tuple[str, str]] = field(default_factory=set, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, section: str, subject: str, choice: str, reason: str, status: Status = "ok") -> None:
        """Record one choice."""
        self.lines.append(Line(section, subject, choice, reason, status))

    def once(self, subject: str, choice: str, reason: str) -> None:
        """Record, at its first use, something of the script that has no effect or another effect here."""
        key = (subject, choice)
        if key in self._seen:  # the common case, without the lock
            return
        with self._lock:
            if key in self._seen:
                return
            self._seen.add(key)
            self.add("effect", subject, choice, reason)
        log.info("%s: %s (%s)", subject, choice, reason)

    def add_versions(self, distributions: tuple[str, ...]) -> None:
        """Look up installed versions by distribution name; a package's own word is not asked (some lie)."""
        for name in distributions:
            try:
                self.versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                self.versions[name] = "absent"

    def as_dict(self) -> Mapping[str, object]:
        """Plain data for JSON."""
        return {
            "device": self.device,
            "versions": self.versions,
            "choices": [asdict(line) for line in self.lines],
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
        """The report as text: one line a choice, applied patches counted per section."""
        rows = [f"llm_adapt on {self.device}"]
        rows += [f"  {name} {version}" for name, version in self.versions.items()]
        applied: dict[str, int] = {}
        for line in self.lines:
            if line.section == "patch" and line.status in ("ok", "waiting"):
                key = f"{line.subject.partition(':')[0]} ({line.choice})"
                applied[key] = applied.get(key, 0) + 1
            else:
                rows.append(f"  [{line.status}] {line.section}: {line.subject}: {line.choice} - {line.reason}")
        rows += [f"  {count:4d} {'names' if count > 1 else 'name '} in {module}" for module, count in applied.items()]
        return "\n".join(rows)

    __str__ = to_text
