"""Our own kernels in Triton, one family a file: for CUDA, and for the Tritons of Ascend, Cambricon and DTK.

They use what those have in common: loads, stores and reductions of blocks, no inline assembly, no atomics, no
assumption about warps, one axis of programs, and loops over columns, so that any size works. They compute in float32.
They ran in the interpreters of Triton 3.2.0 and 3.9.0, were compiled for NVIDIA and AMD without a device, and passed
the part of triton-ascend 3.2.0 that needs no CANN. An NVIDIA H200 has run them (Triton 3.6.0); no AMD GPU, NPU or MLU
has, and nothing is known of their speed there.

The Triton that is installed is imported here by its own name, which is not this package's: imports are absolute.
"""

from llm_adapt.ops.kernels.triton import gated, losses, norms, rotary

__all__ = ["gated", "losses", "norms", "rotary"]
