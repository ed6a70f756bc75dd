"""Probing: foreign code is run on tiny tensors, and what it computes is compared with what an op computes.

Names and sources tell nothing reliable: one body stands for two formulas where it calls another `rotate_half`, and
one formula is written in a dozen ways. Numbers tell, to the order of roundings. Nothing outside is changed by it: the
generators, the modes of torch, and the autograd engine, which must not have run before a process is forked.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "NotRecognised",
    "Watch",
    "draw",
    "gradients",
    "is_close",
    "only_close_one",
    "parameters_of",
    "share_apart",
    "undisturbed",
    "written",
]

_STEP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # the widest step between neighbours, relative
_MOST_APART = 0.02  # share of elements that another order of float32 sums may round otherwise
_LEAST_APART = 0.06  # share that another order of roundings changes at least: measured 0.2 to 0.5
_MACHINERY = {"_parameters", "_buffers", "_modules", "__dict__", "__class__"}
_UNSTEADY = ("rand", "bernoulli", "dropout", "multinomial", "normal_", "_local_scalar_dense")


class NotRecognised(Exception):
    """Why a class or function is left as it is."""


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Probe inside: modes, devices and autocast of the caller do not reach in, and its generator is as before."""
    state = torch.get_rng_state()
    with contextlib.ExitStack() as stack:
        if torch._C._len_torch_dispatch_stack():
            # Only then: it imports half of torch's compiler, which is there when such a mode is.
            from torch.utils._python_dispatch import _disable_current_modes

            stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C.DisableTorchFunction())  # type: ignore[attr-defined]
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        try:
            yield
        finally:
            if not torch.equal(state, torch.get_rng_state()):
                torch.set_rng_state(state)


@functools.cache
def draw(seed: int, *sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers from -3 to 3 and so, the same for every candidate; nobody may write to them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sizes, generator=generator, device="cpu", dtype=torch.float32).to(dtype)


def parameters_of(function: Any) -> list[inspect.Parameter]:
    """The parameters of a plain Python function.

    Raises:
        NotRecognised: it is something else, such as a module of the kernels package.
    """
    if not isinstance(function, FunctionType):
        raise NotRecognised(f"is a {type(function).__name__}, not a plain function")
    parameters = list(inspect.signature(function).parameters.values())
    if any(p.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters):
        raise NotRecognised(f"takes ({', '.join(str(p).partition(':')[0] for p in parameters)})")
    return parameters


# -- comparing ----------------------------------------------------------------------------------------------------


def is_close(found: Any, expected: torch.Tensor, rtol: float = 2e-5) -> bool:
    """Whether a float32 result is the float64 one, on the scale of the whole tensor where terms cancel."""
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape or found.dtype != torch.float32:
        return False
    error = (found.double() - expected).abs()
    scale = expected.abs() + expected.square().mean().sqrt()
    return bool((error <= rtol * scale).all())


def share_apart(found: Any, expected: torch.Tensor) -> float:
    """Share of the elements that are not the same; 1 where one is off by more than a step of the narrow dtype."""
    if not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return 1.0
    a, b = found.double(), expected.double()
    error = (a - b).abs()
    if not bool((error <= _STEP.get(found.dtype, _STEP[torch.bfloat16]) * b.abs() * 1.01 + 1e-6).all()):
        return 1.0
    # float32 holds a value that was rounded before, or was not: a few of its own steps are neither.
    exact = 0.0 if found.dtype in _STEP else 2.0**-21
    return float((error > exact * b.abs()).double().mean())


def only_close_one(found: Any, expected: dict[Any, torch.Tensor]) -> Any:
    """The key of the expected result whose roundings the found one has; None where none, or more than one, fits."""
    apart = {key: share_apart(found, value) for key, value in expected.items()}
    best = min(apart, key=lambda key: apart[key])
    others = [share for key, share in apart.items() if key != best]
    return best if apart[best] <= _MOST_APART and all(share >= _LEAST_APART for share in others) else None


