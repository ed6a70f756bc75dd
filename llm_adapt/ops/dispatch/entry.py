"""The function that callers call: one guarded lookup, then the kernel.

It is written out for each op from the op's signature, as dataclasses writes __init__: a loop over arguments would
cost more than many kernels (benchmarks/dispatch.py). A bound kernel is called without being asked again, so what
guards it is everything that a kernel may refuse by: the type, shape, dtype, strides and device of every tensor and
whether it needs a gradient, the options as they are, inference mode, autocast, functorch and determinism.

The last few kinds of call are recognised by torch's own tensor guards, which read all of that in C++. Where this torch
has none, and for further kinds, a key is made of the same facts in Python.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from llm_adapt.ops.dispatch.calling import autocast_dtype
from llm_adapt.ops.dispatch.registry import FusedOp

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None  # type: ignore[assignment, misc]

__all__ = ["Compiled", "make_entry", "tensor_check"]

_TENSOR = "type({0}), {0}.shape, {0}.dtype, {0}.device, {0}.requires_grad, {0}.is_contiguous() or {0}.stride()"
# Of each member of a list, too: a kernel that writes by the sizes of another list would write past this one's. An
# optimizer hands over hundreds, which takes long here; torch's guards spare it all but the first few kinds of call.
_TENSORS = "tuple([(" + _TENSOR.format("t") + ") for t in {0}])"
_STATE = "_is_inference(), _is_autocast(), _is_transformed()"
# Of an op that casts as autocast does, also to what: kernels are asked about what they will get.
_AUTOCAST = ", _is_autocast() and _autocast_dtype({0}.device.type)"
# What compiled code may decide by: constants to dynamo. Shapes may be symbols there.
_TRACED = "({1!r}, {0}.dtype, {0}.device.type, {0}.requires_grad)"


class Compiled:
    """What compiled code calls, by name, as attributes.

    No dict: dynamo reads a dict once for a whole graph, and a later call in it may be the first of its kind.
    """


class Dispatch(Protocol):
    """What the entry looks into, and calls when that does not answer."""

    recent: dict[Any, tuple[Any, ...]]
    table: dict[Any, Any]
    compiled: Compiled

    def bind(self, options: Any, key: Any, arguments: tuple[Any, ...]) -> Any:
        """A binding for a new key."""

    def traced(self, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> str:
        """The name in `compiled` of what compiled code calls, for tensors of these dtypes and these options."""

    def reject(self, error: Exception | None, arguments: tuple[Any, ...]) -> Exception | None:
        """The error for arguments that no key can be made of."""


def make_entry(op: FusedOp, dispatch: Dispatch) -> Callable[..., Any]:
    """A function with the op's signature that calls the kernel bound to such calls."""
    names_inside: dict[str, Any] = {
        "_is_compiling": torch.compiler.is_compiling,
        "_is_inference": torch.is_inference_mode_enabled,
        "_is_autocast": torch._C._is_any_autocast_enabled,
        "_is_transformed": torch._C._are_functorch_transforms_active,
        "_is_deterministic": torch._C._get_deterministic_algorithms,  # what torch's own function returns
        "_autocast_dtype": autocast_dtype,
        "_recent": dispatch.recent.get,
        "_lookup": dispatch.table.get,
        "_bind": dispatch.bind,
        "_version": 0,
        "_traced": _constant(dispatch.traced),
        "_compiled": dispatch.compiled,
        "_reject": dispatch.reject,
        **{f"_default_{name}": value for name, value in op.defaults.items()},
    }
    exec(compile(_source(op), f"<llm_adapt entry of {op.name}>", "exec"), names_inside)
    entry: Callable[..., Any] = names_inside[op.name]
    entry.__doc__, entry.__module__ = op.reference.__doc__, op.reference.__module__
    entry.__signature__ = op.signature  # type: ignore[attr-defined]
    entry.op = op  # type: ignore[attr-defined]
    return entry


