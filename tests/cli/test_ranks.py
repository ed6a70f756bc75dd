"""Ranks given by torchrun, Slurm or OpenMPI."""

from __future__ import annotations

import itertools
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_adapt.cli.ranks import Ranks, local_rank, outer_ranks
from llm_adapt.errors import CommError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
# A real batch script's environment, where Slurm sets SLURM_PROCID=0 although nothing but the script was started ...
BATCH = {
    "SLURM_JOB_ID": "200505",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "gnode[09-10,20]",
}
# ... and what srun changes for each task of a step.
STEP = {
    **BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "3,1",
    "SLURM_STEP_NODELIST": "gnode[09-10]",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
}


BUSY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a test machine may be busy


def given_by(environ: dict[str, str]) -> Ranks:
    """The ranks that are there."""
    ranks = outer_ranks(environ)
    assert ranks is not None
    return ranks


def test_no_launcher_no_ranks() -> None:
    """Without a launcher's variables there are no outer ranks, whatever else is set."""
    assert outer_ranks({"WORLD_SIZE": "8", "MASTER_ADDR": "a", "SLURM_NTASKS": "4"}) is None


def test_torchrun() -> None:
    """torchrun's variables are taken as they are, the port is torch's default when none is given."""
    assert outer_ranks(TORCHRUN) == Ranks("torchrun", 3, 4, 1, 2, "a", 29500)
    assert outer_ranks({"RANK": "0", "WORLD_SIZE": "1"}) == Ranks("torchrun", 0, 1, 0, 1, "127.0.0.1", 29500)


def test_openmpi() -> None:
    """OpenMPI gives no address: across machines the user must, on one machine it is this one."""
    assert outer_ranks(OPENMPI | {"MASTER_ADDR": "b", "MASTER_PORT": "7"}) == Ranks("OpenMPI", 3, 4, 1, 2, "b", 7)
    here = OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert outer_ranks(here) == Ranks("OpenMPI", 3, 4, 1, 4, "127.0.0.1", 29500)
    with pytest.raises(CommError, match=r"4 ranks, 2 of them here, without MASTER_ADDR\. .* or pass --master-addr"):
        outer_ranks(OPENMPI)


def test_slurm() -> None:
    """A Slurm step meets at its first node, at a port that follows from the job, alike on all ranks."""
    assert outer_ranks(STEP) == Ranks("Slurm", 3, 4, 0, 1, "gnode09", 15000 + 200505 % 20000)
    assert outer_ranks({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}) == Ranks(
        "Slurm", 1, 2, 1, 2, "127.0.0.1", 29500
    )


def test_step_smaller_than_its_job() -> None:
    """A step's own variables win over those of the job it is a part of."""
    one = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    ranks = given_by(STEP | one)
    assert (ranks.world_size, ranks.local_world_size) == (1, 1)


def test_batch_script_is_no_rank() -> None:
    """In a batch script without srun nobody starts the other tasks: an error at once instead of a wait for them."""
    with pytest.raises(CommError, match=r"SLURM_NTASKS=4 and no SLURM_STEP_ID.*`srun llm-adapt run \.\.\.`.*--nproc"):
        outer_ranks(BATCH)
    assert given_by(BATCH | {"SLURM_NTASKS": "1"}).world_size == 1


def test_innermost_launcher_counts() -> None:
    """torchrun or mpirun inside a Slurm job gives the ranks, not Slurm."""
    for inner, source in ((TORCHRUN, "torchrun"), (OPENMPI | {"MASTER_ADDR": "a"}, "OpenMPI")):
        assert given_by(BATCH | inner).source == source


def test_environment_of_ranks() -> None:
    """Every launcher's ranks reach the script as the variables that torchrun sets."""
    assert Ranks("Slurm", 3, 4, 1, 2, "a", 7).environment() == TORCHRUN | {"MASTER_PORT": "7"}


