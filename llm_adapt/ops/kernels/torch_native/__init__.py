"""Kernels that torch itself has, one family a file."""

from llm_adapt.ops.kernels.torch_native import activations, attention, losses, norms, optimizer, products

__all__ = ["activations", "attention", "losses", "norms", "optimizer", "products"]
