"""Ranks given by an outer launcher: torchrun, Slurm's srun, or OpenMPI's mpirun."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llm_adapt.errors import CommError

__all__ = ["Ranks", "local_rank", "outer_ranks"]


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job, and who said so."""

    source: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int

    def environment(self) -> dict[str, str]:
        """The variables that torch.distributed's env:// and CUDA scripts read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


@dataclass(frozen=True)
class _Launcher:
    """Variables of one launcher; of several names the first that is set counts."""

    source: str
    rank: str
    world_size: tuple[str, ...]
    local_rank: str
    local_world_size: tuple[str, ...]


# Inside srun the SLURM_STEP_* variables are the step's own; the others may be left over from the whole job.
_LAUNCHERS = (
    _Launcher("torchrun", "RANK", ("WORLD_SIZE",), "LOCAL_RANK", ("LOCAL_WORLD_SIZE",)),
    _Launcher(
        "OpenMPI",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_SIZE",),
        "OMPI_COMM_WORLD_LOCAL_RANK",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Launcher(
        "Slurm",
        "SLURM_PROCID",
        ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
        "SLURM_LOCALID",
        ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
    ),
)


def local_rank(environ: Mapping[str, str]) -> str:
    """The local rank as an outer launcher wrote it, "" when there is none. Never raises."""
    launcher = next((one for one in _LAUNCHERS if one.rank in environ), None)
    return "" if launcher is None else environ.get(launcher.local_rank, "")


def outer_ranks(environ: Mapping[str, str]) -> Ranks | None:
    """Ranks that an outer launcher gave this process; None when there is none.

    Raises:
        CommError: the variables are incomplete or contradict each other.
    """
    launcher = next((one for one in _LAUNCHERS if one.rank in environ), None)
    if launcher is None:
        return None
    source, rank = launcher.source, _number(environ, launcher.rank)
    size = _first_set(launcher.world_size, environ)
    if size is None:
        raise CommError(
            f"{launcher.rank}={rank} was found without {launcher.world_size[0]}. Set both or none, or pass --nproc to "
            "ignore it."
        )
    world = _number(environ, size)
    if rank >= world:
        raise CommError(
            f"{source} gave {launcher.rank}={rank} and {size}={world}; a rank lies below the number of ranks. "
            "Correct or unset both, or pass --nproc to ignore them."
        )
    _check_started_by_srun(source, world, environ)
    local = _local_rank(launcher, rank, world, environ)
    local_world = _local_world(launcher, local, world, environ)
    address = environ.get("MASTER_ADDR") or (_first_slurm_node(environ) if source == "Slurm" else "")
    if not address and local_world < world:
        raise CommError(
            f"{source} started {world} ranks, {local_world} of them here, without MASTER_ADDR. "
            "Set it to the host of rank 0, or pass --master-addr."
        )
    port = _number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else _port_of_job(environ)
    if not 1 <= port <= 65535:
        raise CommError(f"MASTER_PORT={port} was found; a port is a number from 1 to 65535. Correct or unset it.")
    return Ranks(source, rank, world, local, local_world, address or "127.0.0.1", port)


def _check_started_by_srun(source: str, world: int, environ: Mapping[str, str]) -> None:
    """Refuse to wait for ranks that nobody starts: a batch script looks like rank 0 of all its tasks."""
    in_step = "SLURM_STEP_ID" in environ or "SLURM_STEPID" in environ
    if source == "Slurm" and world > 1 and "SLURM_JOB_ID" in environ and not in_step:
        raise CommError(
            f"Slurm gave SLURM_NTASKS={world} and no SLURM_STEP_ID: this is a batch script, not one of its tasks. "
            "Say `srun llm-adapt run ...` to start every task, or pass --nproc to start processes here."
        )


def _local_rank(launcher: _Launcher, rank: int, world: int, environ: Mapping[str, str]) -> int:
    if launcher.local_rank in environ:
        return _number(environ, launcher.local_rank)
    if world == 1:
        return 0
    size = launcher.world_size[0]
    raise CommError(
        f"{launcher.rank}={rank} and {size}={world} were found without {launcher.local_rank}. If they count machines, "
        f"pass --nproc, --nnodes ${size} and --node-rank ${launcher.rank}; else set {launcher.local_rank}."
    )


def _local_world(launcher: _Launcher, local: int, world: int, environ: Mapping[str, str]) -> int:
    """Ranks on this machine; without a word about it, all of them."""
    name = _first_set(launcher.local_world_size, environ)
    if name is None:
        size = world
    elif launcher.source == "Slurm":  # may speak of the whole job, of which this step is a part
        size = min(max(_tasks_here(name, environ), local + 1), world)
    else:
        size = _number(environ, name)
    if not local < size <= world:
        raise CommError(
            f"{launcher.source} gave {launcher.local_rank}={local} among {size} ranks here and {world} in all, which "
            "cannot be. Correct or unset its variables, or pass --nproc to ignore them."
        )
    return size


def _tasks_here(name: str, environ: Mapping[str, str]) -> int:
    """Tasks on this node: entry SLURM_NODEID of "2(x3),1", which says 2 on each of three nodes and 1 on the next."""
    node = _number(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else 0
    tasks = 0
    for part in environ[name].split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part)
        if match is None:
            raise _not_a_number(name, environ[name])
        tasks = int(match[1])
        node -= int(match[2] or 1)
        if node < 0:
            break
    return tasks


def _first_set(names: tuple[str, ...], environ: Mapping[str, str]) -> str | None:
    return next((name for name in names if name in environ), None)


def _number(environ: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", environ[name]):
        raise _not_a_number(name, environ[name])
    return int(environ[name])


def _not_a_number(name: str, text: str) -> CommError:
    return CommError(f"{name}={text[:80]!r} was found; a rank or size is a number. Correct or unset it.")


def _first_slurm_node(environ: Mapping[str, str]) -> str:
    """First host of SLURM_JOB_NODELIST ("node[03-05,9],x" -> node03); "" without the variable."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return "" if match is None else match[1] + (match[2] or "")


def _port_of_job(environ: Mapping[str, str]) -> int:
    """The same free-looking port on every rank of a Slurm job; 29500 elsewhere."""
    job = environ.get("SLURM_JOB_ID", "")
    return 15000 + int(job) % 20000 if re.fullmatch(r"[0-9]{1,18}", job) else 29500
