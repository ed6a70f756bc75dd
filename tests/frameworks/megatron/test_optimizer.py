"""Megatron's Adam by the operator adamw: its numbers, its state, and Megatron's optimizers around it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapt.adapters.cpu import ADAPTER
from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron import checkpoints
from llm_adapt.frameworks.megatron import optimizer as megatron_adam
from llm_adapt.frameworks.megatron.optimizer import instead_of_torch, not_torch, torch_for_offload
from llm_adapt.report import Report
from llm_adapt.settings import Settings
from tests.frameworks.megatron import optimizer_checks
from tests.parallel.on_ranks import CHECKS, outcomes

NAMES = [name for name, function in CHECKS.items() if function.__module__ == optimizer_checks.__name__]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Outcome of every check with Megatron's own optimizers."""
    script = Path(optimizer_checks.__file__)
    return outcomes(script, 1, tmp_path_factory.mktemp("optimizer"), ["--ops", "off"])


@pytest.mark.parametrize("name", NAMES)
def test_in_megatron(found: dict[str, str], name: str) -> None:
    """Each check of optimizer_checks.py holds; its docstring says what it is."""
    assert found[name] == "", found[name]


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    """A matrix, a vector, a number and an empty tensor, the same at each call."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((5, 3), (7,), (), (0, 2))
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def run(optimizer: torch.optim.Optimizer, held: list[torch.nn.Parameter], steps: range, idle: int = -1) -> None:
    """Some steps with gradients that depend on the step alone; one parameter has none at odd steps."""
    for number in steps:
        generator = torch.Generator().manual_seed(100 + number)
        for index, p in enumerate(held):
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if index == idle and number % 2 else grad
        optimizer.step()


def same(found: list[torch.nn.Parameter], expected: list[torch.nn.Parameter], tolerance: float = 2e-6) -> None:
    """The same numbers."""
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    decoupled=st.booleans(),
    amsgrad=st.booleans(),
    decay=st.sampled_from([0.0, 0.1]),
    betas=st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.0, 0.5)]),
    idle=st.sampled_from([-1, 1]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_twenty_steps_are_those_of_torch(
    decoupled: bool, amsgrad: bool, decay: float, betas: tuple[float, float], idle: int, dtype: torch.dtype
) -> None:
    """Parameters, moments and steps are those of torch.optim.AdamW and Adam, also of a parameter that is left out."""
    options: dict[str, Any] = {"lr": 0.02, "betas": betas, "weight_decay": decay, "amsgrad": amsgrad}
    ours, theirs = parameters(dtype), parameters(dtype)
    fused = megatron_adam.FusedAdam(ours, adam_w_mode=decoupled, **options)
    plain = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **options)
    for optimizer, held in ((fused, ours), (plain, theirs)):
        run(optimizer, held, range(20), idle)
    # torch rounds to bfloat16 after each operation, the operator once: they drift apart by roundings of a step.
    same(ours, theirs, 2e-5 if dtype != torch.bfloat16 else 0.2)
    for mine, other in zip(fused.state.values(), plain.state.values(), strict=True):
        assert list(mine) == list(other)
        assert mine["step"] == other["step"]
        assert mine["step"].dtype == other["step"].dtype
        if dtype != torch.bfloat16:
            torch.testing.assert_close(mine, other)
    assert fused.state_dict()["param_groups"] == plain.state_dict()["param_groups"]


@pytest.mark.parametrize("writer", ["FusedAdam", "AdamW"])
def test_a_state_is_read_by_the_other_optimizer(writer: str) -> None:
    """What either of FusedAdam and AdamW writes, both read, and they go on as if nothing had happened."""
    kinds: dict[str, Any] = {"FusedAdam": megatron_adam.FusedAdam, "AdamW": torch.optim.AdamW}
    held = parameters()
    optimizer = kinds[writer](held, lr=0.02, weight_decay=0.1)
    run(optimizer, held, range(3))
    saved = pickle.loads(pickle.dumps((optimizer.state_dict(), [p.detach() for p in held])))
    run(optimizer, held, range(3, 6))
    for reader in kinds.values():
        again = [torch.nn.Parameter(p.clone()) for p in saved[1]]
        optimizer = reader(again, lr=0.5)
        optimizer.load_state_dict(copy.deepcopy(saved[0]))
        run(optimizer, again, range(3, 6))
        same(again, held)


def test_a_state_of_apex_is_read() -> None:
    """Its step is a number in the group, and its groups say nothing of decay: this goes on as AdamW at that step."""
    held, theirs = parameters(), parameters()
    plain = torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.1)
    run(plain, theirs, range(3))
    state = plain.state_dict()
    (group,) = state["param_groups"]
    kept = ("lr", "betas", "eps", "weight_decay", "params")
    groups = [{name: group[name] for name in kept} | {"bias_correction": True, "step": 3}]
    moments = {index: {name: s[name] for name in ("exp_avg", "exp_avg_sq")} for index, s in state["state"].items()}
    fused = megatron_adam.FusedAdam(held, lr=0.5)
    fused.load_state_dict({"state": copy.deepcopy(moments), "param_groups": groups})
    with torch.no_grad():
        for mine, other in zip(held, theirs, strict=True):
            mine.copy_(other)
    for optimizer, tensors in ((fused, held), (plain, theirs)):
        run(optimizer, tensors, range(3, 6))
    same(held, theirs)
    assert {float(s["step"]) for s in fused.state.values()} == {6.0}


def test_one_step_tensor_of_all_parameters_is_counted_once() -> None:
    """Megatron loads one tensor as the step of every parameter."""
    held, theirs = parameters(), parameters()
    fused, plain = megatron_adam.FusedAdam(held, lr=0.02), torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.0)
    for optimizer, tensors in ((fused, held), (plain, theirs)):
        run(optimizer, tensors, range(2))
    shared = torch.tensor(2.0)
    for kept in fused.state.values():
        kept["step"] = shared
    for optimizer, tensors in ((fused, held), (plain, theirs)):
        run(optimizer, tensors, range(2, 4))
    assert {float(kept["step"]) for kept in fused.state.values()} == {4.0}
    same(held, theirs)


def test_moments_that_megatron_made_before_loading_are_used() -> None:
    """A state with moments and no step, and none in the group, begins at the first step."""
    held, theirs = parameters(), parameters()
    fused, plain = megatron_adam.FusedAdam(held, lr=0.02), torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.0)
    for p in held:
        fused.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    for optimizer, tensors in ((fused, held), (plain, theirs)):
        run(optimizer, tensors, range(2))
    same(held, theirs)


def test_bias_correction_can_be_left_out() -> None:
    """Without it the first step is lr * (1 - beta1) g / (sqrt((1 - beta2) g^2) + eps), also after a copy."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    fused = copy.deepcopy(megatron_adam.FusedAdam([p], lr=0.1, bias_correction=False, eps=1e-3))
    (held,) = fused.param_groups[0]["params"]
    held.grad = g = torch.tensor([0.5, 3.0])
    fused.step()
    expected = p.detach() - 0.1 * 0.1 * g / ((0.001 * g * g).sqrt() + 1e-3)
    torch.testing.assert_close(held.detach(), expected)


