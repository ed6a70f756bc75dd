"""Training steps with the operators of llm_adapt, without them, and without llm_adapt: times, losses, memory.

Each mode runs in a process of its own with the same seed and the same data: "unpatched" never imports llm_adapt, "off"
calls patch(ops="off"), "on" calls patch(). They make steps in turn, a few at a time, so that whatever disturbs the
machine falls on all alike. Times are medians with 95 % intervals by order statistics; ratios are formed between steps
of the same number. The main job is examples/pretrain_gpt.py under `llm-adapt run`, tensor parallel over two processes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from end_to_end_report import check, write
from training_steps import MODES, SIZES

from llm_adapt.cli.bench.timing import interval, ratio

ROOT = Path(__file__).resolve().parents[1]
_EXAMPLES = """examples:
  python benchmarks/end_to_end.py --quick --out runs/e2e           Llama alone, few steps (a minute on 2 cores)
  python benchmarks/end_to_end.py --out runs/e2e                   Llama, Mistral, Mixtral and the main job (5 minutes)
  python benchmarks/end_to_end.py --out runs/e2e --only job        the main job alone
  python benchmarks/end_to_end.py --out runs/e2e --check           exit code 1: a mode is slower, or its losses differ
  python benchmarks/end_to_end.py --out runs/gpu --device cuda --size 1B --dtype bfloat16 --tokens 4096 \\
      --modes unpatched,on,liger --only llama,mistral              on a GPU, beside transformers with Liger
  python benchmarks/end_to_end.py --out runs/gpu --device cuda --only job --job-nproc 1 \\
      --job-flags "--bf16 --hidden 2048 --layers 16 --heads 16"    Megatron's local spec on a GPU, without us and with
"""
_WARM_UP = 2  # first steps that are made and not counted: kernels are proved, the optimizer gets its state
# What two orders of the same sums may come to over a few steps: relative difference of a loss.
_TOLERANCES = {"float32": 2e-4, "bfloat16": 2e-2}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for end_to_end.json, .md and .png")
    parser.add_argument("--quick", action="store_true", help="Llama alone, 256 tokens, 4 rounds, no main job")
    parser.add_argument("--only", metavar="NAMES", help="of llama, mistral, mixtral, job; separated by commas")
    parser.add_argument("--modes", default="unpatched,off,on", help=f"of {', '.join(MODES)} (unpatched,off,on)")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="may be repeated (both)")
    parser.add_argument("--size", choices=list(SIZES), default="16M", help="parameters of the dense models (16M)")
    parser.add_argument("--tokens", type=int, help="length of a sequence (512; quick 256)")
    parser.add_argument("--batch", type=int, default=1, help="sequences a step (1)")
    parser.add_argument("--rounds", type=int, help="how often each process is asked for steps (8; quick 4)")
    parser.add_argument("--steps", type=int, default=2, help="steps a round (2)")
    parser.add_argument("--job-rounds", type=int, default=2, help="runs of the main job with each setting (2)")
    parser.add_argument("--job-steps", type=int, default=20, help="steps of each of these runs (20)")
    parser.add_argument("--job-nproc", type=int, default=2, help="its processes, tensor parallel (2)")
    parser.add_argument("--job-flags", default="", metavar="TEXT", help="more flags of examples/pretrain_gpt.py")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of transformers (sdpa)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ops", help="policy of mode on")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a mode is slower or its losses differ")
    args = parser.parse_args(arguments)
    args.only = [name.strip() for name in (args.only or "llama,mistral,mixtral,job").split(",")]
    args.modes = [name.strip() for name in args.modes.split(",")]
    for names, known in ((args.only, ("llama", "mistral", "mixtral", "job")), (args.modes, MODES)):
        if unknown := sorted(set(names) - set(known)):
            parser.error(f"{', '.join(unknown)} was asked; there are {', '.join(known)}")
    if args.quick:
        args.only = [name for name in args.only if name == "llama"] or args.only[:1]
    args.tokens = args.tokens or (256 if args.quick else 512)
    args.rounds = args.rounds or (4 if args.quick else 8)
    args.dtype = args.dtype or ["float32", "bfloat16"]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out} cannot be written: {error}")
    return args


class Child:
    """A process with one model in one mode."""

    def __init__(self, args: argparse.Namespace, model: str, dtype: str, mode: str) -> None:
        options = {"model": model, "mode": mode, "size": args.size, "dtype": dtype, "tokens": args.tokens,
                   "batch": args.batch, "attention": args.attention, "device": args.device}  # fmt: skip
        words = [f"--{name}={value}" for name, value in options.items()] + ([f"--ops={args.ops}"] if args.ops else [])
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - stop() closes it
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / "training_steps.py"), *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=_environment(),
        )  # fmt: skip

    def read(self) -> dict[str, Any]:
        """Its next answer. Raises RuntimeError, with what it said last, when it has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                found: dict[str, Any] = json.loads(line[1:])
                return found
        self.errors.seek(0)
        said = "\n".join(self.errors.read().splitlines()[-12:])
        raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended with {self.process.wait()}:\n{said}")

    def ask(self, word: str) -> dict[str, Any]:
        """Say a word, and read the answer."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: read() says why
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        return self.read()

    def stop(self) -> None:
        """End the process, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.errors.close()


