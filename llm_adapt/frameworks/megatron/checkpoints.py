"""Loading a distributed optimizer of Megatron whose Adam is torch's, as it is without TransformerEngine and apex.

Megatron-Core 0.16 keeps the number of the step of torch's optimizers in the state of each parameter, and does not get
it through its own checkpoints: state_dict fails before the first step, and loading looks for a step that was left out,
or takes the one of before. Whether operators serve makes no difference here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron.seams import seam
from llm_adapt.patching import Row

__all__ = ["begun", "rows", "steps_kept"]

_TORCH = (torch.optim.Adam, torch.optim.AdamW)


def rows(context: Context) -> list[Row]:
    """Two methods of DistributedOptimizer, whatever the ops setting."""
    target = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
    loads = "loads a state of torch's Adam, whose steps stand in its groups"
    return [
        seam(f"{target}.state_dict", begun, "a state of torch's Adam before its first step"),
        seam(f"{target}._set_main_param_and_optimizer_states", steps_kept, loads),
    ]


# Workaround: megatron-torch-adam-step
def begun(original: Callable[..., Any]) -> Callable[..., Any]:
    """`DistributedOptimizer.state_dict` of an optimizer that has made no step, which must be written to be loaded.

    It reads the step of torch's optimizers from their states, of which there are none yet.
    """

    @functools.wraps(original)
    def state_dict(self: Any) -> Any:
        inner = self.optimizer
        if isinstance(inner, _TORCH) and not inner.state:
            self.init_state_fn(inner, self.config)
            for kept in inner.state.values():
                kept.setdefault("step", torch.tensor(0.0))
        return original(self)

    return state_dict


def steps_kept(original: Callable[..., None]) -> Callable[..., None]:
    """`DistributedOptimizer._set_main_param_and_optimizer_states` that leaves the steps of torch's optimizers alone.

    load_state_dict has set them. The original looks for one in `tensors`, where Megatron puts none, or the one of
    before the load.
    """

    @functools.wraps(original)
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        if isinstance(self.optimizer, _TORCH):
            group, order = self.model_param_group_index_map[model_param]
            kept = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
            tensors = tensors | {"step": kept["step"]} if "step" in kept else tensors
        original(self, model_param, tensors)

    return set_states