def tensor_check(op: FusedOp, arguments: Sequence[Any]) -> Callable[..., bool] | None:
    """torch's check for tensors like these, called with all of the op's tensors and lists, those that are None too.

    None where there is no tensor, and where this torch has no such check.
    """
    named = dict(zip(op.signature.parameters, arguments, strict=True))
    names = [name for name, kind in op.kinds.items() if kind != "option"]
    present = [name for name in names if named[name] is not None]
    tensors = [item for name in present for item in (named[name] if name in op.lists else [named[name]])]
    if TensorGuards is None or not tensors:
        return None
    check: Callable[..., bool] = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    if len(present) < len(names) or op.lists:
        passed = ", ".join(f"*{name}" if name in op.lists else name for name in present)
        check = eval(f"lambda {', '.join(names)}: _check({passed})", {"_check": check})
    return check


def _source(op: FusedOp) -> str:
    """The text of the entry."""
    names = list(op.signature.parameters)
    arguments = ", ".join(names) + ","
    tensors = [name for name in names if op.kinds[name] != "option"]
    static = [name for name in names if op.kinds[name] == "option" and name not in op.dynamic | op.hints]
    optional = [name for name in tensors if name in op.defaults]
    # Of a number that changes from call to call, whether it was given: a kernel that does not take it must not serve.
    given = [f"{name} == _default_{name}" for name in op.defaults if name in op.dynamic - op.hints]
    present = [f"{name} is None" for name in optional if name not in op.lists]
    present += [f"-1 if {name} is None else len({name})" for name in tensors if name in op.lists]
    options = "".join(f"{part}, " for part in (*static, *given, *present))
    facts = ", ".join(_key_part(op, name) for name in tensors) or "None"
    traced_tensors = " + ".join(_traced_part(op, name) for name in tensors) or "()"
    # A member of a set is a constant to dynamo, where a number may be a symbol (dynamic=True).
    traced_options = "".join(f"({name!r}, *{{{name}}}), " for name in static)
    traced_options += "".join(
        f"({part.split()[0]!r}, _default_{part.split()[0]} if {part} else 'given'), " for part in given
    )
    state = _STATE + (_AUTOCAST.format(op.autocast[0]) if op.autocast else "")
    return (
        f"def {op.name}{_parameters(op)}:\n"
        f"    if _is_compiling():\n"
        f"        return getattr(_compiled, _traced(_version, {traced_tensors}, ({traced_options})))({arguments})\n"
        f"    try:\n"
        f"        _options = ({options}_is_deterministic())\n"
        f"        for _check, _binding in _recent(_options, ()):\n"
        f"            if _check({', '.join(tensors)}):\n"
        f"                break\n"
        f"        else:\n"
        f"            _key = (_options, {facts}, {state})\n"
        f"            _binding = _lookup(_key)\n"
        f"    except (AttributeError, TypeError) as _error:\n"
        f"        raise _reject(_error, ({arguments})) from None\n"
        f"    if _binding is None:\n"
        f"        _binding = _bind(_options, _key, ({arguments}))\n"
        f"    _binding.calls += 1\n"
        f"    return _binding.call({arguments})\n"
    )


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark for dynamo: called while it traces, the result is a constant of the compiled code.

    As torch.compiler.assume_constant_result does, without importing dynamo, which takes over a second.
    """

    def constant(version: int, *args: Any) -> Any:  # dynamo takes plain values from it, no functions: hence a name
        return function(*args)

    constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return constant


def _traced_part(op: FusedOp, name: str) -> str:
    """An expression for the tuple of facts that an argument gives to compiled code."""
    if op.kinds[name] == "tensors":
        return f"(() if {name} is None else tuple([{_TRACED.format('t', name)} for t in {name}]))"
    present = f"({_TRACED.format(name, name)},)"
    return f"(() if {name} is None else {present})" if name in op.defaults else present


def _key_part(op: FusedOp, name: str) -> str:
    """What a tensor, or a list of them, gives to the key."""
    if op.kinds[name] == "tensors":
        return f"None if {name} is None else {_TENSORS.format(name)}"
    facts = _TENSOR.format(name)
    return f"None if {name} is None else ({facts})" if name in op.defaults else facts


def _parameters(op: FusedOp) -> str:
    """The parameter list, with defaults by name."""
    parts, is_keyword = [], False
    for name, parameter in op.signature.parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not is_keyword:
            parts.append("*")
            is_keyword = True
        parts.append(f"{name}=_default_{name}" if name in op.defaults else name)
    return f"({', '.join(parts)})"
