"""FusedOp and Kernel: what is computed, and who may compute it.

The reference *is* the op: its specification, its fallback and the oracle of every proof. A kernel is a function
with the op's parameters, less those that it does not honour; it has no way to drop one, because a call that gives
such an argument never reaches it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, ParamSpec, TypeVar

import torch

from llm_adapt.errors import KernelError
from llm_adapt.ops.dispatch.call import Call, same
from llm_adapt.ops.dispatch.tolerances import DEFAULT, Tolerance

__all__ = [
    "REFERENCE",
    "FusedOp",
    "Kernel",
    "all_ops",
    "find_op",
    "kernel",
    "library_names",
    "load_library",
    "op_names",
]

REFERENCE = "reference"  # the library name of every op's reference
ENTRY_POINTS = "llm_adapt.kernels"  # third-party kernel libraries: name -> module
P = ParamSpec("P")
R = TypeVar("R")
Refusal = Callable[[Call], str | None]
Inputs = Callable[[torch.Generator, torch.dtype], Iterator[dict[str, Any]]]


# Hidden states [B, S, H] as large models have them; the labels are those of `llm-adapt bench`.
HIDDEN_SIZES = {"Llama-3-8B": (1, 2048, 4096), "Qwen2.5-72B": (1, 2048, 8192)}
# Heads [B, S, H, D] of queries.
HEAD_SIZES = {"Llama-3-8B": (1, 2048, 32, 128), "Qwen2.5-72B": (1, 2048, 64, 128)}


def _never(call: Call) -> str | None:
    return None


@dataclass(frozen=True, eq=False)
class Kernel:
    """One implementation of an op.

    Attributes:
        op: name of the op.
        library: name of the kernel library, a module of llm_adapt.ops.kernels or of a third party.
        function: takes the op's parameters that it honours, under the op's names, in the op's order.
        source: document or file, with version, that the call was written from.
        refuses: call -> None, or the reason why this kernel cannot serve it. Sees facts, never values.
        has_backward: gradients flow through every differentiable output.
        no_gradient: tensors that it takes and gives no gradient of; it refuses calls that need one.
        inference_only: serves inside torch.inference_mode() alone.
        compilable: torch.compile traces it without a graph break.
        deterministic: the same inputs give the same bits.
        functorch: serves inside vmap, grad and jvp.
    """

    op: str
    library: str
    function: Callable[..., Any]
    source: str
    refuses: Refusal = _never
    has_backward: bool = True
    no_gradient: frozenset[str] = frozenset()
    inference_only: bool = False
    compilable: bool = False
    deterministic: bool = True
    functorch: bool = False

    @property
    def name(self) -> str:
        """The name in policies and reports: "library.op"."""
        return f"{self.library}.{self.op}"

    @property
    def honours(self) -> frozenset[str]:
        """Parameters of the op that it honours."""
        return frozenset(inspect.signature(self.function).parameters)


@dataclass(eq=False)
class FusedOp:
    """An op: its reference, what is needed to prove kernels of it, and the kernels registered so far.

    Attributes:
        reference: the PyTorch function that defines the op.
        inputs: (generator, dtype) -> keyword arguments of calls that together use every option; for tests,
            benchmarks and proofs of compiled code. Tensors are made on the CPU.
        tolerance: how far a kernel may be from the float64 reference.
        differentiable: parameters that may receive a gradient; all floating-point tensors unless given.
        mutates: parameters that are changed in place; they are results then, and there is no gradient.
        dynamic: options whose value is part of no key: numbers that change from call to call, not the kernel.
        hints: options that may help a kernel and change no result, so that a kernel need not take them.
        random: option that says how much is random; proofs set it to 0.
        autocast: parameters that are cast inside torch.autocast, as it casts the inputs of a product; without them
            the op computes in the dtypes it is given.
        oracle: dtype of the reference in proofs; None = the call's own (ops whose result is a rounding).
        shrink: arguments -> arguments of a smaller call that uses the same code; called above a size limit.
        example: (generator, dtype, shape of the first tensor) -> arguments of a common call; for explain and bench.
        sizes: label -> shape for example, as large models have it.
    """

    reference: Callable[..., Any]
    inputs: Inputs
    tolerance: Tolerance = DEFAULT
    differentiable: tuple[str, ...] | None = None
    mutates: tuple[str, ...] = ()
    dynamic: frozenset[str] = frozenset()
    hints: frozenset[str] = frozenset()
    random: str = ""
    autocast: tuple[str, ...] = ()
    oracle: torch.dtype | None = torch.float64
    shrink: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    example: Callable[[torch.Generator, torch.dtype, tuple[int, ...]], dict[str, Any]] | None = None
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kernels: dict[str, Kernel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.reference.__name__
        self.signature = inspect.signature(self.reference)
        self.kinds = _kinds(self.reference)
        self.lists = frozenset(name for name, kind in self.kinds.items() if kind == "tensors")
        named = {
            *(self.differentiable or ()),
            *self.mutates,
            *self.dynamic,
            *self.hints,
            *self.autocast,
            *filter(None, [self.random]),
        }
        unknown = named - set(self.signature.parameters)
        if unknown:
            raise KernelError(f"Op {self.name} was declared with {sorted(unknown)}, which its reference does not take.")

        self.defaults = {
            name: parameter.default
            for name, parameter in self.signature.parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }

    def samples(self, call: Call) -> Iterator[dict[str, Any]]:
        """Arguments from the op's own inputs that have the form of a call: the same tensors, its dtype and options.

        Floating-point options, such as a scale, are the call's: they change numbers, not what a kernel can do.
        """
        present = {name.partition("[")[0] for name in call.tensors}
        options = [name for name, kind in self.kinds.items() if kind == "option" and name in call.options]
        options = [name for name in options if name not in self.dynamic | self.hints]
        for given in self.inputs(torch.Generator().manual_seed(0), call.dtype or torch.float32):
            case = self.bind(**given)
            numbers = {name: call.options[name] for name in options if _are_numbers(call.options[name], case[name])}
            tensors = {name for name, kind in self.kinds.items() if kind != "option" and case[name] is not None}
            if tensors == present and all(same(case[n], call.options[n]) for n in options if n not in numbers):
                yield {name: _on(value, call.device) for name, value in (case | numbers).items()}

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Arguments of a call by name, defaults filled in."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def register(self, kernel: Kernel) -> None:
        """Add a kernel.

        Raises:
            KernelError: a parameter is unknown, out of order or has another default; or the library has one already.
        """
        mine = list(self.signature.parameters.values())
        theirs = list(inspect.signature(kernel.function).parameters.values())
        expected = [parameter for parameter in mine if parameter.name in {item.name for item in theirs}]
        if [(p.name, p.default) for p in theirs] != [(p.name, p.default) for p in expected]:
            raise KernelError(
                f"Kernel {kernel.name} was registered with the parameters\n  {_spell(theirs)}\n"
                f"the op has\n  {_spell(mine)}\nTake the op's parameters, in its order, with its defaults; leave out "
                "only those that the kernel does not honour."
            )
        required = {p.name for p in mine if p.default is inspect.Parameter.empty} - {p.name for p in theirs}
        if required:
            raise KernelError(f"Kernel {kernel.name} does not take {sorted(required)}, which every call gives.")
        if kernel.library in self.kernels or kernel.library == REFERENCE:
            raise KernelError(f"Kernel {kernel.name} was registered; there is one of that name already.")
        self.kernels[kernel.library] = kernel


def _are_numbers(asked: Any, sample: Any) -> bool:
    return isinstance(asked, float) and (sample is None or isinstance(sample, float))


def _on(value: Any, device: str) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_on(item, device) for item in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _kinds(reference: Callable[..., Any]) -> dict[str, str]:
    """Parameter -> "tensor", "tensors" (a list of them) or "option", by its annotation."""
    kinds = {}
    for name, hint in typing.get_type_hints(reference).items():
        members = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
        if torch.Tensor in members:
            kinds[name] = "tensor"
        elif any(torch.Tensor in typing.get_args(member) for member in members):
            kinds[name] = "tensors"
        else:
            kinds[name] = "option"
    kinds.pop("return", None)
    missing = set(inspect.signature(reference).parameters) - set(kinds)
    if missing:
        raise KernelError(f"The reference of op {reference.__name__} has no annotation for {sorted(missing)}.")
    return kinds


def _spell(parameters: list[inspect.Parameter]) -> str:
    return ", ".join(p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default!r}" for p in parameters)


_OPS: dict[str, FusedOp] = {}


def add_op(op: FusedOp) -> None:
    """Make an op known. Raises KernelError when the name is taken."""
    if op.name in _OPS:
        raise KernelError(f"Op {op.name} was declared twice.")
    _OPS[op.name] = op


def op_names() -> list[str]:
    """Names of all ops of llm_adapt and of those that third parties declared so far."""
    return sorted(all_ops())


def all_ops() -> Mapping[str, FusedOp]:
    """Name -> op. Imports every module of llm_adapt.ops: in that folder, each file is an op."""
    package = importlib.import_module("llm_adapt.ops")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.ispkg:
            importlib.import_module(f"llm_adapt.ops.{module.name}")
    return _OPS


def find_op(name: str) -> FusedOp:
    """The op of that name.

    Raises:
        KernelError: there is none; with the nearest names.
    """
    found = _OPS.get(name) or all_ops().get(name)
    if found is None:
        near = difflib.get_close_matches(name, _OPS, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"There are: {', '.join(sorted(_OPS))}."
        raise KernelError(f"Op {name!r} was asked; there is none of that name. {hint}")
    return found


def kernel(op: str, source: str, **fields: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as this module's kernel of an op. Fields as of Kernel."""

    def register(function: Callable[P, R]) -> Callable[P, R]:
        find_op(op).register(Kernel(op, _library_of(function.__module__), function, source, **fields))
        return function

    return register


