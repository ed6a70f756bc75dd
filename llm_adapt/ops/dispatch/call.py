"""Call: what a kernel may know of a call when it says whether it can serve it. Facts, never values."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

__all__ = ["Call", "TensorFacts", "UnknownShapeError", "describe", "facts", "same"]

_TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter)


class UnknownShapeError(Exception):
    """A shape was asked of a call that is being compiled; the kernel that asks is not used there."""


class TensorFacts(NamedTuple):
    """What a kernel may know of one tensor.

    Attributes:
        sizes: its shape; None while code is compiled, where shapes may be symbols.
        is_plain: a torch.Tensor or Parameter, no subclass such as DTensor.
        layout: how the axes of a tensor that is not contiguous lie in memory: the order of their strides, where an
            expanded axis (0) and the one of neighbours (1) stand out; axes of one element are -1.
    """

    sizes: torch.Size | None
    dtype: torch.dtype
    device: str
    needs_grad: bool
    is_contiguous: bool
    is_plain: bool
    type_name: str
    layout: tuple[int, ...] = ()

    @property
    def shape(self) -> torch.Size:
        """The shape. Raises UnknownShapeError while code is compiled."""
        if self.sizes is None:
            raise UnknownShapeError
        return self.sizes

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __str__(self) -> str:
        sizes = "?" if self.sizes is None else "x".join(map(str, self.sizes)) or "scalar"
        return f"{str(self.dtype).removeprefix('torch.')}[{sizes}]"


def facts(tensor: torch.Tensor) -> TensorFacts:
    """The facts of one tensor."""
    return TensorFacts(
        tensor.shape,
        tensor.dtype,
        tensor.device.type,
        tensor.requires_grad,
        tensor.is_contiguous(),
        type(tensor) in _TENSOR_TYPES,
        type(tensor).__name__,
        () if tensor.is_contiguous() else _layout(tensor),
    )


def _layout(tensor: torch.Tensor) -> tuple[int, ...]:
    order = sorted(set(tensor.stride()))
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(-1 if size == 1 else stride if stride < 2 else 2 + order.index(stride) for size, stride in pairs)


@dataclass(frozen=True)
class Call:
    """One call of an op: the facts of its tensors, and the values of its other arguments.

    Attributes:
        op: name of the op.
        tensors: argument -> facts; arguments that are None are absent. Of a list of tensors: name[0], name[1] ...
        options: argument -> value, defaults filled in, tensors left out.
        given: names of the arguments that differ from their default.
        is_inference: inside torch.inference_mode(): no gradient will ever be asked of the result.
        is_transformed: inside a functorch transform (vmap, grad, jvp).
        is_compiling: torch.compile is tracing; shapes are unknown.
        is_deterministic: torch.use_deterministic_algorithms(True).
        layer: qualified name of the module that calls, "" when it is not known.
        passing: options whose values come and go: hints, and numbers that are part of no key.
    """

    op: str
    tensors: Mapping[str, TensorFacts]
    options: Mapping[str, Any]
    given: frozenset[str]
    is_inference: bool = False
    is_transformed: bool = False
    is_compiling: bool = False
    is_deterministic: bool = False
    layer: str = ""
    passing: frozenset[str] = frozenset()

    def __getattr__(self, name: str) -> Any:
        """The facts of a tensor, or the value of an option, by the argument's name; None for an absent tensor."""
        if name in self.tensors:
            return self.tensors[name]
        if name in self.options:
            return self.options[name]
        raise AttributeError(f"op {self.op} has no argument {name!r}")

    @property
    def device(self) -> str:
        """Device type of the first tensor; "" for a call without tensors."""
        return next((tensor.device for tensor in self.tensors.values()), "")

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the first floating-point tensor; None where there is none."""
        return next((t.dtype for t in self.tensors.values() if t.dtype.is_floating_point), None)

    @property
    def variant(self) -> str:
        """The options that differ from their default, less those that come and go: "eps=1e-05, form='gemma'"."""
        told = self.given - self.passing
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items() if name in told)

    def __str__(self) -> str:
        parts = [f"{name} {tensor}" for name, tensor in self.tensors.items()]
        return f"{self.op}({', '.join(parts + ([self.variant] if self.variant else []))}) on {self.device or '?'}"


def describe(
    op: str, signature: inspect.Signature, arguments: Mapping[str, Any], lists: Collection[str] = (), **state: Any
) -> Call:
    """The call of an op with these arguments (defaults filled in).

    Args:
        lists: arguments that are lists of tensors, which may be empty.
    """
    tensors: dict[str, TensorFacts] = {}
    options: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = facts(value)
        elif name in lists and value is not None:
            tensors.update({f"{name}[{index}]": facts(item) for index, item in enumerate(value)})
        elif name not in lists:
            options[name] = value
    parameters = signature.parameters
    given = frozenset(name for name, value in arguments.items() if not same(value, parameters[name].default))
    return Call(op, tensors, options, given, **state)


def same(value: Any, default: Any) -> bool:
    """Whether an argument has its default value; True is not 1, and a tensor is no default."""
    if value is default:
        return True
    return type(value) is type(default) and not isinstance(value, (list, torch.Tensor)) and bool(value == default)
