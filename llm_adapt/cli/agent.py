"""Several processes of one script under torchrun's agent, and one line about the first that fails."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm_adapt.adapters.activation import AUTOLOAD
from llm_adapt.cli.worker import LAUNCHER, REFUSED
from llm_adapt.errors import CommError, DeviceError

__all__ = ["launch"]

_RENDEZVOUS_TIMEOUT_S = 900
_POLL_S = 0.05  # shorter than a rank takes to die of another's death, so that the first to fail is known


def launch(args: argparse.Namespace, nproc: int, command: Sequence[str], variables: Mapping[str, str]) -> int:
    """Start the processes under torch's elastic agent and wait for them.

    Returns:
        the exit code of the first that failed, 128 + N when signal N killed it; 0 when all succeeded.

    Raises:
        DeviceError: torch cannot be imported.
        CommError: the machines of the job do not find each other.
    """
    _import_torch()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    host, port = args.master_addr or "127.0.0.1", args.master_port or 29500
    is_static = args.nnodes > 1 or args.master_addr is not None or args.master_port is not None
    with tempfile.TemporaryDirectory(prefix="llm-adapt-") as folder, _surroundings(nproc, variables, folder):
        config = LaunchConfig(
            min_nodes=args.nnodes,
            max_nodes=args.nnodes,
            nproc_per_node=nproc,
            run_id="llm-adapt",
            rdzv_backend="static" if is_static else "c10d",
            rdzv_endpoint=f"{host}:{port}" if is_static else "127.0.0.1:0",
            rdzv_configs={"rank": args.node_rank, "timeout": _RENDEZVOUS_TIMEOUT_S} if is_static else {},
            local_addr=None if is_static else "127.0.0.1",
            max_restarts=0,
            monitor_interval=_POLL_S,
        )
        try:
            elastic_launch(config, command[0])("-u", *command[1:])
        except ChildFailedError as error:
            return _explain(error.failures, nproc * args.nnodes)
        except SignalException as stop:
            return 128 + int(stop.sigval)
        except (RendezvousError, RuntimeError, OSError) as error:  # torch's DistError is a RuntimeError
            first_line = str(error).partition("\n")[0]
            raise CommError(
                f"{nproc * args.nnodes} processes were to meet at {host}:{port}; torch's agent failed: {first_line}\n"
                "Check --master-addr and --master-port, and that every machine was started."
            ) from None
    return 0


def _import_torch() -> None:
    """Import what the agent needs. It computes nothing: the workers load a vendor's plug-in, the launcher does not."""
    autoload = os.environ.get(AUTOLOAD)
    os.environ[AUTOLOAD] = "0"
    try:
        importlib.import_module("torch.distributed.launcher.api")
    except Exception as error:
        raise DeviceError(
            f"torch's launcher was asked for several processes, and `import torch` failed: {error}\n"
            "Run `llm-adapt doctor` for the cause and the mend."
        ) from error
    finally:
        _put(AUTOLOAD, autoload)
    elastic = logging.getLogger("torch.distributed.elastic")  # what it says in ten lines, _explain says in one
    elastic.addHandler(logging.NullHandler())
    elastic.propagate = False


@contextlib.contextmanager
def _surroundings(nproc: int, variables: Mapping[str, str], folder: str) -> Iterator[None]:
    """What the workers inherit, and where the agent leaves its files; put back at the end."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    added = {**variables, LAUNCHER: str(os.getpid())}
    if "OMP_NUM_THREADS" not in os.environ:  # torchrun sets 1, and warns
        added["OMP_NUM_THREADS"] = str(max(1, cores // nproc))
    before = {name: os.environ.get(name) for name in added}
    temporary, tempfile.tempdir = tempfile.tempdir, folder  # torch's agent never removes its folder
    os.environ.update(added)
    try:
        yield
    finally:
        tempfile.tempdir = temporary
        for name, value in before.items():
            _put(name, value)


def _put(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _explain(failures: Mapping[int, Any], world_size: int) -> int:
    """Say which rank failed first and how; return the job's exit code.

    The agent lists failures as it saw them, then those it stopped by SIGTERM. Of one second a rank killed by
    another signal comes first: the others may have died of its death.
    """
    rank, failure = min(failures.items(), key=lambda item: (item[1].timestamp, not _is_killed(item[1].exitcode)))
    code = failure.exitcode
    if code == REFUSED and failure.error_file_data.get("source") == "llm_adapt":
        print(f"llm-adapt: rank {rank} of {world_size}: {failure.message}", file=sys.stderr)
        return REFUSED
    how = f"ended with exit code {code}" if code >= 0 else f"was killed by {_signal_name(-code)}"
    others = "" if world_size == 1 else "; the others were stopped"
    when = time.strftime("%H:%M:%S", time.localtime(failure.timestamp))
    print(f"llm-adapt: rank {rank} of {world_size} (pid {failure.pid}) {how} at {when}{others}.", file=sys.stderr)
    return 128 - code if code < 0 else int(code)


def _is_killed(code: int) -> bool:
    return code < 0 and code != -signal.SIGTERM


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
