"""What a forward computes, found out on an instance without __init__ and with tiny submodules.

x [rows, W]: the hidden states; W = width, I = inner width. All in float64: formulas are compared, not roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from llm_adapt.frameworks.transformers.probe import NotRecognised
from llm_adapt.ops.activation import FUNCTIONS
from llm_adapt.ops.glu import LAYOUTS, split

__all__ = ["asked_names", "computes"]

_WIDTH, _INNER = 6, 4
_SIZES = {"gate": (_WIDTH, _INNER), "up": (_WIDTH, _INNER), "packed": (_WIDTH, 2 * _INNER), "down": (_INNER, _WIDTH)}
_MOST_SUBMODULES = 4


class _Product(torch.nn.Module):
    """A projection with a bias, of numbers that are the same each time and nobody else's."""

    def __init__(self, columns: int, results: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(columns + 1, results, generator=generator, dtype=torch.float64, device="cpu")
        self.matrix, self.constant = drawn[:-1], drawn[-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x @ matrix + constant."""
        return x @ self.matrix + self.constant


class _Act(torch.nn.Module):
    """An activation made of any function."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The function of x."""
        return self.function(x)


class _Echo(torch.nn.Module):
    """A submodule that says that it was called, and gives back what it got."""

    def __init__(self, name: str, called: list[str]) -> None:
        super().__init__()
        self.name, self.called = name, called

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x."""
        self.called.append(self.name)
        return x


def _odd(x: torch.Tensor) -> torch.Tensor:
    """No activation that anybody would build in."""
    return torch.sin(x) + 0.1 * x * x


_FREE = (_odd, FUNCTIONS["silu"], FUNCTIONS["relu"], FUNCTIONS["gelu_tanh"])


def _bare(cls: Any) -> Any:
    instance = cls.__new__(cls)
    torch.nn.Module.__init__(instance)
    return instance


def _run(instance: Any, x: torch.Tensor) -> Any:
    """Its forward. Raises NotRecognised for what foreign code may raise when it is asked for something else."""
    try:
        with torch.no_grad():
            return type(instance).forward(instance, x.clone())
    except Exception as error:  # foreign code on numbers that it was not written for
        raise NotRecognised(f"raises {type(error).__name__} with tiny projections") from error


def asked_names(cls: Any) -> list[str]:
    """The submodules that the forward calls, each once, in the order of their first call.

    Raises:
        NotRecognised: it asks for anything else of its instance, or for too much.
    """
    called: list[str] = []
    asked: list[str] = []

    def missing(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        asked.append(name)
        return _Echo(name, called)

    probe = type(cls.__name__, (cls,), {"__getattr__": missing})
    try:
        _run(_bare(probe), torch.ones(2, 8, dtype=torch.float64))
    finally:
        others = sorted(set(asked) - set(called))
        if others or len(called) != len(asked):
            raise NotRecognised(f"reads {', '.join(others) or 'a submodule twice'}")
    own = set(vars(cls)["forward"].__code__.co_names) & {name for name in dir(cls) if name not in _MODULE_NAMES}
    if own:
        raise NotRecognised(f"calls its own {', '.join(sorted(own))}, which a subclass may change")
    if not 2 <= len(called) <= _MOST_SUBMODULES:
        raise NotRecognised(f"calls {len(called)} submodules")
    return called


_MODULE_NAMES = frozenset(dir(torch.nn.Module)) - {"training"}


def computes(cls: Any, form: Any) -> bool:
    """Whether the forward gives the numbers of a form: in two and three axes, small and large, in training and not."""
    projections = {role: _Product(*_SIZES[role], seed) for seed, role in enumerate(_SIZES)}
    functions = _FREE if "act" in form.roles else (FUNCTIONS[form.activation],)
    for function in functions:
        instance = _bare(cls)
        for role, name in form.roles.items():
            setattr(instance, name, _Act(function) if role == "act" else projections[role])
        for x, training in _inputs():
            instance.train(training)
            try:
                found = _run(instance, x)
            except NotRecognised:  # these submodules do not fit one another in these roles
                return False
            expected = _formula(form, projections, function, x)
            if not isinstance(found, torch.Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
                return False
            if not torch.allclose(found, expected, rtol=1e-9, atol=1e-9):
                return False
    return True


def _inputs() -> Iterator[tuple[torch.Tensor, bool]]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 3, _WIDTH, generator=generator, dtype=torch.float64, device="cpu")
    yield x[0], True
    yield x, False
    yield 100.0 * x, True  # what clamps shows itself here


def _formula(form: Any, projections: Any, function: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    assert form.layout in LAYOUTS
    if "packed" in form.roles:
        gate, up = split(projections["packed"](x), form.layout)
    else:
        gate, up = projections["gate"](x), projections["up"](x)
    found: torch.Tensor = projections["down"](function(gate) * up)
    return found