@pytest.mark.parametrize("environ", [{}, TORCHRUN, OPENMPI, STEP], ids=["none", "torchrun", "OpenMPI", "Slurm"])
def test_local_rank_without_judgement(environ: dict[str, str]) -> None:
    """The local rank can be asked for where ranks may be wrong, as an error message does."""
    expected = {0: "", 5: "1", 4: "1"}.get(len(environ), "0")
    assert local_rank(environ) == expected


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"RANK": "4"}, "RANK=4 and WORLD_SIZE=4; a rank lies below the number of ranks"),
        ({"RANK": "-1"}, "RANK='-1' was found; a rank or size is a number"),
        ({"RANK": ""}, "RANK='' was found"),
        ({"WORLD_SIZE": "0"}, "RANK=3 and WORLD_SIZE=0"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE='four' was found"),
        ({"WORLD_SIZE": None}, "RANK=3 was found without WORLD_SIZE. Set both or none"),
        ({"LOCAL_RANK": "1.0"}, "LOCAL_RANK='1.0' was found"),
        ({"LOCAL_RANK": None}, r"--nnodes \$WORLD_SIZE and --node-rank \$RANK; else set LOCAL_RANK"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 among 2 ranks here and 4 in all, which cannot be"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_RANK=1 among 8 ranks here and 4 in all"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 was found; a port"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 was found; a port"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' was found"),
        ({"MASTER_ADDR": None}, "without MASTER_ADDR"),
    ],
)
def test_contradiction_is_told(change: dict[str, str | None], told: str) -> None:
    """Ranks that are incomplete, no numbers or impossible are an error that names the variable."""
    with pytest.raises(CommError, match=told):
        outer_ranks({name: value for name, value in (TORCHRUN | change).items() if value is not None})


def test_slurm_counts_that_are_none() -> None:
    """A tasks-per-node count that Slurm would not write is an error, and a huge one costs nothing."""
    with pytest.raises(CommError, match="SLURM_STEP_TASKS_PER_NODE='2,x' was found"):
        outer_ranks(STEP | {"SLURM_STEP_TASKS_PER_NODE": "2,x", "SLURM_NODEID": "1"})
    assert given_by(STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x999999999)"}).local_world_size == 2


@BUSY
@given(st.lists(st.integers(1, 99), min_size=1, max_size=20), st.data())
def test_tasks_of_a_node(counts: list[int], data: st.DataObject) -> None:
    """Slurm's short form of tasks per node is read as the list it stands for."""
    node = data.draw(st.integers(0, len(counts) - 1))
    runs = [(count, len(list(equal))) for count, equal in itertools.groupby(counts)]
    text = ",".join(str(count) if times == 1 else f"{count}(x{times})" for count, times in runs)
    place = {"SLURM_PROCID": "0", "SLURM_NODEID": str(node), "SLURM_STEP_NUM_TASKS": str(sum(counts))}
    assert given_by(STEP | place | {"SLURM_STEP_TASKS_PER_NODE": text}).local_world_size == counts[node]


GARBAGE = st.one_of(
    st.integers(-2, 9).map(str),
    st.text(string.printable, max_size=12),
    st.sampled_from(["2(x3),1", "n[1-3]", "1e3", "²", "9" * 5000]),
)


@BUSY
@given(st.dictionaries(st.sampled_from(sorted({*TORCHRUN, *OPENMPI, *STEP, "MASTER_PORT"})), GARBAGE))
def test_garbage_is_refused_or_makes_sense(environ: dict[str, str]) -> None:
    """Whatever the variables hold, the answer is none, a possible place in a job, or a short CommError."""
    try:
        ranks = outer_ranks(environ)
    except CommError as error:
        told = str(error)
    else:
        told = ""
        assert ranks is None or 0 <= ranks.rank < ranks.world_size
        assert ranks is None or 0 <= ranks.local_rank < ranks.local_world_size <= ranks.world_size
        assert ranks is None or 1 <= ranks.master_port <= 65535
    assert len(told) < 500
