"""Triton's names for modules that define kernels at import and launch them on some other path.

Kernels can be defined; launching one raises. cdiv and next_power_of_2 are plain arithmetic and right.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["modules"]


class _Kernel:
    """A kernel that was defined and cannot be launched."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.fn, self.__name__, self.__doc__ = function, function.__name__, function.__doc__

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"Triton kernel {self.__name__} was launched; Triton is not installed. Install the vendor's Triton, "
            "or switch the feature that needs this kernel off."
        )

    __call__ = __getitem__ = run = warmup = _refuse


def _decorator(*args: Any, **options: Any) -> Any:
    """`@triton.jit`, `@triton.jit(...)` and the like."""
    if len(args) == 1 and callable(args[0]) and not options:
        return args[0] if isinstance(args[0], _Kernel) else _Kernel(args[0])
    return _decorator


def modules() -> dict[str, ModuleType]:
    """triton and triton.language."""
    triton, language = ModuleType("triton", __doc__), ModuleType("triton.language", __doc__)
    triton.__path__ = []
    for name in ("jit", "autotune", "heuristics"):
        setattr(triton, name, _decorator)
    triton.cdiv = lambda x, y: -(-x // y)  # type: ignore[attr-defined]
    triton.next_power_of_2 = lambda n: 1 << max(0, n - 1).bit_length()  # type: ignore[attr-defined]
    triton.Config = dict  # type: ignore[attr-defined]
    triton.language = language  # type: ignore[attr-defined]
    language.constexpr = type("constexpr", (), {})  # type: ignore[attr-defined]
    return {"triton": triton, "triton.language": language}
