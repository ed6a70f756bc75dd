"""Megatron's grouped experts by the operator grouped_gemm.

GroupedMLP takes its products from the package grouped_gemm, which is CUDA only; a stand-in has the one function that it
calls. Its activation is the operators' too (activations.py). A rank without tokens multiplies by whole weights, as
Megatron does, so that every weight has a gradient.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron.seams import seam
from llm_adapt.patching import Row

__all__ = ["package_or_stand_in", "rows", "stand_in_of"]


def rows(context: Context) -> list[Row]:
    """The package and its `ops` as grouped_gemm_util holds them; none where the package is installed."""
    if not context.serves_operators or importlib.util.find_spec("grouped_gemm") is not None:
        return []
    target, reason = "megatron.core.transformer.moe.grouped_gemm_util", "operator grouped_gemm for the CUDA package"
    return [
        seam(f"{target}:grouped_gemm", package_or_stand_in, reason),
        seam(f"{target}:ops", stand_in_of("ops"), reason),
    ]


def package_or_stand_in(original: Any) -> Any:
    """The package that Megatron found, else the stand-in."""
    return _stand_in() if original is None else original


def stand_in_of(name: str) -> Any:
    """The package's module of that name as Megatron found it, else the stand-in's."""
    return lambda original: getattr(_stand_in(), name) if original is None else original


def _stand_in() -> Any:
    from llm_adapt.frameworks.stand_ins.grouped_gemm import modules

    return modules()["grouped_gemm"]
