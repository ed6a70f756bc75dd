"""Kernels of our own in C++ with OpenMP for the CPU, one family a file; compiled where they are first used.

They compute in float32, read and write float32, bfloat16 and float16, and give the same bits for any number of threads.
"""

from llm_adapt.ops.kernels.openmp import gated, lists, losses, norms, rotary, softmax

__all__ = ["gated", "lists", "losses", "norms", "rotary", "softmax"]
