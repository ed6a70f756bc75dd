"""The table of operators in docs/ops.md, from the code: `python -m tests.ops_table` writes it anew."""

from __future__ import annotations

import re
from pathlib import Path

from llm_adapt.ops.dispatch.registry import all_ops
from llm_adapt.ops.kernels import inductor

__all__ = ["DOCUMENT", "table"]

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "ops.md"
PART = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- end of table -->)", re.S)
_KERNEL = re.compile(r"@\w*kernel\(\s*\"(\w+)\"")


def libraries() -> dict[str, list[str]]:
    """Op -> the kernel libraries that have it, read from their text: most cannot be imported here."""
    folder = ROOT / "llm_adapt" / "ops" / "kernels"
    found: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        library = path.relative_to(folder).parts[0].removesuffix(".py")
        for op in _KERNEL.findall(path.read_text(encoding="utf-8")):
            found.setdefault(op, set()).add(library)
    for op in inductor.OPS:  # registered in a loop
        found.setdefault(op, set()).add("inductor")
    return {op: sorted(names) for op, names in found.items()}


def table() -> str:
    """One row for each op: its name, what it computes, who has a kernel of it."""
    known = libraries()
    rows = ["| op | what it computes | kernels |", "|---|---|---|"]
    for name, op in sorted(all_ops().items()):
        if op.reference.__module__.startswith("llm_adapt.ops."):  # not a toy of a test
            formula = (op.reference.__doc__ or "").partition("\n")[0].replace("|", "\\|")
            rows.append(f"| `{name}` | {formula} | {', '.join(known.get(name, ['-']))} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(PART.sub(lambda _: table(), DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
