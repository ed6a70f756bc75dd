"""llm-adapt run: any script, unchanged, under torchrun, patched in every process."""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from llm_adapt import simulators
from llm_adapt.adapters import detect
from llm_adapt.cli import worker
from llm_adapt.cli.agent import launch
from llm_adapt.cli.ranks import Ranks, outer_ranks
from llm_adapt.errors import CommError, LlmAdaptError, SettingsError
from llm_adapt.settings import SETTINGS, Settings, resolve

__all__ = ["ScriptError", "add_parser", "run_script"]

_EXAMPLES = """examples:
  llm-adapt run train.py --epochs 3                        one process
  llm-adapt run --nproc 8 pretrain_gpt.py --tp 8           eight processes on this machine
  llm-adapt run --device cpu --nproc 2 pretrain_gpt.py     on the CPU, whatever else is here
  llm-adapt run --nnodes 2 --node-rank 0 --master-addr 10.0.0.1 --nproc 8 pretrain_gpt.py
  srun llm-adapt run pretrain_gpt.py                       ranks come from Slurm (or mpirun, or torchrun)
  llm-adapt run --simulate npu --nproc 2 pretrain.py       on two simulated Ascend NPUs (docs/simulators.md)
  llm-adapt run --out runs/a train.py                      writes runs/a/report.json: what was chosen, and why

The exit code, signals and tracebacks are the script's own; of several processes the first that fails gives the
exit code, 128 + N when signal N killed it. 78 means that llm-adapt itself refused to start.
"""


class ScriptError(LlmAdaptError, ValueError):
    """The script or module cannot be started as asked."""


def add_parser(subparsers: Any) -> None:
    """Add the `run` command."""
    parser = subparsers.add_parser(
        "run",
        help="run a CUDA script unchanged on the device that is here",
        description="Run a CUDA-written script, unchanged, under torchrun, patched in every process.",
        usage="llm-adapt run [options] script.py [args ...]\n       llm-adapt run [options] -m module [args ...]",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", help="cuda, npu, mlu, dcu or cpu (default: LLM_ADAPT_DEVICE, else detected)")
    parser.add_argument(
        "--simulate", metavar="NAME", help="a simulated npu, mlu or dcu on host memory; NAME:MODEL names the chip"
    )
    parser.add_argument("--cache", metavar="DIR", help="where simulators and CPU kernels are built (default: ~/.cache)")
    parser.add_argument("--nproc", type=_number(1, 1024), metavar="N", help="processes on this machine (default 1)")
    parser.add_argument("--nnodes", type=_number(1, 65536), default=1, metavar="N", help="machines in the job")
    parser.add_argument(
        "--node-rank", type=_number(0, 65535), default=0, metavar="R", help="which of them this one is, from 0"
    )
    parser.add_argument("--master-addr", metavar="HOST", help="host of machine 0 (needed with --nnodes)")
    parser.add_argument("--master-port", type=_number(1, 65535), metavar="PORT", help="its free port (default 29500)")
    parser.add_argument(
        "--cpu-devices", type=_number(1, 1024), metavar="N", help="CUDA ordinals the CPU presents (default: --nproc)"
    )
    parser.add_argument("--strict", action="store_true", default=None, help="reported skips become errors")
    parser.add_argument("--out", metavar="DIR", help="folder for report.json")
    parser.add_argument("--ops", metavar="POLICY", help="which kernel library serves which op: attention=reference")
    parser.add_argument("--proof", metavar="WHEN", help="when kernels are proved: off, first, strict or sample:N")
    parser.add_argument("-m", dest="is_module", action="store_true", help="run a module, as python -m does")
    parser.add_argument("script", help="the script (with -m: the module)")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")
    parser.set_defaults(func=run_script)


def _number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} was given; a number from {low} to {high} is needed")
        return int(text)

    return parse


def run_script(args: argparse.Namespace) -> int:
    """Check everything that can be checked without starting a process, then start them."""
    settings = resolve(**{name: getattr(args, name) for name in SETTINGS})
    _check_nodes(args)
    ranks = _single_rank(args) if args.nproc == 1 and args.nnodes == 1 else _ranks_from_outside(args)
    _check_script(args)
    chosen = _device(settings, "--device" if args.device else "LLM_ADAPT_DEVICE")
    variables = _as_variables(settings) | worker.patched_start(os.environ)
    nproc = args.nproc or 1
    if ranks is None or ranks.rank == 0:
        said = _processes(args, ranks.world_size if ranks is not None else nproc * args.nnodes)
        print(f"llm-adapt: {chosen}; {said}", file=sys.stderr, flush=True)
    command = worker.command(args.script, args.args, args.is_module)
    if ranks is not None:  # this process is the only one here, or one that an outer launcher made: become the script
        sys.stdout.flush()
        os.execve(command[0], command, {**os.environ, **variables, **ranks.environment()})
    return launch(args, nproc, command, variables)


