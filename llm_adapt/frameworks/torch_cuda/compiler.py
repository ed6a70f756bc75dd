"""torch.compile: what dynamo and AOTAutograd know by heart of a tensor must be what eager code is told."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from llm_adapt.frameworks.torch_cuda.availability import IsTold
from llm_adapt.frameworks.torch_cuda.devices import DeviceTranslator
from llm_adapt.frameworks.torch_cuda.tensor_types import cuda_type_name
from llm_adapt.patching import Patch, Row

__all__ = ["rows"]

_TENSOR = "torch._dynamo.variables.tensor:TensorVariable"


def rows(translate: DeviceTranslator, is_told: IsTold, replaced: Iterable[Row]) -> list[Row]:
    """Rows for the answers that compiled code takes from dynamo instead of from the tensor.

    Args:
        replaced: the other rows of the facade, before they are written.
    """
    answers: dict[str, Callable[[Any, Any], Any]] = {
        "method_attr_is_cuda": lambda tensor, answer: True,
        "method_type": lambda tensor, answer: cuda_type_name(answer, translate) if type(answer) is str else answer,
    }
    if translate.is_host:
        answers["method_get_device"] = lambda tensor, answer: translate.current
    found: list[Row] = [
        Patch(
            f"{_TENSOR}.{name}",
            functools.partial(_answer, translate=translate, is_told=is_told, told=told),
            "compiled code is told what eager code is",
            kind="wrap",
            optional=True,
            versions="torch 2.13",
        )
        for name, told in answers.items()
    ]
    if translate.is_host:
        found.append(
            Patch(
                "torch._subclasses.functional_tensor:FunctionalTensor.cpu",
                lambda self, memory_format=torch.preserve_format: self.to("cpu", memory_format=memory_format),
                "a device-to-host copy stays a copy in compiled code",
            )
        )
    return found + _tables(dict(filter(None, map(_original, replaced))))


def _tables(originals: dict[str, Any]) -> list[Row]:
    """Rows by which dynamo, imported after the patch, still knows torch's own functions.

    Its tables name functions or hold them. They must hold torch's own: ours are traced as the user's code, and
    call them.
    """
    why, place = "dynamo's tables hold torch's own functions", "torch._dynamo.variables.torch"

    def with_originals(table: dict[Any, Any]) -> dict[Any, Any]:
        ours = {id(_standing(target)): function for target, function in originals.items()}
        return {ours.get(id(function), function): value for function, value in table.items()}

    def load(original: Callable[[str], Any]) -> Callable[[str], Any]:
        dotted = {target.replace(":", "."): function for target, function in originals.items()}
        return functools.wraps(original)(lambda name: dotted[name] if name in dotted else original(name))

    def handlers(original: Callable[[], dict[Any, Any]]) -> Callable[[], dict[Any, Any]]:
        return functools.cache(functools.wraps(original)(lambda: with_originals(original())))

    return [
        Patch("torch._dynamo.trace_rules:load_object", load, why, kind="wrap"),
        Patch(f"{place}:constant_fold_functions", with_originals, why, kind="wrap"),
        Patch(f"{place}:constant_fold_functions_need_guards", with_originals, why, kind="wrap"),
        Patch(f"{place}:TorchInGraphFunctionVariable._get_handlers", handlers, why, kind="wrap"),
    ]


def _standing(target: str) -> Any:
    """What stands at the target of a row now."""
    module, _, name = target.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = None if found is None else inspect.getattr_static(found, part, None)
    return found


def _original(row: Row) -> tuple[str, Any] | None:
    """(target, what stands there) of a row that is not written yet; None where nothing does."""
    found = _standing(row.target) if isinstance(row, Patch) else None
    return None if found is None else (row.target, found)


def _answer(
    original: Callable[..., Any], translate: DeviceTranslator, is_told: IsTold, told: Callable[[Any, Any], Any]
) -> Callable[..., Any]:
    """Let dynamo answer, then put the told answer in place of a constant, as eager code would get it."""

    @functools.wraps(original)
    def method(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo.variables import ConstantVariable

        found = original(self, tx, *args, **kwargs)
        is_ours = self.device is not None and self.device.type == translate.target
        if not isinstance(found, ConstantVariable) or not is_ours or not is_told(tx.f_globals.get("__name__", "")):
            return found
        return ConstantVariable.create(told(self, found.as_python_constant()))

    return method
