"""Ranks given by an outer launcher: torchrun, Slurm's srun, or OpenMPI's mpirun."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llm_adapt.errors import CommError

__all__ = ["Ranks", "outer_ranks"]


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


# launcher -> variables for rank, world size, local rank, local world size
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "OpenMPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}


def outer_ranks(environ: Mapping[str, str]) -> Ranks | None:
    """Ranks that an outer launcher gave this process; None when there is none.

    Raises:
        CommError: the variables are incomplete or contradict each other.
    """
    for source, names in _LAUNCHERS.items():
        if names[0] in environ and names[1] in environ:
            return _checked(source, names, environ)
    return None


def _checked(source: str, names: tuple[str, str, str, str], environ: Mapping[str, str]) -> Ranks:
    rank, world = _number(environ, names[0]), _number(environ, names[1])
    if not 0 <= rank < world:
        raise CommError(f"{source} gave {names[0]}={rank} and {names[1]}={world}; a rank lies below the world size.")
    local_rank = _number(environ, names[2], default=rank if world == 1 else None)
    local_world = _number(environ, names[3], default=world if source == "torchrun" else 1)
    if source == "Slurm":
        local_world = max(local_world, local_rank + 1)
    one_node = local_world >= world
    address = environ.get("MASTER_ADDR") or (_first_slurm_node(environ) if source == "Slurm" else "")
    if not address and not one_node:
        raise CommError(
            f"{source} started {world} ranks on several nodes without MASTER_ADDR. Set it to rank 0's host."
        )
    port = _number(environ, "MASTER_PORT", default=_port_of_job(environ))
    return Ranks(source, rank, world, local_rank, local_world, address or "127.0.0.1", port)


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    match = re.match(r"(\d+)(\(x\d+\))?(,.*)?\Z", text)  # Slurm writes "2(x3),1" for tasks per node
    if match is None:
        raise CommError(f"{name}={text!r} was found; a rank or size is a number. Correct or unset it.")
    return int(match[1])


def _first_slurm_node(environ: Mapping[str, str]) -> str:
    """First host of SLURM_JOB_NODELIST ("node[03-05,9],x" -> node03); "" without the variable."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return "" if match is None else match[1] + (match[2] or "")


def _port_of_job(environ: Mapping[str, str]) -> int:
    """The same free-looking port on every rank of a Slurm job; 29500 elsewhere."""
    job = environ.get("SLURM_JOB_ID", "")
    return 15000 + int(job) % 20000 if job.isdigit() else 29500
