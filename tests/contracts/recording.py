"""Recording: a vendor's package that is not there, standing in sys.modules; every call is bound to its schema.

The functions of a fake compute in float64 what the vendor documents and refuse what it documents as a limit. What
backward does is the contract's: "derivative" = the function's own, "raises" = forward alone works, "drops" = the
inputs silently get no gradient, as torch_npu does for operators without a derivative. None of this ran on the
vendor's hardware: a fake is our reading of the documents named in the contract.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import inspect
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llm_adapt.ops.dispatch import registry

__all__ = ["Contract", "ContractError", "FakeVendor", "bind", "contracts", "demand", "fake_vendor"]


class ContractError(TypeError):
    """A call that the vendor documents as wrong."""


@dataclass(frozen=True)
class Contract:
    """One function of a vendor: its schema, what its backward does, and where both are from."""

    name: str
    text: str
    autograd: str
    source: str

    @property
    def schema(self) -> Any:
        """The parsed schema."""
        return torch._C.parse_schema(self.text)

    @property
    def signature(self) -> inspect.Signature:
        """The same as Python shows it."""
        kinds = {True: inspect.Parameter.KEYWORD_ONLY, False: inspect.Parameter.POSITIONAL_OR_KEYWORD}
        found = [
            inspect.Parameter(p.name, kinds[p.kwarg_only], default=p.default_value)
            if p.has_default_value()
            else inspect.Parameter(p.name, kinds[p.kwarg_only])
            for p in self.schema.arguments
        ]
        return inspect.Signature(found)


def contracts(vendor: str) -> dict[str, Contract]:
    """Name -> contract, from <vendor>.json beside this file."""
    text = json.loads(Path(__file__).with_name(f"{vendor}.json").read_text())
    return {
        name: Contract(name, item["schema"], item["autograd"], item.get("source", text["source"]))
        for name, item in text["operators"].items()
    }


def demand(holds: bool, message: str) -> None:
    """Raise ContractError unless a documented rule holds."""
    if not holds:
        raise ContractError(message)


def bind(contract: Contract, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults filled in.

    Raises:
        ContractError: unknown keyword, too many positional arguments, wrong type, or a missing argument.
    """
    parameters = contract.schema.arguments
    positional = [p.name for p in parameters if not p.kwarg_only]
    demand(len(args) <= len(positional), f"{len(args)} positional arguments were given to {contract.text}")
    bound = dict(zip(positional, args, strict=False))
    for name, value in kwargs.items():
        demand(name in {p.name for p in parameters}, f"keyword {name!r} is not in {contract.text}")
        demand(name not in bound, f"{name} was given twice to {contract.text}")
        bound[name] = value
    for p in parameters:
        demand(p.name in bound or p.has_default_value(), f"{p.name} is missing in a call of {contract.text}")
        value = bound.setdefault(p.name, p.default_value)
        demand(_fits(value, p.type), f"{p.name}={_spell(value)} is not a {p.type} of {contract.text}")
    return {p.name: bound[p.name] for p in parameters}


def _fits(value: Any, kind: Any) -> bool:
    name = kind.kind()
    if name == "OptionalType":
        return value is None or _fits(value, kind.getElementType())
    if name == "ListType":
        return isinstance(value, (list, tuple)) and all(_fits(item, kind.getElementType()) for item in value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        "TensorType": isinstance(value, torch.Tensor),
        "BoolType": isinstance(value, bool),
        "IntType": (isinstance(value, int) and not isinstance(value, bool)) or isinstance(value, torch.dtype),
        "FloatType": is_number,
        "NumberType": is_number,
        "StringType": isinstance(value, str),
    }
    return fits.get(name, True)


