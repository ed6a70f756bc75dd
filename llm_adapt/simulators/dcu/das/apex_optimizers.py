"""apex.optimizers: FusedAdam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import amp_C
import torch
from apex.multi_tensor_apply import multi_tensor_applier

from llm_adapt.simulators.base import SimulatorError
from llm_adapt.simulators.dcu.das.limits import missing

__all__ = ["FusedAdam"]

__getattr__ = missing("apex.optimizers")


class FusedAdam(torch.optim.Optimizer):
    """Adam or AdamW by amp_C.multi_tensor_adam, with one step counter for each group and moments in float32.

    Raises:
        RuntimeError: amsgrad, which it has not.
        SimulatorError: capturable or master_weights, which are not modelled.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedAdam does not support the AMSGrad variant.")
        if capturable or master_weights:
            raise SimulatorError("FusedAdam(capturable or master_weights) was asked; the DCU simulator has neither.")
        defaults = {
            "lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay
        }  # fmt: skip
        super().__init__(params, defaults)
        self.adam_w_mode, self.set_grad_none = int(adam_w_mode), set_grad_none

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drop or zero the gradients, as set_grad_none says."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every group."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for parameters in by_dtype.values():
            lists = [[parameter.grad for parameter in parameters], parameters]
            for name in ("exp_avg", "exp_avg_sq"):
                lists.append([self._moment(parameter, name) for parameter in parameters])
            flag = torch.zeros(1, dtype=torch.int32, device=parameters[0].device)
            multi_tensor_applier(
                amp_C.multi_tensor_adam, flag, lists, group["lr"], *group["betas"], group["eps"], group["step"],
                self.adam_w_mode, int(group["bias_correction"]), group["weight_decay"],
            )  # fmt: skip

    def _moment(self, parameter: torch.Tensor, name: str) -> torch.Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        found: torch.Tensor = state[name]
        return found