def _environment(**more: str) -> dict[str, str]:
    """Without settings of llm_adapt that would change a mode."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("LLM_ADAPT_")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return plain | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"} | more


def compare_modes(args: argparse.Namespace, model: str, dtype: str) -> dict[str, Any]:
    """All modes of one model in one dtype, step by step in turn."""
    children: dict[str, Child] = {}
    steps: dict[str, dict[str, Any]] = {}
    try:
        for mode in args.modes:
            children[mode] = Child(args, model, dtype, mode)
        for mode, child in children.items():
            steps[mode] = child.read() | {"losses": [], "seconds": []}
        for number in range(args.rounds + 1):
            turn = number % len(args.modes)
            for mode in args.modes[turn:] + args.modes[:turn]:
                found = children[mode].ask(str(args.steps if number else _WARM_UP))
                steps[mode]["losses"] += found["losses"]
                steps[mode]["seconds"] += found["seconds"] if number else []
        for mode, child in children.items():
            steps[mode] |= child.ask("end")
    finally:
        for child in children.values():
            child.stop()
    return {"model": model, "dtype": dtype, "tokens": args.tokens, "batch": args.batch} | summary(steps, dtype)


def summary(steps: dict[str, dict[str, Any]], dtype: str) -> dict[str, Any]:
    """Medians, ratios to the first mode, and how far losses are apart, for each mode."""
    base = next(iter(steps.values()))
    modes = {}
    for mode, found in steps.items():
        pairs = zip(base["losses"], found["losses"], strict=True)
        apart = max((abs(a - b) / max(abs(a), 1e-12) for a, b in pairs), default=float("nan"))
        modes[mode] = found | {
            "step_s": interval(found["seconds"]),
            "ratio": ratio(base["seconds"], found["seconds"]),
            "loss_difference": apart,
            "losses_equal": apart <= _TOLERANCES[dtype],
        }
    return {"base": next(iter(steps)), "loss_tolerance": _TOLERANCES[dtype], "modes": modes}


def main_job(args: argparse.Namespace) -> dict[str, Any]:
    """The main job, tensor parallel, with the operators on and off in turn."""
    steps: dict[str, dict[str, Any]] = {mode: {"losses": [], "seconds": [], "served": []} for mode in ("off", "on")}
    for number in range(args.job_rounds):
        for mode in ("off", "on") if number % 2 == 0 else ("on", "off"):
            found = _run_job(args, mode)
            steps[mode]["losses"] = found["losses"]
            steps[mode]["seconds"] += found["seconds"][_WARM_UP:]
            steps[mode]["served"] = found["served"]
            print(f"  job {mode}, run {number + 1}: {interval(found['seconds']).median:.2f} s a step", file=sys.stderr)
    dtype = "bfloat16" if "--bf16" in args.job_flags else "float32"
    name = " ".join(["pretrain_gpt.py", f"TP={args.job_nproc}", args.job_flags]).strip()
    return {"model": name, "dtype": dtype, "tokens": None} | summary(steps, dtype)


def _run_job(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    """One run; the steps are timed by the lines that it adds to loss.jsonl, looked for 100 times a second."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        ops = ["--ops", "off"] if mode == "off" else ["--ops", args.ops] if args.ops else []
        flags = ["--nproc", str(args.job_nproc), "--device", args.device, "--out", folder, *ops]
        script = [str(ROOT / "examples" / "pretrain_gpt.py"), "--out", folder, "--steps", str(args.job_steps),
                  "--tp", str(args.job_nproc), *shlex.split(args.job_flags)]  # fmt: skip
        log = out / "log.txt"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "llm_adapt.cli", "run", *flags, *script],
                stdout=file, stderr=subprocess.STDOUT, env=_environment(OMP_NUM_THREADS="1"), cwd=folder,
            )  # fmt: skip
            try:
                moments = list(_lines_in(out / "loss.jsonl", process, args.job_steps))
                code = process.wait(timeout=600)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if code or len(moments) < args.job_steps:
            raise RuntimeError(f"the main job ({mode}) ended with {code}:\n{log.read_text()[-2000:]}")
        losses = [json.loads(line)["loss"] for line in (out / "loss.jsonl").read_text().splitlines()]
        report = json.loads((out / "report.json").read_text())
    pairs = itertools.pairwise(moments)
    return {"losses": losses, "seconds": [b - a for a, b in pairs], "served": report.get("ops", [])}


