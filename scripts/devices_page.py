"""Write docs/devices.md from what was executed: docs/evidence/ops_*.json.

    pytest tests/devices --simulate npu --evidence docs/evidence/ops_npu.json      on a simulator (also mlu, dcu)
    pytest tests/devices --device npu --evidence docs/evidence/ops_npu_910b3.json  on hardware
    pytest tests/devices --evidence docs/evidence/ops_cpu.json                     on the CPU
    python scripts/devices_page.py                                                 writes the page
    python scripts/devices_page.py --check                                         fails when the page is out of date

A claim needs evidence: every device that README.md says yes of must have a file without a wrong call.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "devices.md"
TITLES = {"cpu": "CPU", "npu": "Ascend NPU", "mlu": "Cambricon MLU", "dcu": "Hygon DCU", "cuda": "NVIDIA CUDA"}


def evidence() -> list[dict[str, Any]]:
    """Every file of evidence, the CPU's first."""
    found = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "docs/evidence").glob("ops_*.json"))
    ]
    return sorted(found, key=lambda one: (list(TITLES).index(one["device"]), one["simulated"]))


def claims_without_evidence() -> list[str]:
    """Devices that README.md says yes of without a file, or with a wrong call in it."""
    table = re.findall(
        r"^\| (.+?) \(.*?\) \| yes \|.*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    shown = {TITLES[one["device"]]: one for one in evidence()}
    missing = [f"{title}: no docs/evidence/ops_*.json" for title in table if title not in shown and "CUDA" not in title]
    wrong = [
        f"{TITLES[one['device']]}: {row['library']} is wrong on {row['op']} {row['dtype']}: {row['reasons']}"
        for one in shown.values()
        for row in one["rows"]
        if row["wrong"]
    ]
    return missing + wrong


def page() -> str:
    """The page."""
    found = evidence()
    lines = [
        "# What was executed where",
        "",
        "Written by `python scripts/devices_page.py` from docs/evidence/ops_*.json; not by hand. **H** = on hardware,",
        "**S** = on a simulator ([simulators.md](simulators.md) says what that is evidence of), **C** = on the CPU",
        "itself. A kernel counts as right on a call when its results and gradients are those of the float64 reference",
        "within the op's tolerance; calls that it refuses go to the next library. Nothing here has run on a real NPU,",
        "MLU or DCU unless a column says H.",
        "",
        "## Operators and devices",
        "",
        *matrix(found),
    ]
    for one in found:
        lines += ["", *section(one)]
    return "\n".join([*lines, "", *unknowns()]) + "\n"


def mark(one: dict[str, Any]) -> str:
    """S, H or C."""
    return "S" if one["simulated"] else "C" if one["device"] == "cpu" else "H"


def matrix(found: list[dict[str, Any]]) -> Iterator[str]:
    """Op x device: the libraries that served, first the one that is asked first."""
    yield "| op | " + " | ".join(f"{TITLES[one['device']]} ({mark(one)})" for one in found) + " |"
    yield "|---" * (len(found) + 1) + "|"
    for op in sorted({row["op"] for one in found for row in one["rows"]}):
        cells = []
        for one in found:
            order = [*one["libraries"], "reference"]
            right = {row["library"] for row in one["rows"] if row["op"] == op and row["right"]}
            cells.append(", ".join(sorted(right, key=order.index)) or "nothing")
        yield f"| {op} | " + " | ".join(cells) + " |"


def section(one: dict[str, Any]) -> Iterator[str]:
    """One device: versions, libraries, and a row for each op x library x dtype."""
    where = f"simulator {one['simulated']}" if one["simulated"] else "this device itself"
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
    yield f"## {TITLES[one['device']]}: {where}"
    yield ""
    yield f"{one['date']}; {versions}."
    yield ""
    for name, state in one["libraries"].items():
        if state != "loads":
            yield f"- kernel library {name} was not there: {state}"
    yield ""
    yield "| op | kernel library | dtype | right | refused | gradients | layouts |"
    yield "|---|---|---|---|---|---|---|"
    for row in one["rows"]:
        if row["library"] != "reference":
            gradients, layouts = "compared" if row["gradient"] else "none", ", ".join(row["layouts"])
            counts = f"{row['right']} | {row['refused']}"
            yield f"| {row['op']} | {row['library']} | {row['dtype']} | {counts} | {gradients} | {layouts} |"


def unknowns() -> Iterator[str]:
    """What public sources do not tell, and what stands in its place."""
    sys.path.insert(0, str(ROOT))
    from llm_adapt import simulators

    yield "## Unknown"
    yield ""
    yield "What public sources do not tell of each device, or a simulator cannot show. A call that would need it"
    yield "raises, unless the line says what is answered."
    for name in simulators.SIMULATORS:
        simulator = simulators.parse(name).simulator
        yield ""
        yield f"**{TITLES[name]}** (simulated: {', '.join(simulator.models)})"
        yield ""
        yield from (f"- {line}" for line in simulator.unknown)


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when the page is not what it should be"
    )
    args = parser.parse_args()
    problems = claims_without_evidence()
    if args.check:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
            problems.append(f"{PAGE.relative_to(ROOT)} is out of date. Run: python scripts/devices_page.py")
    else:
        PAGE.write_text(page(), encoding="utf-8")
    print(
        "\n".join(problems) or f"{PAGE.relative_to(ROOT)} rests on evidence",
        file=sys.stderr if problems else sys.stdout,
    )
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
