"""llm-adapt: one parser, one subcommand a module."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import llm_adapt
from llm_adapt.cli import bench, diff, doctor, explain, run, simulate, worker
from llm_adapt.errors import LlmAdaptError

__all__ = ["build_parser", "main"]

_EXAMPLES = """examples:
  llm-adapt run --nproc 2 pretrain.py --lr 3e-4     any CUDA script, unchanged, on the device that is here
  llm-adapt run -m my_package.train                 a module instead of a file
  llm-adapt doctor                                  what this machine has, what is broken, how to mend it
  llm-adapt ops                                     which kernel serves each fused operator here, and why
  llm-adapt explain rms_norm --shape 8,1024,4096    who would serve that call, and why the others would not
  llm-adapt diff a/report.json b/report.json        what two runs chose differently
  llm-adapt bench --quick                           every operator beside what frameworks run, proved before it is timed
  llm-adapt simulate try npu                        an Ascend NPU on host memory: torch_npu without the hardware
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="llm-adapt",
        description="Run CUDA-written LLM training code on CUDA, Ascend NPU, Cambricon MLU, Hygon DCU or the CPU.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llm-adapt {llm_adapt.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    run.add_parser(subparsers)
    doctor.add_parser(subparsers)
    explain.add_parsers(subparsers)
    diff.add_parser(subparsers)
    bench.add_parser(subparsers)
    simulate.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an error of llm_adapt is one screen, never a stack trace."""
    try:
        try:
            args = build_parser().parse_args(argv)
            return int(args.func(args))
        finally:
            sys.stdout.flush()  # here, and not when Python ends: `llm-adapt doctor | head` closes it early
    except LlmAdaptError as error:
        worker.show(error)
        return worker.REFUSED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes
        return 141
