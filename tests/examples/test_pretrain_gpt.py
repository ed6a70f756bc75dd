"""examples/pretrain_gpt.py, an unchanged CUDA script, on the CPU: one loss curve in every layout, and no loss
of work when a rank is killed.

Each job is a real one (`llm-adapt run --nproc N`), so the tests share what they can: one uninterrupted run is
the reference for all, and each layout continues from its checkpoint of step 4.
"""

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

if any(find_spec(name) is None for name in ("torch", "megatron", "psutil")):
    pytest.skip("needs torch, megatron-core and psutil", allow_module_level=True)

pytestmark = pytest.mark.multiprocess

TINY = ("--layers", "2", "--hidden", "64", "--heads", "4", "--seq-length", "64", "--validation-samples", "16")
TINY += ("--global-batch-size", "16", "--micro-batch-size", "4", "--sample-bytes", "8", "--max-minutes", "0")
FIRST, LAST = 4, 24  # the layouts start from the checkpoint of step 4 and do 20 steps
NO_SAVES = ("--save-every", "0")


def assert_same_curve(expected: dict[int, float], actual: dict[int, float]) -> None:
    """20 steps, each within 1e-4 of the reference; says the largest difference where it is not so."""
    steps = range(FIRST + 1, LAST + 1)
    assert sorted(actual) == list(steps)
    differences = {step: abs(actual[step] - expected[step]) / expected[step] for step in steps}
    worst = max(differences, key=differences.get)
    assert differences[worst] < 1e-4, f"step {worst}: expected {expected[worst]}, got {actual[worst]}"


@pytest.fixture(scope="module")
def reference(run_example: Callable):
    """The uninterrupted run at TP=2, with a checkpoint every four steps."""
    return run_example(2, *TINY, "--steps", LAST, "--save-every", FIRST, "--keep", 9)


@pytest.fixture(scope="module")
def start_point(reference) -> Path:
    """Its checkpoint of step 4, saved at TP=2."""
    return reference.out / "checkpoints" / f"step_{FIRST:07d}"


# ---------------------------------------------------------------------------------- one run, and its results


def test_reference_learns_and_leaves_its_results(reference):
    """The loss falls, and every promised file is there."""
    losses = reference.losses()
    assert list(losses) == list(range(1, LAST + 1))
    assert losses[1] == pytest.approx(5.55, abs=0.1)
    assert losses[LAST] < losses[1] - 1
    names = {path.name for path in reference.out.iterdir()}
    assert names >= {"loss.jsonl", "sample.txt", "summary.json", "checkpoints"}
    assert ("loss.png" in names) == (find_spec("matplotlib") is not None)
    assert (reference.out / "sample.txt").read_text().startswith("def ")
    for words in ("tokens/s", "left", "validation loss", "TP=2 PP=1 DP=1"):
        assert words in reference.output()


def test_every_checkpoint_is_kept_whole_and_latest_names_the_last(reference):
    """Nothing half written is left, and `latest` is the end of training."""
    names = sorted(path.name for path in (reference.out / "checkpoints").iterdir())
    assert names == ["latest"] + [f"step_{step:07d}" for step in range(FIRST, LAST + 1, FIRST)]
    assert (reference.out / "checkpoints" / "latest").read_text().strip() == f"step_{LAST:07d}"


# ------------------------------------------------------------------- the same curve in every layout of ranks


@pytest.mark.parametrize(
    ("nproc", "flags"),
    [
        pytest.param(1, ["--tp", "1"], id="TP=1"),
        pytest.param(2, ["--tp", "1", "--pp", "2"], id="PP=2"),
        pytest.param(2, ["--tp", "1"], id="DP=2"),
        pytest.param(2, ["--tp", "2", "--sequence-parallel"], id="TP=2 with sequence parallel"),
        pytest.param(2, ["--tp", "2", "--recompute"], id="TP=2 with full recompute"),
        pytest.param(
            4,
            ["--tp", "2", "--pp", "2", "--sequence-parallel", "--recompute"],
            id="TP=2 PP=2 with both",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_layout_continues_the_curve(run_example, reference, start_point, nproc, flags):
    """Saved at TP=2, continued in another layout with the same global batch: the curve goes on the same."""
    job = run_example(nproc, *TINY, "--load", start_point, "--steps", LAST, *NO_SAVES, *flags)
    assert_same_curve(reference.losses(), job.losses())


# ------------------------------------------------------------------------------------ on simulated devices


@pytest.mark.parametrize("device", ["npu", "mlu", "dcu"])
def test_a_simulated_device_continues_the_curve(run_example, reference, start_point, device):
    """The CPU's checkpoint, continued at TP=2 on two simulated devices, in float32: the same losses within 1e-5."""
    flags = ("--load", start_point, "--steps", LAST, "--save-every", 10)
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to build a simulator")
    job = run_example(2, *TINY, *flags, simulate=device)
    expected = {step: loss for step, loss in reference.losses().items() if step > FIRST}
    assert job.losses() == pytest.approx(expected, rel=1e-5)
    assert "SIMULATED" in job.output()
    back = run_example(2, *TINY, "--load", job.out / "checkpoints" / "step_0000020", "--steps", LAST, *NO_SAVES)
    assert back.losses() == pytest.approx({step: expected[step] for step in range(21, LAST + 1)}, rel=1e-5)


@pytest.fixture(scope="module")
def plain_optimizer(run_example, start_point):
    """20 steps with a new optimizer, from the weights of the start point."""
    return run_example(2, *TINY, "--load", start_point, "--finetune", "--steps", 20, *NO_SAVES)


@pytest.mark.parametrize("tp", [2, 1], ids=["TP=2", "DP=2"])
def test_distributed_optimizer_changes_nothing(run_example, start_point, plain_optimizer, tp):
    """Sharding the optimizer's state over the data-parallel ranks does not touch the curve."""
    flags = ("--finetune", "--distributed-optimizer", "--steps", 20, *NO_SAVES, "--tp", tp)
    job = run_example(2, *TINY, "--load", start_point, *flags)
    assert job.losses() == pytest.approx(plain_optimizer.losses(), rel=1e-4)
    assert len(job.losses()) == 20


@pytest.mark.slow
def test_distributed_optimizer_state_changes_layout(run_example):
    """Saved sharded over DP=2, continued at TP=2: its state too is stored by its place in the whole model."""
    flags = ("--distributed-optimizer", "--steps", LAST)
    saved = run_example(2, *TINY, "--tp", 1, *flags, "--save-every", FIRST, "--keep", 9)
    start = saved.out / "checkpoints" / f"step_{FIRST:07d}"
    job = run_example(2, *TINY, "--tp", 2, *flags, *NO_SAVES, "--load", start)
    assert_same_curve(saved.losses(), job.losses())


@pytest.mark.slow
@pytest.mark.parametrize("layout", [["--tp", "2"], ["--tp", "1", "--distributed-optimizer"]])
def test_bf16_stays_near_the_fp32_curve(run_example, start_point, plain_optimizer, layout):
    """bfloat16 with float32 master weights follows the float32 curve within one percent."""
    flags = ("--finetune", "--bf16", "--steps", 20, *NO_SAVES, *layout)
    job = run_example(2, *TINY, "--load", start_point, *flags)
    assert job.losses() == pytest.approx(plain_optimizer.losses(), rel=1e-2)


# -------------------------------------------------------------------------------------- a rank that is killed


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(lambda job: max(job.losses(), default=0) >= 6, id="between saves"),
        pytest.param(
            lambda job: any((job.out / "checkpoints").glob("step_0000008.partial")),
            id="while saving",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_killed_rank_is_named_and_costs_no_saved_work(start_example, run_example, reference, moment):
    """The other rank ends, the error names the dead one, and resuming repeats the lost steps exactly."""
    flags = (*TINY, "--steps", LAST, "--save-every", FIRST, "--timeout-s", 60)
    job = start_example(2, *flags)
    job.wait_until(lambda: job.losses())
    first, second = job.rank(0), job.rank(1)
    job.wait_until(lambda: moment(job))
    second.kill()
    assert job.wait(timeout_s=90) != 0
    assert not first.is_running()
    assert max(job.losses()) < LAST, "the job was over before the kill; the test tested nothing"
    assert "rank 1 of 2" in job.output()
    assert "SIGKILL" in job.output()

    saved = int((job.out / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))
    assert FIRST <= saved < LAST
    resumed = run_example(2, *TINY, "--steps", LAST, *NO_SAVES, "--load", job.out)
    expected = {step: loss for step, loss in reference.losses().items() if step > saved}
    assert resumed.losses() == expected


# ---------------------------------------------------------------------------------------------- bad input


def assert_refused(job, *words: str) -> None:
    """The job ends soon with the script's code for bad input and one error line, which has these words."""
    assert job.wait(timeout_s=240) == 2, job.output()
    lines = [line for line in job.output().splitlines() if "pretrain_gpt.py: error:" in line]
    assert len(lines) == 1, job.output()
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in job.output()


def test_missing_data_file_is_refused(start_example):
    """A wrong --data ends all ranks with one line that names the file."""
    assert_refused(start_example(2, *TINY, "--data", "absent.txt"), "absent.txt", "no such file")


def test_incomplete_checkpoint_is_refused(start_example, start_point, tmp_path):
    """A checkpoint with a file cut short is found out before training, and the file is named."""
    broken = tmp_path / start_point.name
    shutil.copytree(start_point, broken)
    victim = sorted(broken.glob("*.distcp"))[0]
    victim.write_bytes(victim.read_bytes()[:-1])
    assert_refused(start_example(2, *TINY, "--load", broken), "not a whole checkpoint", victim.name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tp", "3"], ["--tp 3", "2 ranks"]),
        (["--load", "absent"], ["absent", "no checkpoint"]),
        (["--distributed-optimizer"], ["does not fit", "distributed_optimizer"]),
    ],
    ids=["layout", "no checkpoint", "other optimizer"],
)
def test_flags_that_do_not_fit_are_refused(start_example, start_point, flags, words):
    """Layouts, checkpoints and optimizers that cannot be are one line, on all ranks, with no hang."""
    load = () if "--load" in flags else ("--load", start_point)
    assert_refused(start_example(2, *TINY, *load, *flags), *words)


# -------------------------------------------------------------------------------------------- the main job


@pytest.mark.slow
def test_main_job_reaches_its_loss(run_example):
    """With its defaults the script trains at TP=2 for at most six minutes to under 1.9 nats per byte."""
    import json

    job = run_example(2)
    summary = json.loads((job.out / "summary.json").read_text())
    assert summary["layout"] == "TP=2 PP=1 DP=1"
    assert summary["seconds"] < 6.5 * 60
    assert summary["validation_loss"] < 1.9
