"""A class that looks like a norm, constructed and watched once: what its forward reads, and what speaks against it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch

from llm_adapt.frameworks.transformers.probe import NotRecognised, Watch, draw, parameters_of

__all__ = ["OTHER_SIZE", "SIZE", "Candidate", "flips", "forward_of"]

SIZE, OTHER_SIZE = 16, 24
_MOST_FLIPS = 3
_CASTING = ("layer_norm", "rms_norm")  # autocast runs these operators in float32, on some devices
_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_forward_hooks_with_kwargs", "_state_dict_hooks"),
)


@dataclass
class Candidate:
    """One kind of instance of a class, and what its forward reads.

    Attributes:
        arguments: of the constructor, besides a size.
        tensors: attributes that hold weight or bias.
        numbers: attributes that may hold eps -> the value that instances of this kind have.
        flags: attribute -> the value that instances of this kind have.
        sizes: attributes that hold H, or (H,).
        methods: attributes of the class that forward goes through.
        casts: it calls an operator that autocast treats apart.
    """

    cls: type
    arguments: dict[str, Any]
    forward: Any = None
    instance: Any = None
    tensors: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    sizes: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    casts: bool = False

    def __post_init__(self) -> None:
        self.forward = forward_of(self.cls)
        parameters = parameters_of(self.forward)
        if len(parameters) != 2:
            raise NotRecognised(f"its forward takes ({', '.join(p.name for p in parameters[1:])})")
        self.instance = self.make(SIZE)
        self._learn()

    def make(self, size: int) -> Any:
        """A new instance for rows of that size."""
        try:
            instance = self.cls(*_size_argument(self.cls, size), **self.arguments)
        except NotRecognised:
            raise
        except Exception as error:  # noqa: BLE001 - foreign code: the reason is told, and the class left alone
            raise NotRecognised(f"its constructor raises {_told(error)}") from None
        if not isinstance(instance, torch.nn.Module) or type(instance) is not self.cls:
            raise NotRecognised(f"its constructor makes a {type(instance).__name__}")
        if instance._modules:
            raise NotRecognised(f"it holds modules of its own: {', '.join(instance._modules)}")
        if "forward" in vars(instance) or any(vars(instance).get(name) for name in _HOOKS):
            raise NotRecognised("its instances carry hooks")
        return instance.float()  # the default dtype of the moment may be another

    def run(self, x: torch.Tensor, eps: tuple[str, float], vectors: dict[str, torch.Tensor], size: int = SIZE) -> Any:
        """forward(x) with these tensors, and this value in the attribute that holds eps ("" = none does)."""
        instance = self.instance if size == SIZE else self.make(size)
        for name, vector in vectors.items():
            instance._buffers.pop(name, None)
            instance._parameters[name] = torch.nn.Parameter(vector, requires_grad=vector.requires_grad)
        if eps[0]:
            setattr(instance, *eps)
        try:
            return self.forward(instance, x)
        except Exception as error:  # noqa: BLE001 - foreign code: the reason is told, and the class left alone
            raise NotRecognised(f"its forward raises {_told(error)}") from None
        finally:
            if eps[0]:
                setattr(instance, eps[0], self.numbers[eps[0]])

    def _learn(self) -> None:
        x, watch = draw(1, 2, 3, SIZE).clone(), Watch()
        with watch.attributes_of(self.instance), watch, torch.no_grad():
            self.run(x, ("", 0.0), {})
        watch.check_steady()
        if watch.writes or x._version:
            raise NotRecognised("its forward changes its instance, or its input")
        self.casts = any(part in name for name in watch.operators for part in _CASTING)
        other = self.make(OTHER_SIZE)
        for name in watch.reads:
            self._sort(name, getattr(self.instance, name), getattr(other, name))

    def _sort(self, name: str, value: Any, other: Any) -> None:
        """Put an attribute that forward reads where it belongs."""
        if isinstance(value, torch.Tensor):
            if (value.shape, other.shape) != ((SIZE,), (OTHER_SIZE,)):
                raise NotRecognised(f"{name} has shape {tuple(value.shape)} for rows of {SIZE}")
            self.tensors.append(name)
        elif isinstance(inspect.getattr_static(self.cls, name, None), (FunctionType, property, staticmethod)):
            self.methods.append(name)
        elif value == other and (isinstance(value, float) or (value is None and "eps" in name)):
            self.numbers[name] = value
        elif value != other:
            if value not in (SIZE, (SIZE,)) or other not in (OTHER_SIZE, (OTHER_SIZE,)):
                raise NotRecognised(f"its forward reads {name}, which changes with the size and is none")
            self.sizes.append(name)
        elif value is None or isinstance(value, (bool, int, str)):
            self.flags[name] = value
        else:
            raise NotRecognised(f"its forward reads {name}, a {type(value).__name__}")


def forward_of(cls: Any) -> Any:
    """The class's own forward: not a replacement that it inherits."""
    return cls.forward.__wrapped__ if hasattr(cls.forward, "_llm_adapt_formulas") else cls.forward


def flips(cls: type) -> Iterator[dict[str, Any]]:
    """Arguments that turn over one flag of the constructor."""
    flags = [p for p in inspect.signature(cls).parameters.values() if isinstance(p.default, bool)]
    for parameter in flags[:_MOST_FLIPS]:
        yield {parameter.name: not parameter.default}


def _size_argument(cls: type, size: int) -> list[int]:
    """The size, where the first parameter of the constructor takes one.

    Raises:
        NotRecognised: the constructor needs more than a size.
    """
    parameters = list(inspect.signature(cls).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    takes_size = positional[0].default in (inspect.Parameter.empty, None) if positional else takes_any
    if positional and "config" in positional[0].name:
        raise NotRecognised(f"its constructor takes a {positional[0].name}")
    first = positional[:1] if takes_size else []
    needed = [
        p.name
        for p in parameters
        if p.default is p.empty and p not in first and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise NotRecognised(f"its constructor needs {', '.join(needed)}")
    return [size] if takes_size else []


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