def _lines_in(path: Path, process: subprocess.Popen[bytes], number: int) -> Iterator[float]:
    """The moments at which a growing file gets its next line."""
    seen = 0
    while seen < number:
        is_over = process.poll() is not None
        lines = path.read_text().count("\n") if path.exists() else 0
        for _ in range(lines - seen):
            yield time.perf_counter()
        seen = max(seen, lines)
        if is_over:
            return
        time.sleep(0.01)


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """What is needed to compare these results with others."""
    versions = {"python": platform.python_version()}
    for name in ("llm-adapt", "torch", "transformers", "megatron-core", "liger-kernel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # absent: not among the versions
            versions[name] = importlib.metadata.version(name)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {
        "benchmark": "end_to_end", "command": " ".join(["benchmarks/end_to_end.py", *sys.argv[1:]]), "date": date,
        "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "device": args.device,
        "load_before": os.getloadavg()[0], "versions": versions,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run everything that was asked for, write it, and judge."""
    args = parse(arguments)
    record = facts(args) | {"results": []}
    if record["load_before"] > 0.5 * (os.cpu_count() or 1):
        load = f"load {record['load_before']:.1f} on {os.cpu_count()} cores"
        print(f"end_to_end: {load}: the machine is busy, and so will the figures be", file=sys.stderr)
    models = [(model, dtype) for model in args.only if model != "job" for dtype in args.dtype]
    for model, dtype in models:
        found = compare_modes(args, model, dtype)
        record["results"].append(found)
        said = ", ".join(f"{mode} {one['step_s'].median * 1e3:.0f} ms" for mode, one in found["modes"].items())
        print(f"{model} {dtype}: {said}", file=sys.stderr, flush=True)
        write(record, args.out)  # what is done is not lost when a later one fails
    if "job" in args.only:
        record["results"].append(main_job(args))
        write(record, args.out)
    problems = check(record)
    for problem in problems:
        print(f"end_to_end: {problem}", file=sys.stderr)
    print(f"wrote {args.out}/end_to_end.json, .md, .png", file=sys.stderr)
    return int(args.check and bool(problems))


if __name__ == "__main__":
    sys.exit(main())