def _device(settings: Settings, requested_by: str) -> str:
    """What the processes will run on, in words; a simulator is built here, before any process waits for it."""
    if settings.simulate is None:
        detection = detect(settings.device, requested_by=requested_by)
        return f"{detection.adapter.title} ({detection.reason})"
    simulation = simulators.parse(settings.simulate)
    if settings.device not in (None, simulation.simulator.name):
        raise SettingsError(
            f"Device {settings.device} and the simulator {settings.simulate} were asked. Drop one of the two."
        )
    if settings.cache is not None:
        os.environ["LLM_ADAPT_CACHE"] = os.path.abspath(settings.cache)
    simulators.prepare(settings.simulate)
    return f"SIMULATED {simulation.text}: {simulation.simulator.title}"


def _processes(args: argparse.Namespace, count: int) -> str:
    said = "1 process" if count == 1 else f"{count} processes"
    if args.nnodes == 1:
        return said
    return f"{said} on {args.nnodes} machines, of which this is {args.node_rank}; they meet at {args.master_addr}"


def _ranks_from_outside(args: argparse.Namespace) -> Ranks | None:
    """Ranks given by torchrun, Slurm or OpenMPI, one process without them; None when processes are asked for."""
    if args.nproc is not None or args.nnodes > 1:
        return None
    given = {"MASTER_ADDR": args.master_addr, "MASTER_PORT": args.master_port}
    flags = {name: str(value) for name, value in given.items() if value is not None}
    return outer_ranks({**os.environ, **flags}) or _single_rank(args)


def _single_rank(args: argparse.Namespace) -> Ranks:
    with socket.socket() as probe:  # a port that is free now
        probe.bind(("127.0.0.1", 0))
        free_port = probe.getsockname()[1]
    return Ranks("llm-adapt", 0, 1, 0, 1, args.master_addr or "127.0.0.1", args.master_port or free_port)


def _as_variables(settings: Settings) -> dict[str, str]:
    """Settings as variables for the processes; a value given by flag overrides the variable."""
    found = {}
    for name, row in SETTINGS.items():
        value = getattr(settings, name)
        if value != getattr(Settings(), name):
            found[row.variable] = str(int(value)) if isinstance(value, bool) else str(value)
    if settings.out is not None:
        found[SETTINGS["out"].variable] = _folder(settings.out)
    return found


def _folder(out: str) -> str:
    """Make the folder of --out now: the script may change its own, and at its end it is too late to refuse."""
    folder = os.path.abspath(out)
    try:
        os.makedirs(folder, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "this user may not write there"
    except (OSError, ValueError) as error:
        reason = str(error)
    if reason:
        raise SettingsError(f"--out or LLM_ADAPT_OUT asked for reports in {out!r}, which cannot be: {reason}.")
    return folder


def _check_script(args: argparse.Namespace) -> None:
    """Refuse what is not there at all. Everything else Python itself says, as without llm-adapt."""
    if args.is_module:
        if not _is_importable(args.script.partition(".")[0]):
            raise ScriptError(
                f"Module {args.script!r} was asked; it is not installed and not in {os.getcwd()}. "
                "Name it as in an import statement, or drop -m to run a file."
            )
        return
    asked = f"Script {args.script!r} was asked; "
    if not os.path.exists(args.script):
        raise ScriptError(f"{asked}found nothing there (from {os.getcwd()}). Correct the path.")
    if os.path.isdir(args.script) and not os.path.isfile(os.path.join(args.script, "__main__.py")):
        raise ScriptError(f"{asked}it is a folder without a __main__.py. Name a file in it.")
    if not os.access(args.script, os.R_OK):
        raise ScriptError(f"{asked}this user may not read it. Correct its permissions.")


def _is_importable(package: str) -> bool:
    """Whether a top-level package is here, without importing it: its code belongs to the patched processes."""
    if package in sys.modules:
        return True
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # no name at all
        return False
    finally:
        del sys.path[0]


def _check_nodes(args: argparse.Namespace) -> None:
    if args.nnodes > 1 and not args.master_addr:
        raise CommError(f"--nnodes {args.nnodes} was asked without --master-addr. Give the host of machine 0.")
    if args.node_rank >= args.nnodes:
        raise CommError(
            f"--node-rank {args.node_rank} was asked with --nnodes {args.nnodes}. Machines count from 0 to "
            f"{args.nnodes - 1}."
        )
