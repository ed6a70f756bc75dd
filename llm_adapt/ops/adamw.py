"""AdamW and Adam over lists of tensors. p = parameter, g = gradient, m and v = moments, t = number of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from llm_adapt.ops.dispatch import fused_op
from llm_adapt.ops.dispatch.tolerances import Tolerance

__all__ = ["adamw"]

_LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "master_params", "state_steps")


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(dtype: torch.dtype = dtype) -> list[torch.Tensor]:
        return [torch.randn(sizes, generator=generator).to(dtype) for sizes in ((5, 7), (64,), (), (0, 3))]

    def call(**change: Any) -> dict[str, Any]:
        exp_avg_sqs = [item.square() for item in draw()]
        return {"params": draw(), "grads": draw(), "exp_avgs": draw(), "exp_avg_sqs": exp_avg_sqs} | change

    def steps(number: int) -> list[torch.Tensor]:
        return [torch.tensor(float(number)) for _ in range(4)]

    yield call()
    yield call(lr=0.1, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1, step=3, maximize=True)
    yield call(decoupled=False, weight_decay=0.1, step=2, max_exp_avg_sqs=[item.abs() for item in draw()])
    yield call(bias_correction=False)
    scale = {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(0.0)}
    yield call(state_steps=steps(4), **scale)
    yield call(state_steps=steps(4), grad_scale=torch.tensor(4.0), found_inf=torch.tensor(1.0))
    wide = torch.promote_types(dtype, torch.float32)
    masters = draw(wide)
    state = {"exp_avgs": draw(wide), "exp_avg_sqs": [item.square() for item in draw(wide)]}
    yield call(params=[item.to(dtype) for item in masters], master_params=masters, **state)


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    params, grads, moments = ([torch.randn(shape, generator=generator).to(dtype) for _ in range(8)] for _ in range(3))
    squares = [item.square() for item in moments]
    return {"params": params, "grads": grads, "exp_avgs": moments, "exp_avg_sqs": squares, "weight_decay": 0.1}


def _shrink(arguments: dict[str, Any]) -> dict[str, Any]:
    """At most 8 of the tensors, from both ends of the lists, and 4096 elements of each."""
    count = len(arguments["params"])
    chosen = [*range(min(4, count)), *range(max(4, count - 4), count)]

    def part(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [
            tensors[index].detach().reshape(-1)[:4096] if tensors[index].ndim else tensors[index] for index in chosen
        ]

    given = {name: part(arguments[name]) for name in _LISTS if arguments[name] is not None}
    return arguments | given


@fused_op(
    inputs=_inputs,
    differentiable=(),
    mutates=_LISTS,
    dynamic=frozenset({"lr", "beta1", "beta2", "eps", "weight_decay", "step"}),
    shrink=_shrink,
    example=_example,
    sizes={"8 matrices": (1024, 4096)},
    tolerance=Tolerance(
        {torch.float32: 4e-5, torch.bfloat16: 8 * 2.0**-8, torch.float16: 8 * 2.0**-11},
        why="torch's for-loop and foreach round to the dtype after each of about eight operations; "
        "float32: kernels that are given beta2 in float32 (op-plugin, for an NPU) use another beta, by up to 2^-25, "
        "which is 3e-5 of 1 - 0.999 and so of a second moment that begins at 0; sqrt and division add about ten "
        "roundings of 2^-24 to terms that cancel in p - lr * u",
    ),
)
def adamw(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    max_exp_avg_sqs: list[torch.Tensor] | None = None,
    master_params: list[torch.Tensor] | None = None,
    state_steps: list[torch.Tensor] | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int = 1,
    decoupled: bool = True,
    maximize: bool = False,
    bias_correction: bool = True,
) -> None:
    """p -= lr * (m' / (sqrt(v') + eps) + weight_decay * p), m' = m / (1 - beta1^t), v' = v / (1 - beta2^t), in place.

    Before: g /= grad_scale, stored as well; g = -g for the update alone with maximize; m = beta1 * m + (1 - beta1) * g;
    v = beta2 * v + (1 - beta2) * g^2. With max_exp_avg_sqs (AMSGrad): it becomes max(it, v) and stands for v.
    decoupled=False is Adam: g += weight_decay * p in place of the decay of p.
    step: t, 1 at the first. state_steps: t of each tensor so far in a tensor of its own, which is counted up here; then
        `step` is not given. bias_correction=False: m' = m, v' = v.
    found_inf: where it is not 0 nothing changes at all, no gradient and no step either.
    master_params: the float32 values of params; they are updated, and params become their rounded copies.

    Shapes: tensors of one place in the lists have one shape; state_steps, grad_scale, found_inf one element.
    Dtypes: computed in float32 (float64 for float64 tensors), each tensor rounded once to its own dtype.
    Raises: ValueError for lists of different lengths, shapes that differ, or `step` given with state_steps.
    Source: Loshchilov and Hutter 2019, algorithm 2; Reddi et al. 2018; torch 2.13 optim/adamw.py and adam.py,
        fused and capturable forms; NVIDIA apex FusedAdam for master_params and bias_correction.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    optional = {"max_exp_avg_sqs": max_exp_avg_sqs, "master_params": master_params, "state_steps": state_steps}
    lists |= {name: tensors for name, tensors in optional.items() if tensors is not None}
    _check(lists, step)
    rule = _Rule(lr, beta1, beta2, eps, weight_decay, step, decoupled, maximize, bias_correction)
    with torch.no_grad():
        for index in range(len(params)):
            stored = {name: tensors[index] for name, tensors in lists.items()}
            for name, value in _updated(stored, rule, grad_scale).items():
                tensor, rounded = stored[name], value.to(stored[name].dtype)
                if found_inf is not None:
                    rounded = torch.where(found_inf.to(tensor.device).reshape(()) != 0, tensor, rounded)
                tensor.copy_(rounded)


