"""adamw: against the optimizers of torch in all their forms over several steps, its laws and its guards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapt.ops.adamw import _shrink, adamw
from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy

SHAPES = ((3, 5), (7,), (), (0, 2))
HYPER = {"lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}


def draw(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """A list of tensors that are the same at each run."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sizes, generator=generator).to(dtype) for sizes in SHAPES]


def state(dtype: torch.dtype = torch.float32) -> dict[str, list[torch.Tensor]]:
    """Parameters of random values, a gradient, and moments of zero."""
    zeros = [[torch.zeros_like(item) for item in draw(0, dtype)] for _ in range(2)]
    return {"params": draw(0, dtype), "grads": draw(1, dtype), "exp_avgs": zeros[0], "exp_avg_sqs": zeros[1]}


def copies(lists: dict[str, Any]) -> dict[str, Any]:
    """The same with tensors of their own."""
    return {k: [item.clone() for item in v] if isinstance(v, list) else v for k, v in lists.items()}


def close(found: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Every tensor of the lists agrees, as far as roundings of the dtype allow."""
    tolerance = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-5, 1e-6), torch.bfloat16: (2.0**-5, 2.0**-6)}[dtype]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=tolerance[0], atol=tolerance[1])


@pytest.mark.parametrize("library", ["reference", "torch_native"])
@pytest.mark.parametrize("form", ["loop", "foreach", "fused"])
@settings(max_examples=8, deadline=None)
@given(
    decoupled=st.booleans(),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
    counted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    steps=st.integers(1, 4),
)
def test_it_steps_as_torch_does(
    form: str,
    library: str,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
    counted: bool,
    dtype: torch.dtype,
    weight_decay: float,
    steps: int,
) -> None:
    """Parameters and moments are those of torch.optim.AdamW or Adam after several steps, in every form of theirs."""
    theirs = [torch.nn.Parameter(item) for item in draw(0, dtype)]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay, "maximize": maximize}
    optimizer = kind(theirs, amsgrad=amsgrad, foreach=form == "foreach", fused=form == "fused", **options)
    ours: dict[str, Any] = state(dtype)
    ours |= {"max_exp_avg_sqs": [torch.zeros_like(item) for item in ours["params"]]} if amsgrad else {}
    ours |= {"state_steps": [torch.tensor(0.0) for _ in SHAPES]} if counted else {}
    for step in range(1, steps + 1):
        ours["grads"] = draw(step, dtype)
        for parameter, gradient in zip(theirs, ours["grads"], strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        hyper = HYPER | {"weight_decay": weight_decay} | ({} if counted else {"step": step})
        with using(Policy(choose={"adamw": library})):
            adamw(**ours, **hyper, decoupled=decoupled, maximize=maximize)
    if counted:
        assert [int(item) for item in ours["state_steps"]] == [steps] * len(SHAPES)
    kept = [optimizer.state[parameter] for parameter in theirs]
    close(ours["exp_avgs"], [item["exp_avg"] for item in kept], dtype)
    close(ours["exp_avg_sqs"], [item["exp_avg_sq"] for item in kept], dtype)
    if amsgrad:
        close(ours["max_exp_avg_sqs"], [item["max_exp_avg_sq"] for item in kept], dtype)
    close(ours["params"], theirs, dtype)


@pytest.mark.parametrize("library", ["reference", "torch_native"])
def test_scaled_gradients_are_those_of_the_fused_form(library: str) -> None:
    """grad_scale divides the gradients, which are stored divided, as torch's fused kernel does."""
    ours, theirs = state(), state()
    steps = [torch.tensor(1.0) for _ in SHAPES]
    scale, good = torch.tensor(8.0), torch.tensor(0.0)
    torch._fused_adamw_(
        *theirs.values(), [], steps, **HYPER, amsgrad=False, maximize=True, grad_scale=scale, found_inf=good
    )
    with using(Policy(choose={"adamw": library})):
        adamw(**ours, **HYPER, maximize=True, grad_scale=scale, found_inf=good)
    for name in ours:
        close(ours[name], theirs[name])
    assert torch.equal(ours["grads"][0], draw(1)[0] / 8)


@pytest.mark.parametrize("library", ["reference", "torch_native"])
@pytest.mark.parametrize("found", [1.0, 2.0])
def test_an_overflow_skips_the_step_entirely(library: str, found: float) -> None:
    """Where found_inf is not 0, not a bit of anything changes: not a gradient, not the count of steps."""
    lists: dict[str, Any] = {**state(), "state_steps": [torch.tensor(3.0) for _ in SHAPES]}
    lists["grads"][0][0, 0] = float("inf")
    before = copies(lists)
    flag = torch.tensor([found])
    with using(Policy(choose={"adamw": library})):
        adamw(**lists, **HYPER, grad_scale=torch.tensor(2.0), found_inf=flag)
    assert all(torch.equal(a, b) for name in lists for a, b in zip(lists[name], before[name], strict=True))
    assert flag.item() == found


def test_master_parameters_are_stepped_and_the_parameters_are_their_copies() -> None:
    """Updates too small for bfloat16 add up in the float32 masters, whose roundings the parameters are."""
    masters = draw(0)
    ours: dict[str, Any] = {
        **state(),
        "params": [item.bfloat16() for item in masters],
        "grads": draw(1, torch.bfloat16),
        "master_params": [item.clone() for item in masters],
    }
    plain = {**state(), "params": masters, "grads": [item.float() for item in ours["grads"]]}
    for step in (1, 2, 3):
        adamw(**ours, **HYPER | {"lr": 1e-4}, step=step)
        adamw(**plain, **HYPER | {"lr": 1e-4}, step=step)
    close(ours["master_params"], plain["params"])
    assert all(torch.equal(p, m.bfloat16()) for p, m in zip(ours["params"], ours["master_params"], strict=True))


def test_without_bias_correction_the_moments_are_used_as_they_are() -> None:
    """p - lr * m / (sqrt(v) + eps), by hand."""
    lists = state()
    expected = [
        p - 0.1 * (0.1 * g) / ((0.001 * g * g).sqrt() + 1e-8)
        for p, g in zip(lists["params"], lists["grads"], strict=True)
    ]
    adamw(**lists, lr=0.1, bias_correction=False)
    close(lists["params"], expected)


def test_a_counted_step_is_as_exact_as_a_number() -> None:
    """1 - 0.999^t of a float32 tensor keeps its digits: both ways of counting give the same parameters."""
    by_number, by_tensor = state(), state()
    adamw(**by_number, lr=1.0, step=2)
    adamw(**by_tensor, lr=1.0, state_steps=[torch.tensor(1.0) for _ in SHAPES])
    for found, expected in zip(by_tensor["params"], by_number["params"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.02},
        {"beta1": 0.5},
        {"beta1": 0.0},
        {"beta2": 0.5},
        {"eps": 0.1},
        {"weight_decay": 0.2},
        {"step": 2},
        {"decoupled": False},
        {"maximize": True},
        {"bias_correction": False},
        {"max_exp_avg_sqs": [torch.full(sizes, 9.0) for sizes in SHAPES]},
        {"state_steps": [torch.tensor(4.0)] * 4},
        {"grad_scale": torch.tensor(1e4)},
        {"found_inf": torch.tensor(1.0)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_option_changes_the_result(change: dict[str, Any]) -> None:
    """No option is without effect."""
    found, base = state(), state()
    adamw(**found, **(HYPER | copies(change)))
    adamw(**base, **HYPER)
    assert any(not torch.equal(found[name][0], base[name][0]) for name in ("params", "exp_avgs", "exp_avg_sqs"))


def test_strided_parameters_and_empty_lists() -> None:
    """Tensors that are not contiguous are changed where they lie; nothing is done to no tensor."""
    lists = {name: [tensors[0]] for name, tensors in state().items()}
    strided = {name: [tensors[0].t().contiguous().t()] for name, tensors in lists.items()}
    view = strided["params"][0]
    adamw(**strided, **HYPER)
    adamw(**lists, **HYPER)
    assert torch.equal(view, lists["params"][0])
    adamw([], [], [], [])


@pytest.mark.parametrize("library", ["reference", "torch_native"])
def test_parameters_that_need_gradients_are_changed(library: str) -> None:
    """Leaves that require gradients can be updated; nothing is recorded."""
    lists = state()
    lists["params"] = [item.requires_grad_() for item in lists["params"]]
    with using(Policy(choose={"adamw": library})):
        adamw(**lists, **HYPER)
    assert all(item.is_leaf for item in lists["params"])


def test_a_proof_of_large_lists_is_made_small() -> None:
    """shrink takes tensors from both ends of the lists, and a part of each."""
    lists = {name: [torch.ones(100, 100) for _ in range(20)] for name in state()}
    optional = dict.fromkeys(("max_exp_avg_sqs", "master_params"))
    counts = [torch.tensor(float(index)) for index in range(20)]
    small = _shrink(lists | optional | {"state_steps": counts})
    assert [tuple(item.shape) for item in small["grads"]] == [(4096,)] * 8
    assert [int(item) for item in small["state_steps"]] == [0, 1, 2, 3, 16, 17, 18, 19]
    assert small["master_params"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": draw()[:2]}, "one length"),
        ({"exp_avgs": draw()[::-1]}, "exp_avgs"),
        ({"state_steps": [torch.zeros(2)] * 4}, "state_steps"),
        ({"state_steps": [torch.zeros(())] * 4, "step": 2}, "both given"),
        ({"step": 0}, "first step is 1"),
    ],
    ids=str,
)
def test_lists_that_do_not_go_together_are_refused(change: dict[str, Any], message: str) -> None:
    """Lists of other lengths or shapes, and two counts of steps, are errors that say which."""
    with pytest.raises(ValueError, match=message):
        adamw(**(state() | change))
