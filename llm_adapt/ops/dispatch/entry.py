"""The function that callers call: one guarded lookup, then the kernel.

It is written out for each op from the op's signature, as dataclasses writes __init__: a loop over arguments would
cost more than many kernels (benchmarks/dispatch.py). The key holds everything a kernel may refuse by: for tensors
their type, shape, dtype, device, whether they need a gradient and are contiguous; the options as they are; and
the four states of the process that matter. So a bound kernel can be called without asking it again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch

from llm_adapt.ops.dispatch.registry import FusedOp

__all__ = ["make_entry"]

# What compiled code may decide by: constants to dynamo. Shapes may be symbols there.
_TRACED = "({1!r}, {0}.dtype, {0}.device.type, {0}.requires_grad)"
_TENSOR = "type({0}), {0}.shape, {0}.dtype, {0}.device, {0}.requires_grad, {0}.is_contiguous()"
_STATE = "_is_inference(), _is_autocast(), _functorch_level(), _is_deterministic()"


class Dispatch(Protocol):
    """What the entry calls when the lookup does not answer."""

    table: dict[Any, Any]
    compiled: dict[str, Callable[..., Any]]

    def bind(self, key: Any, arguments: tuple[Any, ...]) -> Any:
        """A binding for a new key."""

    def traced(self, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> str:
        """The key in `compiled` of what compiled code calls, for tensors of these dtypes and these options."""

    def reject(self, error: Exception, arguments: tuple[Any, ...]) -> Exception:
        """The error for arguments that no key can be made of."""


def make_entry(op: FusedOp, dispatch: Dispatch) -> Callable[..., Any]:
    """A function with the op's signature that calls the kernel bound to such calls."""
    names = list(op.signature.parameters)
    arguments = ", ".join(names) + ","
    key = ", ".join(part for name in names if (part := _key_part(op, name)))
    tensors = " + ".join(_traced_part(op, name) for name in names if op.kinds[name] != "option") or "()"
    options = "".join(
        f"({name!r}, {name}), " for name in names if op.kinds[name] == "option" and name not in op.dynamic
    )
    source = (
        f"def {op.name}{_parameters(op)}:\n"
        f"    if _is_compiling():\n"
        f"        return _compiled[_traced({tensors}, ({options}))]({arguments})\n"
        f"    try:\n"
        f"        key = ({key}, {_STATE})\n"
        f"        binding = _lookup(key)\n"
        f"    except (AttributeError, TypeError) as error:\n"
        f"        raise _reject(error, ({arguments})) from None\n"
        f"    if binding is None:\n"
        f"        binding = _bind(key, ({arguments}))\n"
        f"    binding.calls += 1\n"
        f"    return binding.call({arguments})\n"
    )
    names_inside: dict[str, Any] = {
        "_is_compiling": torch.compiler.is_compiling,
        "_is_inference": torch.is_inference_mode_enabled,
        "_is_autocast": torch._C._is_any_autocast_enabled,
        "_functorch_level": torch._C._functorch.maybe_current_level,
        "_is_deterministic": torch.are_deterministic_algorithms_enabled,
        "_lookup": dispatch.table.get,
        "_bind": dispatch.bind,
        "_traced": _constant(dispatch.traced),
        "_compiled": dispatch.compiled,
        "_reject": dispatch.reject,
        **{f"_default_{name}": parameter.default for name, parameter in op.signature.parameters.items()},
    }
    exec(compile(source, f"<llm_adapt entry of {op.name}>", "exec"), names_inside)
    entry: Callable[..., Any] = names_inside[op.name]
    entry.__doc__, entry.__module__ = op.reference.__doc__, op.reference.__module__
    entry.__signature__ = op.signature  # type: ignore[attr-defined]
    entry.op = op  # type: ignore[attr-defined]
    return entry


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark for dynamo: called while it traces, the result is a constant of the compiled code.

    As torch.compiler.assume_constant_result does, without importing dynamo, which takes over a second.
    """

    def constant(*args: Any) -> Any:  # dynamo takes plain values from it, no functions: hence a key
        return function(*args)

    constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return constant


def _traced_part(op: FusedOp, name: str) -> str:
    """An expression for the tuple of facts that an argument gives to compiled code."""
    if op.kinds[name] == "tensors":
        return f"(() if {name} is None else tuple([{_TRACED.format('t', name)} for t in {name}]))"
    present = f"({_TRACED.format(name, name)},)"
    is_optional = op.signature.parameters[name].default is not inspect.Parameter.empty
    return f"(() if {name} is None else {present})" if is_optional else present


def _parameters(op: FusedOp) -> str:
    """The parameter list, with defaults by name."""
    parts, is_keyword = [], False
    for name, parameter in op.signature.parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not is_keyword:
            parts.append("*")
            is_keyword = True
        has_default = parameter.default is not inspect.Parameter.empty
        parts.append(f"{name}=_default_{name}" if has_default else name)
    return f"({', '.join(parts)})"


def _key_part(op: FusedOp, name: str) -> str:
    """What an argument gives to the key."""
    kind = op.kinds[name]
    if kind == "option":
        return "" if name in op.dynamic else name
    if kind == "tensors":
        return f"None if {name} is None else tuple([({_TENSOR.format('t')}) for t in {name}])"
    if op.signature.parameters[name].default is inspect.Parameter.empty:
        return _TENSOR.format(name)
    return f"None if {name} is None else ({_TENSOR.format(name)})"
