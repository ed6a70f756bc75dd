"""DCU chips: what public sources say of each, and nothing else.

Source: chips and gfx codes of apex-das (README), aiter-das (arch_info) and vllm-plugin-das; names as torch prints them
from records on BW cards; float8 and torch._scaled_mm from the same records. The capability is HIP's convention (the
digits of gfx9xx); the exact tuples are not published.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CHIPS", "Chip"]


@dataclass(frozen=True)
class Chip:
    """One DCU.

    Attributes:
        gfx: its architecture, as gcnArchName begins.
        name: what torch.cuda.get_device_name answers; "" where that is not public.
        has_bfloat16: Hygon shows training in bfloat16 on it; False where nothing public says so.
        has_fp8_matmul: torch._scaled_mm multiplies float8 on it.
    """

    gfx: str
    name: str = ""
    has_bfloat16: bool = False
    has_fp8_matmul: bool = False

    @property
    def capability(self) -> tuple[int, int]:
        """Major and minor: gfx936 -> (9, 3)."""
        return int(self.gfx[3]), int(self.gfx[4])


CHIPS = {
    "BW1000": Chip("gfx936", "BW", has_bfloat16=True),
    "BW1100": Chip("gfx938", "BW1101", has_bfloat16=True, has_fp8_matmul=True),
    "K200_AI": Chip("gfx92a", has_fp8_matmul=True),
    "K100_AI": Chip("gfx928"),
    "K100": Chip("gfx926"),
    "Z100": Chip("gfx906"),
}
