"""Kernels that torch itself has, one family a file."""

from llm_adapt.ops.kernels.torch_native import (
    activations,
    attention,
    dropout,
    experts,
    losses,
    low_precision,
    norms,
    optimizer,
    products,
)

__all__ = [
    "activations",
    "attention",
    "dropout",
    "experts",
    "losses",
    "low_precision",
    "norms",
    "optimizer",
    "products",
]
