"""llm-adapt run: any script, unchanged, under torchrun, patched in every process."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_adapt.adapters import detect
from llm_adapt.cli import worker
from llm_adapt.cli.ranks import outer_ranks
from llm_adapt.errors import CommError, LlmAdaptError
from llm_adapt.settings import SETTINGS, Settings, resolve

__all__ = ["ScriptError", "add_parser", "run_script"]

_EXAMPLES = """examples:
  llm-adapt run train.py --epochs 3                        one process
  llm-adapt run --nproc 8 pretrain_gpt.py --tp 8           eight processes on this machine
  llm-adapt run --device cpu --nproc 2 pretrain_gpt.py     on the CPU, whatever else is here
  llm-adapt run --nnodes 2 --node-rank 0 --master-addr 10.0.0.1 --nproc 8 pretrain_gpt.py
  srun llm-adapt run pretrain_gpt.py                       ranks come from Slurm (or mpirun, or torchrun)
  llm-adapt run --out runs/a train.py                      writes runs/a/report.json: what was chosen, and why

The exit code, signals and tracebacks are the script's own; 78 means that llm-adapt itself refused to start.
"""


class ScriptError(LlmAdaptError, ValueError):
    """The script or module cannot be started as asked."""


def add_parser(subparsers: Any) -> None:
    """Add the `run` command."""
    parser = subparsers.add_parser(
        "run",
        help="run a CUDA script unchanged on the device that is here",
        description="Run a CUDA-written script, unchanged, under torchrun, patched in every process.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", help="cuda, npu, mlu, dcu or cpu (default: LLM_ADAPT_DEVICE, else detected)")
    parser.add_argument("--nproc", type=_count, help="processes on this machine (default 1)")
    parser.add_argument("--nnodes", type=_count, default=1, help="machines in the job")
    parser.add_argument("--node-rank", type=int, default=0, help="which of them this one is, from 0")
    parser.add_argument("--master-addr", help="host of machine 0 (needed with --nnodes)")
    parser.add_argument("--master-port", type=_count, default=29500, help="its free port (default 29500)")
    parser.add_argument("--cpu-devices", type=_count, help="CUDA ordinals the CPU presents (default: --nproc)")
    parser.add_argument("--strict", action="store_true", default=None, help="reported skips become errors")
    parser.add_argument("--out", type=Path, help="folder for report.json")
    parser.add_argument("-m", dest="is_module", action="store_true", help="run a module, as python -m does")
    parser.add_argument("script", help="the script (with -m: the module)")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")
    parser.set_defaults(func=run_script)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} was given; at least 1 is needed")
    return number


def run_script(args: argparse.Namespace) -> int:
    """Check everything that can be checked without starting a process, then start them."""
    arguments = {name: getattr(args, name) for name in ("device", "strict", "cpu_devices", "out")}
    settings = resolve(**arguments)
    detection = detect(settings.device, requested_by="--device" if args.device else "LLM_ADAPT_DEVICE")
    _check_script(args)
    _check_nodes(args)
    environment = _settings_environment(settings)
    ranks = outer_ranks(os.environ) if args.nproc is None and args.nnodes == 1 else None
    if ranks is not None:
        os.environ.update(environment | ranks.environment())
        return worker.run(args.script, args.args, args.is_module)
    nproc = args.nproc or 1
    note = f"llm-adapt: {detection.adapter.title} ({detection.reason}); {nproc * args.nnodes} process(es)"
    print(note, file=sys.stderr, flush=True)
    if detection.adapter.name == "cpu":
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    return _launch(args, nproc, environment)


def _settings_environment(settings: Settings) -> dict[str, str]:
    """Settings as variables for the processes; a value given by flag overrides the variable."""
    found = {}
    for name, row in SETTINGS.items():
        value = getattr(settings, name)
        if value is not None:
            found[row.variable] = str(int(value)) if isinstance(value, bool) else str(value)
    if "OMP_NUM_THREADS" in os.environ:
        found["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
    return found


def _check_script(args: argparse.Namespace) -> None:
    if args.is_module:
        sys.path.insert(0, os.getcwd())
        try:
            spec = importlib.util.find_spec(args.script)
        except (ImportError, ValueError) as error:
            raise ScriptError(f"Module {args.script!r} was asked; it cannot be found: {error}.") from None
        finally:
            sys.path.pop(0)
        if spec is None:
            raise ScriptError(f"Module {args.script!r} was asked; it is not installed and not in {os.getcwd()}.")
        return
    path = Path(args.script)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise ScriptError(f"Script {args.script!r} was asked; found {found} there (from {os.getcwd()}).")
    try:
        compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except OSError as error:
        raise ScriptError(f"Script {args.script!r} was asked; it cannot be read: {error.strerror}.") from None
    except (SyntaxError, ValueError) as error:
        raise ScriptError(f"Script {args.script!r} was asked; it is not Python: {error}.") from None


def _check_nodes(args: argparse.Namespace) -> None:
    if args.nnodes > 1 and not args.master_addr:
        raise CommError(f"--nnodes {args.nnodes} was asked without --master-addr; give the host of machine 0.")
    if not 0 <= args.node_rank < args.nnodes:
        raise CommError(f"--node-rank {args.node_rank} was asked with --nnodes {args.nnodes}; it counts from 0.")


def _launch(args: argparse.Namespace, nproc: int, environment: Mapping[str, str]) -> int:
    """Start the processes under torch's elastic agent and wait for them."""
    os.environ.update(environment)
    # The launcher itself computes nothing: a vendor plug-in is loaded in the workers, not here.
    autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _put("TORCH_DEVICE_BACKEND_AUTOLOAD", autoload)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # _explain says it in one line
    one_node = args.nnodes == 1
    config = LaunchConfig(
        min_nodes=args.nnodes,
        max_nodes=args.nnodes,
        nproc_per_node=nproc,
        run_id=f"llm-adapt-{os.getpid()}" if one_node else "llm-adapt",
        rdzv_backend="c10d" if one_node else "static",
        rdzv_endpoint="127.0.0.1:0" if one_node else f"{args.master_addr}:{args.master_port}",
        rdzv_configs={"timeout": 900} if one_node else {"rank": args.node_rank, "timeout": 900},
        local_addr="127.0.0.1" if one_node else None,
        max_restarts=0,
        monitor_interval=0.1,
    )
    command = [
        sys.executable,
        "-m",
        "llm_adapt.cli.worker",
        *(["-m"] if args.is_module else []),
        args.script,
        *args.args,
    ]
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        return _explain(error, nproc * args.nnodes)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


def _put(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _explain(error: Any, world_size: int) -> int:
    """Say which rank failed first and how; return the script's exit code, 128 + N for signal N."""
    rank, failure = error.get_first_failure()
    if failure.exitcode == worker.REFUSED:  # the worker has shown the reason
        return failure.exitcode
    when = time.strftime("%H:%M:%S", time.localtime(failure.timestamp))
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        how = f"was killed by {name}"
    else:
        how = f"ended with exit code {failure.exitcode}"
    others = "" if world_size == 1 else f" The other {world_size - 1} rank(s) were stopped."
    print(f"llm-adapt: rank {rank} of {world_size} (pid {failure.pid}) {how} at {when}.{others}", file=sys.stderr)
    return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode
