"""What the benchmark counts and how it judges: bytes, operations, order statistics, cases and counterparts."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections import Counter
from typing import Any

import pytest
import torch

from llm_adapt.cli.bench.candidates import _eager
from llm_adapt.cli.bench.cases import CASES, SWEEP, Case, cases_of, without_case
from llm_adapt.cli.bench.counterparts import WITHOUT, eager_of
from llm_adapt.cli.bench.counts import FORMULAS, Counts, bytes_of, count, pairs_seen
from llm_adapt.cli.bench.machine import Machine
from llm_adapt.cli.bench.results import Row, is_slower
from llm_adapt.cli.bench.timing import HostClock, interval, ratio, take_turns
from llm_adapt.ops.dispatch.choice import refusal
from llm_adapt.ops.dispatch.dispatcher import dispatchers
from llm_adapt.ops.dispatch.proof import differentiable, named_tensors
from llm_adapt.ops.dispatch.registry import FusedOp, all_ops, op_names


def counted(name: str, **given: Any) -> Counts:
    """The counts of a call of the reference, with every gradient asked for."""
    op = all_ops()[name]
    arguments = op.bind(**given)
    wanted = [tensor.requires_grad_() for _, tensor in differentiable(op, arguments)]
    outputs = [value for _, value in named_tensors("", op.reference(**arguments))]
    found = count(op, arguments, outputs, wanted)
    assert found is not None
    return found


def zeros(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of these sizes."""
    return torch.zeros(sizes, dtype=dtype)


# Of tensors of 2 x 3 float32 = 24 bytes, a weight of 3 = 12 bytes; by hand.
def test_rms_norm() -> None:
    """Reads x and weight, writes y; backward reads x, weight and dy, writes dx and dweight; 4 operations each."""
    assert counted("rms_norm", x=zeros(2, 3), weight=zeros(3)) == Counts(24 + 12 + 24, 36 + 24 + 36, 24, 48)


def test_add_rms_norm() -> None:
    """Reads two, writes two; backward reads y and h again, the weight and both gradients, and writes three."""
    found = counted("add_rms_norm", x=zeros(2, 3), residual=zeros(2, 3), weight=zeros(3))
    assert found == Counts(24 + 24 + 12 + 48, 48 + 12 + 48 + 24 + 24 + 12, 30, 60)


def test_glu_of_bfloat16() -> None:
    """A packed x of 2 x 8 in two bytes an element: y has half of it; 5 operations for each result."""
    found = counted("glu", x=zeros(2, 8, dtype=torch.bfloat16))
    assert found == Counts(32 + 16, 32 + 16 + 32, 40, 80)


def test_attention_counts_the_pairs_that_are_seen() -> None:
    """Four queries and keys see 10 pairs: 2 (8 + 8) operations each, for 2 heads."""
    q, k, v = zeros(1, 4, 2, 8), zeros(1, 4, 1, 8), zeros(1, 4, 1, 8)
    found = counted("attention", q=q, k=k, v=v, causal="bottom_right")
    assert (found.forward_flops, found.backward_flops) == (2 * 2 * 10 * 16, 4 * 2 * 10 * 16)
    assert found.forward_bytes == 256 + 128 + 128 + 256
    assert found.backward_bytes == (256 + 128 + 128 + 256) + 256 + (256 + 128 + 128)
    assert counted("attention", q=q, k=k, v=v).forward_flops == 2 * 2 * 16 * 16


def test_pairs() -> None:
    """One new query sees all keys; more queries than keys leave the first ones without any."""
    assert [pairs_seen(*sizes, True) for sizes in ((1, 9), (3, 3), (2, 4), (4, 2))] == [9, 6, 7, 3]
    assert pairs_seen(3, 5, False) == 15


def test_decode_attention_reads_the_cached_keys_alone() -> None:
    """Of a cache of 8 rows with 2 in use a quarter is read."""
    cache = zeros(1, 8, 1, 4)
    given = {"q": zeros(1, 1, 2, 4), "cache_seqlens": torch.tensor([2], dtype=torch.int32)}
    found = counted("decode_attention", k_cache=cache, v_cache=cache.clone(), **given)
    assert found == Counts(32 + 4 + 2 * 32 + 32, 0, 2 * 2 * 2 * 8, 0)


