"""Tolerances: how far a kernel may be from the float64 reference, and where each number comes from.

The error of an element is compared with rtol * (|expected| + rms(expected)): relative for large elements, and for
small ones relative to the tensor, since a sum of large terms that cancel cannot be exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

__all__ = ["DEFAULT", "Tolerance"]

# One rounding changes a value by at most u = 2^-8 (bfloat16), 2^-11 (float16), 2^-24 (float32) of it. A fused kernel
# rounds its result once; one that follows upstream and rounds between its steps (cast before multiply) up to four
# times. float32: a sum of 10 000 terms in any order loses about sqrt(10 000) roundings.
_FORWARD = {
    torch.float64: 1e-11,
    torch.float32: 100 * 2.0**-24,
    torch.float16: 4 * 2.0**-11,
    torch.bfloat16: 4 * 2.0**-8,
}


@dataclass(frozen=True)
class Tolerance:
    """Relative tolerance by dtype for outputs, and the factor by which gradients may differ more.

    Attributes:
        forward: dtype -> rtol of outputs; missing dtypes: the defaults above.
        backward_factor: gradients pass through more roundings: the op's inputs are rounded, then its output.
        steps: how far integers may be off: 1 for a quantiser that may round halves up or to even.
        why: where numbers that are not the defaults come from.
    """

    forward: dict[torch.dtype, float] = field(default_factory=dict)
    backward_factor: float = 2.0
    steps: int = 0
    why: str = ""

    def rtol(self, dtype: torch.dtype, is_gradient: bool = False) -> float:
        """Relative tolerance of results of one dtype.

        Dtypes that are not floating point have none: they are compared exactly.
        """
        found = self.forward.get(dtype, _FORWARD.get(dtype, 0.0))
        return found * self.backward_factor if is_gradient else found


DEFAULT = Tolerance()