def gradients(y: torch.Tensor, dy: torch.Tensor, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """The gradients of the leaves, node by node.

    Not by backward(): once the autograd engine has threads of a device, torch refuses gradients in forked children.
    """
    if y.grad_fn is None:
        return [None for _ in leaves]
    pending: dict[Any, dict[int, torch.Tensor]] = {y.grad_fn: {y.output_nr: dy}}
    found: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for node in _from_the_end(y.grad_fn):
            given = pending.pop(node, None)
            if given is None:
                continue
            if hasattr(node, "variable"):
                found[id(node.variable)] = given[0]
                continue
            results = node(*(given.get(place) for place in range(len(node._input_metadata))))
            results = results if isinstance(results, tuple) else (results,)
            for (following, place), gradient in zip(node.next_functions, results, strict=False):
                if following is not None and gradient is not None:
                    sums = pending.setdefault(following, {})
                    fitted = _fitted(gradient, following, place)
                    sums[place] = sums[place] + fitted if place in sums else fitted
    return [found.get(id(leaf)) for leaf in leaves]


def _fitted(gradient: torch.Tensor, node: Any, place: int) -> torch.Tensor:
    """A gradient as the engine hands it over: summed over axes that were broadcast, in the dtype of what it is of."""
    wanted = node.variable if hasattr(node, "variable") else node._input_metadata[place]
    return gradient.sum_to_size(tuple(wanted.shape)).to(wanted.dtype)


def _from_the_end(root: Any) -> list[Any]:
    """Every node of a graph, each before those it hands gradients to."""
    order: list[Any] = []
    seen = set()
    stack = [(root, False)]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    return order[::-1]


# -- watching -----------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """What runs inside: the operators that it calls, and the attributes that it reads of and writes to an object.

    Attributes:
        operators: names as torch spells them, "aten.mul".
        reads, writes: names of attributes, in their order.
        is_wide: something was float64.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: dict[str, None] = {}
        self.reads: dict[str, None] = {}
        self.writes: dict[str, None] = {}
        self.is_wide = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators[str(func.overloadpacket)] = None
        result = func(*args, **(kwargs or {}))
        self.is_wide = self.is_wide or (isinstance(result, torch.Tensor) and result.dtype == torch.float64)
        return result

    def check_steady(self) -> None:
        """Raise NotRecognised for what draws random numbers, reads values on the host, or computes in float64."""
        if self.is_wide:
            raise NotRecognised("it computes in float64, on purpose")
        for name in self.operators:
            if any(part in name for part in _UNSTEADY):
                raise NotRecognised(f"calls {name}")

    @contextlib.contextmanager
    def attributes_of(self, instance: Any) -> Iterator[None]:
        """Watch an object too."""
        kind = type(instance)
        instance.__class__ = _watched(kind, self)
        try:
            yield
        finally:
            instance.__class__ = kind


def _watched(kind: Any, watch: Watch) -> type:
    """A subclass that tells of each attribute that is read or written."""

    def read(self: Any, name: str) -> Any:
        if name not in _MACHINERY:
            watch.reads[name] = None
        return kind.__getattribute__(self, name)

    def write(self: Any, name: str, value: Any) -> None:
        if name not in _MACHINERY:
            watch.writes[name] = None
        kind.__setattr__(self, name, value)

    return type(kind.__name__, (kind,), {"__getattribute__": read, "__setattr__": write})


def written(body: str, name: str, names: dict[str, Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """A function from the text of its body, with the parameters and the name of the original.

    Written out, as dataclasses writes __init__: a function that takes anything would have to bind its arguments at
    each call. What it uses is in its closure, where the search for copies of the original expects it.

    Args:
        body: its lines, which may call `_original`.
        names: what else they use.
    """
    parameters = parameters_of(original)
    inside = {f"_default_{p.name}": p.default for p in parameters} | names | {"_original": original}
    listed = ", ".join(p.name if p.default is p.empty else f"{p.name}=_default_{p.name}" for p in parameters)
    lines = [f"def make({', '.join(inside)}):", f"    def {name}({listed}):"]
    lines += [textwrap.indent(body, " " * 8), f"    return {name}"]
    space: dict[str, Any] = {}
    exec(compile("\n".join(lines), f"<llm_adapt for {original.__module__}.{original.__qualname__}>", "exec"), space)
    return functools.wraps(original)(space["make"](**inside))