def test_products() -> None:
    """2MKN: of one product, of the experts' rows, and with 3 for each logit of a loss."""
    x, w = zeros(5, 8), zeros(16, 8)
    assert counted("linear_fp8", x=x, weight=w).forward_flops == 2 * 5 * 8 * 16
    counts = torch.tensor([3, 1])  # of 5 rows: the last belongs to nobody
    assert (
        counted("grouped_gemm", x=x, weight=zeros(2, 8, 16), tokens_per_expert=counts).forward_flops == 2 * 4 * 8 * 16
    )
    target = torch.zeros(5, dtype=torch.int64)
    found = counted("fused_linear_cross_entropy", hidden=x, weight=w, target=target)
    assert found.forward_flops == 5 * 16 * (2 * 8 + 3)


def test_what_is_changed_in_place_is_read_and_written() -> None:
    """wgrad reads x, dy and main_grad and writes main_grad; adamw writes no gradient; a scale reads no output."""
    found = counted("wgrad_accumulate", x=zeros(5, 3), dy=zeros(5, 2), main_grad=zeros(2, 3))
    assert found == Counts(60 + 40 + 24 + 24, 0, 2 * 5 * 3 * 2, 0)
    lists = {name: [zeros(2, 3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    assert counted("adamw", **lists).forward_bytes == 4 * 24 + 3 * 24
    assert counted("multi_tensor_scale", tensors=[zeros(2, 3)], outputs=[zeros(2, 3)]).forward_bytes == 48


def test_an_expanded_tensor_counts_once() -> None:
    """What lies in memory once is read once; an empty tensor is nothing."""
    assert bytes_of(zeros(1, 3).expand(4, 3)) == 12
    assert bytes_of([zeros(0, 3), zeros(2)]) == 8


def test_every_op_is_there() -> None:
    """Each op of ours has a case, a formula, and a counterpart or the reason why there is none."""
    assert without_case() == []
    assert set(op_names()) - set(FORMULAS) == set()
    assert {name for name in op_names() if not eager_of(name)} == set(WITHOUT)


@pytest.mark.parametrize("case", [*CASES, SWEEP[0]], ids=lambda case: f"{case.op}-{case.model}")
def test_a_case_is_a_call_that_eager_takes(case: Case) -> None:
    """Its sizes fit the axes, the reference takes it, something is counted, and a formulation does not refuse it."""
    op = all_ops()[case.op]
    assert {len(case.axes)} == {len(sizes) for sizes in (case.full, case.cpu, case.quick)}
    for scale in ("cpu", "quick"):
        assert all(a <= b for a, b in zip(case.sizes(scale), case.full, strict=True))
    arguments = case.arguments(op, torch.float32, "quick")
    outputs = [value for _, value in named_tensors("", op.reference(**arguments))]
    found = count(op, arguments, outputs)
    assert found is not None
    assert found.forward_bytes > 0
    call = dispatchers[op.name].describe(arguments)
    answers = [refusal(op, kernel, call) for kernel in eager_of(op.name)]
    assert "" in answers or op.name in WITHOUT, answers


def test_an_op_of_somebody_else_is_its_own_example() -> None:
    """An op that is not listed is called with its example, narrowed along the first axes."""

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
        return {"x": torch.randn(shape, generator=generator).to(dtype)}

    op = FusedOp(doubled, lambda g, d: iter([{"x": torch.ones(2)}]), example=example, sizes={"big": (64, 64, 4096)})
    (case,) = cases_of(op)
    assert (case.sizes("full"), case.sizes("cpu"), case.sizes("quick")) == (
        (64, 64, 4096),
        (8, 64, 4096),
        (1, 64, 4096),
    )
    assert case.scaled("quick") == "axis 0 1 of 64"
    assert case.arguments(op, torch.bfloat16, "quick")["x"].shape == (1, 64, 4096)
    assert count(op, op.bind(x=torch.ones(2)), [torch.ones(2)]) is None


def test_order_statistics() -> None:
    """Of 6 values smallest and largest enclose the median with 95 %, of 18 the 5th and the 14th, of 20 the 6th ..."""
    assert interval([5, 1, 3, 2, 6, 4]) == (3.5, 1, 6)
    assert interval(list(range(1, 21))) == (10.5, 6, 15)
    assert interval(list(range(1, 19))) == (9.5, 5, 14)
    assert interval([7.0]) == (7.0, 7.0, 7.0)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    """Over many samples of a skewed distribution the true median is inside at least 95 times of 100."""
    draw = random.Random(0)
    true = 0.6931471805599453  # of the exponential distribution
    inside = 0
    for _ in range(2000):
        found = interval([draw.expovariate(1.0) for _ in range(15)])
        inside += found.low <= true <= found.high
    assert inside >= 0.95 * 2000


def test_ratios_are_formed_round_by_round() -> None:
    """A drift that falls on both leaves the ratio as it is."""
    drift = [1.0, 2.0, 5.0, 3.0, 1.0, 9.0, 4.0]
    assert ratio([2 * item for item in drift], drift) == (2.0, 2.0, 2.0)


def test_candidates_take_turns() -> None:
    """In every round each is called, and nobody always follows the same one."""
    order: list[str] = []

    class Counting(HostClock):
        def sample(self, act: Any, calls: int) -> float:
            act()
            return 1.0

    acts = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = take_turns(acts, Counting(), budget_s=60.0, most_rounds=30)
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abc", 30)
    rounds = ["".join(order[place : place + 3]) for place in range(6, 96, 3)]  # behind the first calls
    assert {"".join(sorted(turns)) for turns in rounds} == {"abc"}
    followed = Counter(pair for turns in rounds for pair in itertools.pairwise(turns))
    assert set(followed) == set(itertools.permutations("abc", 2))
    assert max(followed.values()) < 20  # of 30 rounds
    fewest = take_turns(acts, Counting(), budget_s=0.0)
    assert {name: len(values) for name, values in fewest.items()} == dict.fromkeys("abc", 6)


def test_a_sample_does_not_pay_for_the_candidate_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of a sample on the host is not in the mean."""
    clock, costs = [0.0], iter([100.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def act() -> None:
        clock[0] += next(costs)

    assert HostClock().sample(act, 3) == 2.0


@pytest.mark.parametrize(
    ("seconds", "low", "high", "slower"),
    [
        (1.0, 0.90, 0.95, True),  # 5 % slower at best
        (1.0, 0.90, 0.985, False),  # within the margin of 2 %
        (1.0, 0.90, 1.01, False),  # the interval holds 1
        (10e-6, 0.90, 0.93, False),  # 0.7 us of 10: what dispatch costs
    ],
)
def test_who_is_slower(seconds: float, low: float, high: float, slower: bool) -> None:
    """Beyond the interval, the margin and the cost of a dispatched call; nothing else counts."""
    row = Row("op", "model", "", "", "float32", "forward", "dispatched", "lib", "", seconds, ratio=low, ratio_low=low)
    assert is_slower(dataclasses.replace(row, ratio_high=high), 0.02) is slower


def test_peak_memory_on_the_cpu() -> None:
    """Two tensors of 4 MiB that live together are 8 MiB, three that follow one another not more."""
    machine = Machine("cpu", "CPU")
    x = torch.ones(1024, 1024)
    assert machine.peak_bytes(lambda: (x * 2, x * 3)) == pytest.approx(8 * 2**20, rel=0.01)
    assert machine.peak_bytes(lambda: [float((x * 2).sum()) for _ in range(3)]) == pytest.approx(4 * 2**20, rel=0.01)
    assert machine.peak_bytes(lambda: x.add_(1)) < 1024


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.model}")
def test_eager_computes_what_the_op_does(case: Case, dtype: torch.dtype) -> None:
    """The formulation that is timed for each case holds its proof, outputs and gradients, in both dtypes."""
    op = all_ops()[case.op]
    arguments = case.arguments(op, dtype, "quick")
    found, _ = _eager(op, dispatchers[op.name].describe(arguments), arguments)
    assert bool(found.refused) == (op.name in WITHOUT), found.refused