def _spell(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


class _WithoutDerivative(torch.autograd.Function):
    """An operator whose backward raises, or hands no gradient to anything."""

    @staticmethod
    def forward(ctx: Any, contract: Contract, call: Callable[[], Any], *tensors: torch.Tensor) -> Any:
        ctx.contract, ctx.count = contract, len(tensors)
        found = call()
        return tuple(found) if isinstance(found, list) else found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        if ctx.contract.autograd == "raises":
            raise RuntimeError(f"derivative for {ctx.contract.name} is not implemented")
        return (None, None) + (None,) * ctx.count


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, torch.Tensor) and value.requires_grad else []


@dataclass
class FakeVendor:
    """A vendor that is not there.

    Attributes:
        calls: name and bound arguments of every call so far.
        library: the kernel library that was loaded against it.
    """

    library: str
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def recorded(self, contract: Contract, compute: Callable[..., Any]) -> Callable[..., Any]:
        """The function that stands in the vendor's module."""

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = bind(contract, args, kwargs)
            self.calls.append((contract.name, bound))
            wanting = _tensors(list(bound.values())) if torch.is_grad_enabled() else []
            if contract.autograd == "derivative" or not wanting:
                return compute(**bound)
            return _WithoutDerivative.apply(contract, lambda: compute(**bound), *wanting)

        call.__signature__ = contract.signature  # type: ignore[attr-defined]
        return call

    def last(self, name: str) -> dict[str, Any]:
        """The arguments of the last call of one function."""
        return next(found for called, found in reversed(self.calls) if called.rpartition(".")[2] == name)


@contextlib.contextmanager
def fake_vendor(
    library: str, modules: Mapping[str, Mapping[str, Callable[..., Any]]], known: Mapping[str, Contract]
) -> Iterator[FakeVendor]:
    """`with fake_vendor(...) as vendor:` the vendor's modules are importable and our kernel library is loaded.

    Args:
        library: name of a module of llm_adapt.ops.kernels.
        modules: module -> function -> what it computes; parents of dotted names are made.
        known: function, or module.function, -> its contract.
    """
    vendor = FakeVendor(library)
    ours = f"llm_adapt.ops.kernels.{library}"
    roots = {name.split(".")[0] for name in modules}
    held = {n: m for n, m in sys.modules.items() if n == ours or n.startswith(f"{ours}.") or n.split(".")[0] in roots}
    ops = registry.all_ops()
    registered = {name: op.kernels.pop(library, None) for name, op in ops.items()}
    verdict = registry._LIBRARIES.pop(library, None)
    for name in held:
        del sys.modules[name]
    made = _install(vendor, modules, known)
    try:
        reason = registry.load_library(library)
        if reason:
            raise AssertionError(f"{library} does not load against its fake: {reason}")
        yield vendor
    finally:
        for name in [n for n in sys.modules if n == ours or n.startswith(f"{ours}.") or n in made]:
            del sys.modules[name]
        sys.modules.update(held)
        registry._LIBRARIES.pop(library, None)
        if verdict is not None:
            registry._LIBRARIES[library] = verdict
        for name, op in ops.items():
            op.kernels.pop(library, None)
            if registered.get(name) is not None:
                op.kernels[library] = registered[name]
        kernels = importlib.import_module("llm_adapt.ops.kernels")
        if ours not in held and hasattr(kernels, library):
            delattr(kernels, library)


def _install(
    vendor: FakeVendor, modules: Mapping[str, Mapping[str, Callable[..., Any]]], known: Mapping[str, Contract]
) -> list[str]:
    """Put the modules and their parents into sys.modules and return their names."""
    made: list[str] = []
    for name, functions in modules.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in made:
                module = types.ModuleType(path)
                module.__path__ = []  # a package: submodules can be imported from it
                module.__spec__ = importlib.machinery.ModuleSpec(path, None)  # find_spec finds it
                sys.modules[path] = module
                made.append(path)
                if depth > 1:
                    setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], module)
        for function, compute in functions.items():
            contract = known.get(f"{name}.{function}") or known.get(function)
            # A function that only calls on, as a list of any arguments, has no contract of its own.
            setattr(sys.modules[name], function, vendor.recorded(contract, compute) if contract else compute)
    return made