def _library_of(module: str) -> str:
    """The library that a module belongs to: one of ours may be a package of several files."""
    prefix = "llm_adapt.ops.kernels."
    if module.startswith(prefix):
        return module.removeprefix(prefix).partition(".")[0]
    names = (point.name for point in entry_points(group=ENTRY_POINTS) if f"{module}.".startswith(f"{point.module}."))
    return next(names, module.rpartition(".")[2])


_LIBRARIES: dict[str, str] = {}  # library -> why it cannot be used, "" when it can


def load_library(library: str) -> str:
    """Import a kernel library, once; its kernels register themselves.

    Returns:
        "" or the reason why it cannot be used here. Never raises: the reason is what is reported.
    """
    if library not in _LIBRARIES:
        try:
            importlib.import_module(_module_of(library))
        except Exception as error:  # noqa: BLE001 - kept, and shown by every report and error that names the library
            _LIBRARIES[library] = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            _LIBRARIES[library] = ""
    return _LIBRARIES[library]


def library_names() -> list[str]:
    """Every kernel library that can be named: ours, third parties' and "reference"."""
    package = importlib.import_module("llm_adapt.ops.kernels")
    ours = {module.name for module in pkgutil.iter_modules(package.__path__)}
    return sorted(ours | {point.name for point in entry_points(group=ENTRY_POINTS)} | {REFERENCE} | set(_LIBRARIES))


def _module_of(library: str) -> str:
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == library:
            return point.module
    return f"llm_adapt.ops.kernels.{library}"
