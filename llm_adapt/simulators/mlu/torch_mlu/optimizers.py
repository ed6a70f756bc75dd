"""torch_mlu.optimizers: FusedAdam, as apex has it: one step counter for each group, float32 state.

FusedLAMB, FusedLAMBAMP and FusedSGD are there in the builds of 2024; their operators' results are not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["FusedAdam"]


class FusedAdam(torch.optim.Optimizer):
    """torch_mlu::fused_adam over the parameters of each group."""

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
        set_grad_none: bool = True,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedAdam does not support the AMSGrad variant.")
        defaults = {
            "lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults)
        self.adam_w_mode = 1 if adam_w_mode else 0
        self.set_grad_none = set_grad_none

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drop the gradients, or fill them with zeros, as set_grad_none says."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of Adam."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._step(group, params)
        return loss

    def _step(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        for param in params:
            state = self.state[param]
            for name in ("exp_avg", "exp_avg_sq"):
                state.setdefault(name, torch.zeros_like(param, dtype=torch.float32))
        states = [self.state[param] for param in params]
        torch.ops.torch_mlu.fused_adam(
            torch.zeros(1, dtype=torch.int32, device=params[0].device),
            [param.grad for param in params],
            params,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            group["lr"],
            *group["betas"],
            group["eps"],
            group["step"],
            self.adam_w_mode,
            int(group["bias_correction"]),
            group["weight_decay"],
        )
