"""Megatron's Adam by the operator adamw.

Megatron takes FusedAdam from TransformerEngine or apex, else torch's AdamW and Adam. In their place stands a FusedAdam
with apex's arguments that keeps what torch's keeps, under the same names: a checkpoint is the same with and without it,
and Megatron goes on to read it as torch's (HAVE_APEX_OR_TE stays False). A real FusedAdam is left alone.

An optimizer with CPU offload keeps torch's AdamW for all its parameters: it writes its classes into the checkpoint,
which must load without this package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron.seams import VERSIONS
from llm_adapt.patching import Patch, Row
from llm_adapt.report import Report

__all__ = ["FusedAdam", "instead_of_torch", "not_torch", "rows", "torch_for_offload"]


def rows(context: Context) -> list[Row]:
    """The two names that choose Megatron's Adam; none with ops="off"."""
    if not context.serves_operators:
        return []
    target, reason = "megatron.core.optimizer", "operator adamw; the state is torch's"
    offload = "stays with torch's AdamW: its checkpoints name the classes"
    return [
        _row(f"{target}:Adam", instead_of_torch(context.report), reason),
        _row(f"{target}:USING_PYTORCH_OPTIMIZER", not_torch, "chooses Adam of this module, not of torch"),
        _row(f"{target}.cpu_offloading.hybrid_optimizer:HybridDeviceOptimizer.__init__", torch_for_offload, offload),
    ]


def _row(target: str, new: Callable[[Any], Any], reason: str) -> Patch:
    # No copies: the original is torch's, which others may hold under this name too.
    return Patch(target, new, reason, kind="wrap", optional=True, versions=VERSIONS, rebind=False)


def instead_of_torch(report: Report) -> Callable[[Any], Any]:
    """FusedAdam where Megatron fell back to torch's AdamW; what else it found serves."""

    def wrap(original: Any) -> Any:
        if original is torch.optim.AdamW:
            return FusedAdam
        report.once("megatron Adam", f"{original.__module__}.{original.__qualname__}", "a fused optimizer is installed")
        return original

    return wrap


def not_torch(original: bool) -> bool:
    """False: Megatron then builds its own name Adam, and tells it adam_w_mode."""
    return False


def torch_for_offload(original: Callable[..., None]) -> Callable[..., None]:
    """`HybridDeviceOptimizer.__init__` that is given torch's AdamW, as without these rows."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("gpu_optimizer_cls") is FusedAdam:
            kwargs["gpu_optimizer_cls"] = torch.optim.AdamW
        original(self, *args, **kwargs)

    return __init__


class FusedAdam(torch.optim.Adam):
    """p -= lr * (m' / (sqrt(v') + eps) + weight_decay * p), one call of the operator adamw for each group.

    adam_w_mode=False is Adam: g += weight_decay * p in place of the decay of p.
    bias_correction: m' = m / (1 - beta1^t), v' = v / (1 - beta2^t); else m' = m, v' = v.

    State: exp_avg, exp_avg_sq, with amsgrad max_exp_avg_sq, and step [] float32 on the CPU, as torch.optim.Adam has.
        States of apex and TransformerEngine are read too: their step stands in the group.
    Dtypes: computed in float32, each tensor rounded once to its own dtype; moments have the dtype of the parameter.
    Raises: TypeError for arguments that are unknown here, such as master_weights and exp_avg_dtype.
    Source: Loshchilov and Hutter 2019; NVIDIA apex optimizers/fused_adam.py (arguments); torch 2.13 optim/adam.py.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=adam_w_mode)
        if not bias_correction:  # torch's has no such choice, and keeps no such key
            self.defaults["bias_correction"] = False
            for group in self.param_groups:
                group.setdefault("bias_correction", False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state: torch's of either class, or apex's, whose step stands in the group."""
        for group in state["param_groups"]:
            for p in group["params"]:
                kept = state["state"].get(p)
                if kept and "step" not in kept and "step" in group:
                    kept["step"] = torch.tensor(float(group["step"]))
        super().__setstate__(state)
        for group in self.param_groups:
            # What the constructor was told: states of apex have no such key, and torch would make it Adam.
            group["decoupled_weight_decay"] = self.defaults["decoupled_weight_decay"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Returns: what the closure returns, None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for number, lists in self._lists(group).items():
                self._update(group, number, lists)
        return loss

    def _lists(self, group: dict[str, Any]) -> dict[int, dict[str, list[torch.Tensor]]]:
        """The tensors of a group, by the number of the step that each parameter is at."""
        found: dict[int, dict[str, list[torch.Tensor]]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse or p.is_complex():
                raise RuntimeError(f"FusedAdam takes dense gradients of real numbers; found {p.grad.layout}, {p.dtype}")
            kept = self._kept(p, group)
            kept["step"] = kept["step"] + 1  # not in place: Megatron loads one tensor for all parameters
            parts = {"params": p, "grads": p.grad, "exp_avgs": kept["exp_avg"], "exp_avg_sqs": kept["exp_avg_sq"]}
            if group["amsgrad"]:
                parts["max_exp_avg_sqs"] = kept["max_exp_avg_sq"]
            lists = found.setdefault(int(kept["step"]), {name: [] for name in parts})
            for name, tensor in parts.items():
                lists[name].append(_local(tensor, p))
        return found

    def _kept(self, p: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter; Megatron makes the moments itself before it loads, and no step."""
        kept: dict[str, Any] = self.state[p]
        if "step" not in kept:
            kept["step"] = torch.tensor(0.0)
        for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])):
            if name not in kept:
                kept[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return kept

    def _update(self, group: dict[str, Any], number: int, lists: dict[str, list[torch.Tensor]]) -> None:
        from llm_adapt.ops.adamw import adamw

        beta1, beta2 = group["betas"]
        adamw(
            **lists,  # type: ignore[arg-type]
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=number,
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
            bias_correction=group.get("bias_correction", True),
        )


def _local(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, laid out as the parameter is; other tensors as they are."""
    if not hasattr(tensor, "to_local"):
        return tensor
    if tensor.placements != like.placements:  # type: ignore[attr-defined]
        tensor = tensor.redistribute(like.device_mesh, like.placements)  # type: ignore[attr-defined]
    found: torch.Tensor = tensor.to_local()
    return found
