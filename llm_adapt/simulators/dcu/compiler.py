"""torch.compile on a simulated DCU: traced as on the device, run by the same kernels as eager code.

There inductor writes Triton code for DTK's Triton, which is not simulated. Here the graphs that dynamo and AOTAutograd
make of code for the device are run operator by operator; graphs for the CPU go to inductor as ever.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Any

__all__ = ["take_over_device_graphs"]


def take_over_device_graphs(compile_fx_module: ModuleType) -> None:
    """Wrap torch._inductor.compile_fx.compile_fx.

    Args:
        compile_fx_module: torch._inductor.compile_fx, just imported.
    """
    inductor = compile_fx_module.compile_fx  # type: ignore[attr-defined]

    @functools.wraps(inductor)
    def compile_fx(model_: Any, example_inputs_: Any, *arguments: Any, **keywords: Any) -> Any:
        if not _is_on_device(model_, example_inputs_):
            return inductor(model_, example_inputs_, *arguments, **keywords)
        from torch._dynamo.backends.debugging import aot_eager

        _say_once()
        return aot_eager(model_, example_inputs_)

    compile_fx_module.compile_fx = compile_fx  # type: ignore[attr-defined]


def _is_on_device(model: Any, inputs: Any) -> bool:
    """Whether a tensor of the graph is on cuda: an input, a parameter, or one that it makes."""
    import torch

    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    tensors += [*model.parameters(), *model.buffers()]
    made = [node.kwargs["device"] for node in model.graph.nodes if node.kwargs.get("device") is not None]
    return any(tensor.is_cuda for tensor in tensors) or any(torch.device(place).type == "cuda" for place in made)


@functools.cache
def _say_once() -> None:
    warnings.warn(
        "torch.compile on the DCU simulator runs traced graphs operator by operator: DTK's Triton is not simulated.",
        RuntimeWarning,
        stacklevel=3,
    )
