"""Run transformers' own model tests on the CPU without llm_adapt and with it, and write docs/transformers_suites.md.

    python scripts/transformers_suites.py FOLDER                  # what has not been run yet, then the page
    python scripts/transformers_suites.py FOLDER --models llama --again --side with
    python scripts/transformers_suites.py FOLDER --page-only

FOLDER holds their tests, which are not part of this repository; the error for a folder without them says how to lay
them out. Results are kept in FOLDER/results. A suite is run again when a version has changed or, with llm_adapt, a
line of it. A test that passes without llm_adapt and does not with it makes the exit status 1.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "transformers_suites.md"
BACKEND = "llm_adapt.cli.transformers_backend"
MODELS = ("llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma2", "deepseek_v3")
SIDES = ("without", "with")
LAYOUT = """To lay the tests out in FOLDER (nothing of it is committed):
1. From a checkout of transformers: tests/, utils/, conftest.py and pyproject.toml, of the version installed here.
   Where only an older checkout is at hand, copy tests/*.py of the installed version's sdist over it; what has moved
   between the two must then be mended by hand: names that transformers.testing_utils no longer has, and mixins that
   need several devices (tests/test_fsdp_mixin.py, tests/test_tensor_parallel_mixin.py) may become empty classes
   FSDPTesterMixin and TensorParallelTesterMixin.
2. mkdir FOLDER/src; ln -s <site-packages>/transformers FOLDER/src/transformers
3. python -m pip install --target FOLDER/site pytest pytest-xdist pytest-timeout pytest-asyncio pytest-env \\
       parameterized httpx psutil
4. A line that says where they are from: FOLDER/origin.txt
"""


class Run(NamedTuple):
    """One suite, run once: the fate of each test, and how long all took.

    Attributes:
        note: what the report of llm_adapt says of it; "" without llm_adapt.
    """

    fates: Mapping[str, str]
    seconds: float
    note: str = ""

    def count(self, fate: str) -> int:
        """Number of tests of this fate."""
        return sum(found == fate for found in self.fates.values())


def fates(junit: Path) -> dict[str, str]:
    """Test -> passed, failed or skipped. A test with a failed part has failed, one with a skipped part is skipped."""
    found = {}
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        tags = {child.tag for child in case}
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        found[name] = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
    return found


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    names = ("transformers", "torch", "pytest")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def key_of(side: str, folder: Path) -> str:
    """A hash of all that a result of this side depends on."""
    text = hashlib.sha256(json.dumps([versions(), _origin(folder)]).encode())
    if side == "with":
        for path in sorted((ROOT / "llm_adapt").rglob("*.py")):
            text.update(path.read_bytes())
    return text.hexdigest()[:16]


def _origin(folder: Path) -> str:
    path = folder / "origin.txt"
    return " ".join(path.read_text(encoding="utf-8").split()) if path.exists() else "of unknown origin"


def _test_file(folder: Path, model: str) -> Path:
    return folder / "tests" / "models" / model / f"test_modeling_{model}.py"


def _environment(folder: Path, side: str, out: Path) -> dict[str, str]:
    """Variables of the process that runs a suite."""
    chosen = {name: value for name, value in os.environ.items() if not name.startswith("LLM_ADAPT_")}
    paths = [str(folder / "site"), str(ROOT), *filter(None, [chosen.get("PYTHONPATH")])]
    chosen |= {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_TEST_DEVICE": "cpu"}
    chosen.pop("TRANSFORMERS_TEST_BACKEND", None)
    if side == "with":
        chosen |= {"TRANSFORMERS_TEST_BACKEND": BACKEND, "LLM_ADAPT_DEVICE": "cpu", "LLM_ADAPT_OUT": str(out)}
    return chosen


def run(folder: Path, model: str, side: str, timeout_s: float) -> None:
    """Run one suite and keep its result.

    Raises:
        SystemExit: pytest gave no result, or llm_adapt was asked for and has left no report.
    """
    results = folder / "results"
    out = results / f"{side}_{model}"
    out.mkdir(parents=True, exist_ok=True)
    junit, report = out / "junit.xml", out / "report.json"
    for old in (junit, report, out / "run.json"):
        old.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", str(_test_file(folder, model).relative_to(folder)), "-q", "-o", "addopts=",
        "-p", "no:cacheprovider", "--timeout", "900", f"--junitxml={junit}",
    ]  # fmt: skip
    start, key = time.monotonic(), key_of(side, folder)
    with open(out / "log.txt", "w", encoding="utf-8") as log:
        environment = _environment(folder, side, out)
        try:
            code = subprocess.run(
                command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT,
                timeout=timeout_s, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{model} {side} llm_adapt took more than {timeout_s:.0f} s; see {log.name}") from None
    if code not in (0, 1) or not junit.exists():
        raise SystemExit(f"{model} {side} llm_adapt: pytest ended with {code}; see {log.name}")
    if side == "with" and not report.exists():
        raise SystemExit(f"{model}: llm_adapt has left no report, so it was not active; see {log.name}")
    told = {"key": key, "seconds": round(time.monotonic() - start, 1)}
    (out / "run.json").write_text(json.dumps(told), encoding="utf-8")


def kept(folder: Path, model: str, side: str, any_version: bool = False) -> Run | None:
    """The result that is kept, if it is one of what stands here now."""
    out = folder / "results" / f"{side}_{model}"
    if not (out / "run.json").exists():
        return None
    told: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))
    if told["key"] != key_of(side, folder) and not any_version:
        return None
    note = _note(json.loads((out / "report.json").read_text(encoding="utf-8"))) if side == "with" else ""
    return Run(fates(out / "junit.xml"), told["seconds"], note)


def _note(report: Mapping[str, Any]) -> str:
    """Rows applied in transformers, and calls of each op."""
    ours = [row for row in report["choices"] if row["subject"].startswith("transformers")]
    applied = sum(row["section"] == "patch" and row["choice"] == "applied" for row in ours)
    calls: Counter[str] = Counter()
    for row in report.get("ops", ()):
        calls[row["op"]] += row["calls"]
    told = ", ".join(f"{op} {number}" for op, number in sorted(calls.items()))
    return f"{applied} places patched; calls: {told or 'none'}"


def changed(without: Run, patched: Run) -> Iterator[tuple[str, str, str]]:
    """Tests whose fate is another with llm_adapt: name, fate without, fate with."""
    for name in sorted({*without.fates, *patched.fates}):
        pair = without.fates.get(name, "absent"), patched.fates.get(name, "absent")
        if pair[0] != pair[1]:
            yield (name, *pair)


def lost(without: Run, patched: Run) -> list[str]:
    """Tests that pass without llm_adapt and do not with it."""
    return [name for name, before, _ in changed(without, patched) if before == "passed"]


def page(folder: Path, pairs: Mapping[str, tuple[Run, Run]]) -> str:
    """The text of docs/transformers_suites.md."""
    rows = []
    for model, (without, patched) in pairs.items():
        cells = [model, len(without.fates)]
        for side in (without, patched):
            cells += [side.count("passed"), side.count("failed"), side.count("skipped")]
        rows.append("| " + " | ".join(map(str, [*cells, len(lost(without, patched))])) + " |")
    used = "\n".join(f"| {model} | {patched.note} |" for model, (_, patched) in pairs.items())
    other = _list(
        f"{model}: `{name}`: {before} without, {after} with"
        for model, (without, patched) in pairs.items()
        for name, before, after in changed(without, patched)
    )
    failing = _list(
        f"{model}: `{name}`"
        for model, (without, patched) in pairs.items()
        for name, fate in sorted(without.fates.items())
        if fate == "failed" and patched.fates.get(name) == "failed"
    )
    total = sum(len(lost(*pair)) for pair in pairs.values())
    told = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"""# transformers' own tests, without llm_adapt and with it

Written by `python scripts/transformers_suites.py FOLDER`, on the CPU, on {time.strftime("%Y-%m-%d")}.
Versions: {told}. The tests: {_origin(folder)}.

Each suite is `pytest tests/models/<model>/test_modeling_<model>.py`, run twice, each time in a process of its own:
as it is, and with `TRANSFORMERS_TEST_BACKEND={BACKEND}`, which calls
`llm_adapt.patch()` before a model is imported. A test that consists of parts counts once: it is failed when one of
them is, and skipped when one of them is.

Tests that pass without llm_adapt and do not with it: **{total}**.

| model | tests | passed without | failed | skipped | passed with | failed | skipped | lost |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

## Tests with another fate

{other}

## Tests that fail in both

{failing}

## What llm_adapt did in them

| model | the report of the run |
|---|---|
{used}
"""


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items) or "None."


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where transformers' tests lie")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--side", choices=SIDES, help="run this side only, and write no page")
    parser.add_argument("--again", action="store_true", help="run also what has been run")
    parser.add_argument("--page-only", action="store_true", help="run nothing; write the page of what is kept")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="S", help="of one suite (default: 1800)")
    return parser.parse_args()


def main() -> int:
    """Run what is missing, print each result, and write the page when both sides are there."""
    arguments = _arguments()
    folder: Path = arguments.folder.resolve()
    missing = [model for model in arguments.models if not _test_file(folder, model).exists()]
    if missing or not (folder / "conftest.py").exists():
        raise SystemExit(f"{folder} has no tests of {', '.join(missing) or 'transformers'}.\n{LAYOUT}")
    found: dict[tuple[str, str], Run] = {}
    for side in SIDES if arguments.side is None else (arguments.side,):
        for model in arguments.models:
            result = None if arguments.again else kept(folder, model, side, arguments.page_only)
            if result is None and not arguments.page_only:
                print(f"{model} {side} llm_adapt ...", end=" ", flush=True)
                run(folder, model, side, arguments.timeout)
                result = kept(folder, model, side, any_version=True)
                assert result is not None
                told = ", ".join(f"{result.count(fate)} {fate}" for fate in ("passed", "failed", "skipped"))
                print(f"{told}, {result.seconds:.0f} s", flush=True)
            if result is not None:
                found[model, side] = result
    pairs = {
        model: (found[model, "without"], found[model, "with"])
        for model in arguments.models
        if (model, "without") in found and (model, "with") in found
    }
    for model, pair in pairs.items():
        for name, before, after in changed(*pair):
            print(f"{model}: {name}: {before} without, {after} with")
    if pairs and arguments.side is None:
        PAGE.write_text(page(folder, pairs), encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")
    return 1 if any(lost(*pair) for pair in pairs.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