def test_groups_have_their_own_numbers_and_a_closure_is_called() -> None:
    """Each group has its lr and decay, a tensor as lr is a number, and step returns what the closure returns."""
    ours, theirs = parameters(), parameters()

    def groups(held: list[torch.nn.Parameter], lr: Any) -> list[dict[str, Any]]:
        return [{"params": held[:1], "lr": lr, "weight_decay": 0.5}, {"params": held[1:], "betas": (0.5, 0.6)}]

    fused = megatron_adam.FusedAdam(groups(ours, torch.tensor(0.3)), lr=0.01)
    plain = torch.optim.AdamW(groups(theirs, 0.3), lr=0.01, weight_decay=0.0)
    for optimizer, held in ((fused, ours), (plain, theirs)):
        run(optimizer, held, range(4))
    same(ours, theirs)
    assert fused.step(lambda: torch.is_grad_enabled()) is True
    fused.zero_grad()
    assert [p.grad for p in ours] == [None] * 4


@pytest.mark.parametrize("name", ["master_weights", "exp_avg_dtype", "use_decoupled_grad", "capturable", "unknown"])
def test_what_it_does_not_do_is_refused(name: str) -> None:
    """Arguments of TransformerEngine and apex that change what is computed are errors, not dropped."""
    with pytest.raises(TypeError, match=name):
        megatron_adam.FusedAdam(parameters(), **{name: True})
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([1.0]), (3,))
    with pytest.raises(RuntimeError, match="dense"):
        megatron_adam.FusedAdam([p]).step()


def test_a_real_fused_adam_is_left_alone() -> None:
    """Only torch's AdamW is replaced; another optimizer serves, with a line in the report."""

    class Real(torch.optim.SGD):
        pass

    report = Report()
    assert instead_of_torch(report)(torch.optim.AdamW) is megatron_adam.FusedAdam
    assert report.lines == []
    assert instead_of_torch(report)(Real) is Real
    (line,) = report.lines
    assert line.subject == "megatron Adam"
    assert line.choice.endswith("Real")
    assert not_torch(True) is False


def test_offload_is_given_torchs_adamw() -> None:
    """HybridDeviceOptimizer gets AdamW in the place of FusedAdam, and any other class as it is."""
    given: list[Any] = []

    def original(self: Any, params: Any, **kwargs: Any) -> None:
        given.append(kwargs["gpu_optimizer_cls"])

    for kind in (megatron_adam.FusedAdam, torch.optim.SGD):
        torch_for_offload(original)(None, [], gpu_optimizer_cls=kind)
    assert given == [torch.optim.AdamW, torch.optim.SGD]


def test_rows_are_planned_by_the_setting() -> None:
    """ops="off" leaves Megatron's optimizers; the loading of their checkpoints is repaired all the same."""
    on, off = (Context(ADAPTER, Settings(ops=ops), Report()) for ops in (None, "off"))
    assert [row.target.rpartition(":")[2] for row in megatron_adam.rows(on)] == [
        "Adam",
        "USING_PYTORCH_OPTIMIZER",
        "HybridDeviceOptimizer.__init__",
    ]
    assert megatron_adam.rows(off) == []
    assert len(checkpoints.rows(off)) == 2
