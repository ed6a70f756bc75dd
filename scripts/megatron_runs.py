"""Train with Megatron-LM's own pretrain_gpt.py, unchanged, on this machine: each kind of parallelism, ops on and off.

Writes docs/megatron_runs.md: the first and last loss of both, the time per iteration, and which operators served.
Needs Megatron-LM's repository at the tag of the installed Megatron-Core; nothing of it is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["RUNS", "main"]

ROOT = Path(__file__).resolve().parents[1]
_EXAMPLES = """examples:
  git clone --depth 1 --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM
  pip install six sentencepiece tiktoken omegaconf einops   # what megatron.training imports
  python scripts/megatron_runs.py --megatron Megatron-LM            all runs; writes docs/megatron_runs.md (20 minutes)
  python scripts/megatron_runs.py --megatron Megatron-LM --only moe    those whose name contains the text, not written
"""
_TINY = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 2 --global-batch-size 8 --train-iters 12 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 128 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --log-interval 1 --eval-iters 0 "
    "--eval-interval 1000 --transformer-impl local --no-persist-layer-norm --distributed-timeout-minutes 5 "
    "--attention-dropout 0"  # the operator draws other numbers than Megatron: its own drops other weights
)
_LLAMA = (
    "--normalization RMSNorm --swiglu --position-embedding-type rope --group-query-attention --num-query-groups 2 "
    "--disable-bias-linear --untie-embeddings-and-output-weights"
)
_MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 --expert-model-parallel-size 2 "
    "--disable-bias-linear --no-bias-gelu-fusion"  # what Megatron demands of them
)
_LEAST_FALL = 0.3  # of 5.54; where nothing is learned it moves by 0.03
_TP, _SP, _DO = "--tensor-model-parallel-size 2", "--sequence-parallel", "--use-distributed-optimizer"


class Run(NamedTuple):
    """A row of the page: its name, how many ranks, and the flags added to the tiny GPT."""

    name: str
    num_ranks: int
    flags: str


RUNS = (
    Run("one rank", 1, ""),
    Run("DP=2", 2, ""),
    Run("TP=2", 2, _TP),
    Run("TP=2, distributed optimizer", 2, f"{_TP} {_DO}"),
    Run("DP=2, distributed optimizer, overlaps", 2, f"{_DO} --overlap-grad-reduce --overlap-param-gather"),
    Run("PP=2", 2, "--pipeline-model-parallel-size 2 --num-layers 4"),
    Run("VPP", 2, "--pipeline-model-parallel-size 2 --num-layers 4 --num-layers-per-virtual-pipeline-stage 1"),
    Run("TP=2, SP", 2, f"{_TP} {_SP}"),
    Run("TP=2, SP, bf16, distributed optimizer", 2, f"{_TP} {_SP} --bf16 {_DO}"),
    Run("TP=2, bf16", 2, f"{_TP} --bf16"),
    Run("TP=2, fp16", 2, f"{_TP} --fp16 --initial-loss-scale 65536"),
    Run("MoE EP=2, alltoall", 2, f"{_MOE} --moe-token-dispatcher-type alltoall"),
    Run("MoE EP=2, allgather", 2, f"{_MOE} --moe-token-dispatcher-type allgather"),
    Run("MoE EP=2, grouped GEMM, bf16", 2, f"{_MOE} --moe-token-dispatcher-type alltoall --moe-grouped-gemm --bf16"),
    Run("TP=2, recompute full", 2, f"{_TP} --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1"),
    Run("TP=2, recompute selective", 2, f"{_TP} --recompute-granularity selective"),
    Run("TP=2, PP=2, SP, distributed optimizer", 4, f"{_TP} {_SP} {_DO} --pipeline-model-parallel-size 2 "
        "--num-layers 4"),
    # Without the distributed optimizer nobody installs the new weights in Megatron-FSDP's buffers: 5.537 -> 5.546.
    # --init-model-with-meta-device wants layers with reset_parameters; the local spec's have none: 5.552 -> 5.521.
    Run("Megatron-FSDP, DP=2", 2, f"--use-megatron-fsdp {_DO} --data-parallel-sharding-strategy optim_grads_params "
        "--no-gradient-accumulation-fusion --ckpt-format fsdp_dtensor"),
    Run("TP=2, attention dropout", 2, f"{_TP} --attention-dropout 0.1"),
    Run("Llama flags", 2, f"{_TP} {_LLAMA}"),
    Run("Llama flags, no rope fusion", 2, f"{_TP} {_LLAMA} --no-rope-fusion"),
    Run("Llama flags, SP, bf16, distributed optimizer", 2, f"{_TP} {_SP} --bf16 {_DO} {_LLAMA}"),
    Run("Llama flags, MoE, grouped GEMM, bf16", 2, f"{_LLAMA} {_MOE} --moe-token-dispatcher-type alltoall "
        "--moe-grouped-gemm --bf16"),
)  # fmt: skip


class Result(NamedTuple):
    """What a run printed; why is "" unless it failed."""

    losses: list[float]
    step_ms: float
    ops: list[str]
    why: str


def train(run: Run, tree: Path, ops: str, limit_s: float) -> Result:
    """One run in processes of its own."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "llm_adapt.cli", "run", "--device", "cpu", "--nproc", str(run.num_ranks)]
        command += ["--out", out, *(["--ops", ops] if ops else []), str(tree / "pretrain_gpt.py")]
        # Later flags win: argparse takes the last of those that are given twice.
        command += _TINY.split() + run.flags.split()
        path = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, cwd=out, env=environment, capture_output=True, text=True, timeout=limit_s, check=False
            )
        except subprocess.TimeoutExpired:
            return Result([], 0.0, [], f"did not end in {limit_s:.0f} s")
        lines = done.stdout + done.stderr
        losses = [float(text) for text in re.findall(r"lm loss: ([-+.\dEeinfa]+)", lines)]
        times = [float(text) for text in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", lines)]
        if done.returncode or not losses:
            told = re.findall(r"^(?:\[rank\d+\]: )?(\w*(?:Error|Exception)\b.*)$", lines, re.MULTILINE)
            return Result(losses, 0.0, [], (told or lines.splitlines() or ["nothing was printed"])[-1][:80])
        return Result(losses, statistics.median(times[len(times) // 2 :]), _served(Path(out)), "")


def _served(out: Path) -> list[str]:
    """The operators that were called, and by which library: "rms_norm (torch_native)"."""
    rows: list[dict[str, Any]] = json.loads((out / "report.json").read_text(encoding="utf-8")).get("ops", [])
    return sorted({f"{row['op']} ({row['library']})" for row in rows})


def compare(runs: list[Run], tree: Path, limit_s: float) -> Iterator[tuple[Run, Result, Result]]:
    """Each run with ops off and on."""
    for number, run in enumerate(runs, 1):
        print(f"  [{number}/{len(runs)}] {run.name}", file=sys.stderr, flush=True)
        yield run, train(run, tree, "off", limit_s), train(run, tree, "", limit_s)


def difference(off: Result, on: Result) -> float:
    """Largest relative difference between the losses of any step."""
    return max((abs(a - b) / abs(a) for a, b in zip(off.losses, on.losses, strict=True)), default=float("nan"))


def _learns(found: Result) -> bool:
    """Whether the loss fell by more than mock data make it go up and down."""
    return found.losses[-1] < found.losses[0] - _LEAST_FALL


def _row(run: Run, off: Result, on: Result) -> str:
    def cell(result: Result) -> str:
        return result.why or f"{result.losses[0]:.4f} -> {result.losses[-1]:.4f}"

    both = not (off.why or on.why)
    apart = f"{difference(off, on):.1e}" if both else "-"
    times = f"{off.step_ms:.0f} / {on.step_ms:.0f}" if both else "-"
    return f"| {run.name} | {run.num_ranks} | {cell(off)} | {cell(on)} | {apart} | {times} | {', '.join(on.ops)} |\n"


def page(rows: list[tuple[Run, Result, Result]]) -> str:
    """The page."""
    lines = "".join(_row(*row) for row in rows)
    return f"""# Megatron-LM's pretrain_gpt.py with our operators

Generated; do not edit. Megatron-LM core_v{version("megatron-core")}, unchanged, on the CPU over gloo: a tiny GPT
(2 layers, hidden size 64, 64 tokens, batch 8), 12 iterations on mock data, local layer spec. With `ops=off` Megatron
computes with its own code under the facade; the other run is the default. There is no dropout of attention weights,
but in one run: the operator draws other numbers than Megatron does. The last two columns are of the default
run: milliseconds an iteration (median of the second half; off / on, one run each on a machine with two cores, so no
benchmark) and the operators that were called, with the library that served them. A run whose loss does not fall fails:
Megatron-FSDP without --use-distributed-optimizer trains nothing, silently: its optimizer installs no new weights.

    python scripts/megatron_runs.py --megatron Megatron-LM

| run | ranks | loss, ops off | loss, ops on | largest relative difference | ms/iteration | operators |
|---|---|---|---|---|---|---|
{lines}"""


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write. Exit code 1 when a run fails with ops on that does not without, losses differ or stay."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="Megatron-LM's repository")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose name contains the text; nothing written")
    parser.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="for one run (default 300)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "megatron_runs.md", metavar="FILE")
    args = parser.parse_args(arguments)
    tree = args.megatron.resolve()
    if not (tree / "pretrain_gpt.py").exists():
        parser.error(f"--megatron {args.megatron} was given; there is no pretrain_gpt.py. Clone Megatron-LM there.")
    runs = [run for run in RUNS if args.only.lower() in run.name.lower()]
    if not runs:
        parser.error(f"--only {args.only} was given; the runs are: {'; '.join(run.name for run in RUNS)}.")
    rows = []
    for row in compare(runs, tree, args.limit):
        rows.append(row)
        print(_row(*row), end="", flush=True)
    if not args.only:
        args.out.write_text(page(rows), encoding="utf-8")
    bad = [run.name for run, off, on in rows if not off.why and (on.why or not difference(off, on) < 1e-2)]
    idle = [run.name for run, *results in rows if any(not found.why and not _learns(found) for found in results)]
    for words, names in (("differs with ops on", bad), ("the loss does not fall", idle)):
        if names:
            print(f"{words}: {'; '.join(names)}", file=sys.stderr)
    return bool(bad or idle)


if __name__ == "__main__":
    sys.exit(main())
