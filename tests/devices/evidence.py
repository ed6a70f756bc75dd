"""Evidence: what was executed on a device and what came of it, as JSON for docs/devices.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Evidence"]


@dataclass
class Evidence:
    """Rows of one run: op x library x dtype, with how many calls were right, wrong or refused.

    Attributes:
        head: device, what simulates it, versions, date, and the kernel libraries with the reason if one does not load.
        rows: (op, library, dtype) -> counts, whether gradients were compared, layouts that were right, reasons.
    """

    head: dict[str, Any] = field(default_factory=dict)
    rows: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)

    def add(
        self, case: Any, library: str, outcome: str, reason: str = "", errors: Mapping[str, float] | None = None
    ) -> None:
        """Count one call."""
        key = (case.op.name, library, str(case.dtype).removeprefix("torch."))
        empty: dict[str, Any] = {"right": 0, "wrong": 0, "refused": 0, "gradient": False, "layouts": [], "reasons": []}
        row = self.rows.setdefault(key, empty)
        row[outcome] += 1
        layout = case.arguments.get("layout")
        if outcome == "right" and layout is not None and layout not in row["layouts"]:
            row["layouts"] = sorted([*row["layouts"], layout])
        row["gradient"] |= any(name.startswith("gradient of") for name in errors or ())
        if outcome != "right" and reason and reason not in row["reasons"]:
            row["reasons"].append(reason)

    def save(self, path: Path) -> None:
        """Write the JSON."""
        rows = [
            {"op": op, "library": library, "dtype": dtype, **row}
            for (op, library, dtype), row in sorted(self.rows.items())
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**self.head, "rows": rows}, indent=1) + "\n", encoding="utf-8")
