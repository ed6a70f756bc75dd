"""llm-adapt: one parser, one subcommand a module."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import llm_adapt
from llm_adapt.cli import doctor, render, run
from llm_adapt.errors import LlmAdaptError

__all__ = ["CONFIGURATION_ERROR", "build_parser", "main"]

CONFIGURATION_ERROR = 78  # sysexits.h EX_CONFIG: no script returns it by accident

_EXAMPLES = """examples:
  llm-adapt run --nproc 2 pretrain.py --lr 3e-4     any CUDA script, unchanged, on the device that is here
  llm-adapt run -m my_package.train                 a module instead of a file
  llm-adapt doctor                                  what this machine has, what is broken, how to mend it
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
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an error of llm_adapt is one screen, never a stack trace."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.func(args))
    except LlmAdaptError as error:
        render.error(error)
        return CONFIGURATION_ERROR
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `llm-adapt doctor | head`
        sys.stderr.close()
        return 141