class _Rule(NamedTuple):
    """The numbers and choices of an update; `adamw` says what they mean."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    decoupled: bool
    maximize: bool
    bias_correction: bool


def _updated(stored: dict[str, torch.Tensor], rule: _Rule, grad_scale: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """New values, not yet rounded, of what is kept for one parameter."""
    target = "master_params" if "master_params" in stored else "params"
    wide = torch.promote_types(stored[target].dtype, torch.float32)
    p, g = stored[target].to(wide), stored["grads"].to(wide)
    new = {}
    if grad_scale is not None:
        g = new["grads"] = g / grad_scale.to(p.device, wide).reshape(())
    if rule.maximize:
        g = -g
    if rule.decoupled:
        p = p * (1 - rule.lr * rule.weight_decay)
    else:
        g = g + rule.weight_decay * p
    m = new["exp_avgs"] = stored["exp_avgs"].to(wide) * rule.beta1 + g * (1 - rule.beta1)
    v = new["exp_avg_sqs"] = stored["exp_avg_sqs"].to(wide) * rule.beta2 + g * g * (1 - rule.beta2)
    if "max_exp_avg_sqs" in stored:
        v = new["max_exp_avg_sqs"] = torch.maximum(stored["max_exp_avg_sqs"].to(wide), v)
    t: torch.Tensor | int = rule.step
    if "state_steps" in stored:
        t = new["state_steps"] = stored["state_steps"].to(p.device, wide).reshape(()) + 1
    if rule.bias_correction:
        m, v = m / _correction(rule.beta1, t), v / _correction(rule.beta2, t)
    new[target] = new["params"] = p - rule.lr * m / (v.sqrt() + rule.eps)
    if "state_steps" in stored:
        new["state_steps"] = new["state_steps"].reshape(stored["state_steps"].shape)
    return new


def _correction(beta: float, t: torch.Tensor | int) -> torch.Tensor | float:
    """1 - beta^t. Of a float32 tensor through expm1: 1 - 0.999 has four digits less."""
    if not isinstance(t, torch.Tensor):
        return 1 - beta**t
    return -torch.expm1(t * math.log(beta)) if beta > 0 else 1.0


def _check(lists: dict[str, list[torch.Tensor]], step: int) -> None:
    """Refuse lists that do not go together."""
    lengths = {name: len(tensors) for name, tensors in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"adamw: lists of one length were expected; found {lengths}. Leave out what has no gradient.")
    for name, tensors in lists.items():
        for index, (tensor, param) in enumerate(zip(tensors, lists["params"], strict=True)):
            expected = 1 if name == "state_steps" else param.shape
            if (tensor.numel() if name == "state_steps" else tensor.shape) != expected:
                raise ValueError(
                    f"adamw: {name}[{index}] has shape {tuple(tensor.shape)} for a parameter of {tuple(param.shape)}."
                )
    if "state_steps" in lists and step != 1:
        raise ValueError(f"adamw: step={step} and state_steps were both given; state_steps count by themselves.")
    check_step(step)


def check_step(step: int) -> None:
    """Raise for a step that bias correction would divide by 0 at. Kernels ask too: a step is part of no key."""
    if step < 1:
        raise ValueError(f"adamw: step={step} was asked; the first step is 1.")
