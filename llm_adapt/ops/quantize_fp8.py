"""fp8 with one scale for a tensor or for each block of it. M and K = rows and columns, 128 = side of a block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.nn import functional as F

from llm_adapt.ops.dispatch import fused_op
from llm_adapt.ops.dispatch.tolerances import Tolerance

__all__ = ["quantize_fp8"]

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
BLOCKS = {"1x128": (1, 128), "128x128": (128, 128)}
_LARGEST = torch.finfo(torch.float32).max
_EXPONENT = -(2**23)  # as int32 0xFF800000: sign and exponent of a float32


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    yield {"x": draw(2, 8, 64)}
    yield {"x": draw(5, 33) * 100, "scale": torch.tensor(3.0), "format": "e5m2"}
    yield {"x": draw(3, 2, 200), "block": "1x128", "power_of_two": True, "min_amax": 1e-4}
    yield {"x": draw(130, 140), "block": "128x128", "format": "e5m2"}
    yield {"x": torch.zeros(2, 130, dtype=dtype), "block": "1x128"}
    yield {"x": draw(0, 16)}


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"x": torch.randn(shape, generator=generator).to(dtype), "block": "1x128", "power_of_two": True}


# oracle=None: the result is a rounding, which is another one where a last bit of the input differs.
@fused_op(
    inputs=_inputs,
    differentiable=(),
    oracle=None,
    example=_example,
    sizes={"4096 wide": (4096, 4096)},
    tolerance=Tolerance(
        {torch.float8_e4m3fn: 2.0**-3, torch.float8_e5m2: 2.0**-2},
        why="one step of the format: x * scale and x / scale_inv differ in their last bit, and round to neighbours",
    ),
)
def quantize_fp8(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    format: Literal["e4m3", "e5m2"] = "e4m3",
    block: Literal["tensor", "1x128", "128x128"] = "tensor",
    power_of_two: bool = False,
    min_amax: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q = fp8(x * scale), to the nearest, beyond the largest number the largest; scale_inv = 1 / scale; amax = max |x|.

    scale: of the whole tensor, from earlier amax (delayed scaling, `fp8_scale_update`). None: largest number / amax of
        the tensor, or of each block of 1 x 128 or 128 x 128 elements, where the last ones may be smaller.
    power_of_two: a scale that is computed here is rounded down to a power of two.
    min_amax: an amax below it counts as it. A scale that would not be finite is the largest float32, that of an amax of
        0, inf or nan is 1.

    Shapes: x [..., K], or [M, K] for 128x128; scale [] or [1] -> q as x; scale_inv and amax [], or
        [..., ceil(K / 128)], or [ceil(M / 128), ceil(K / 128)].
    Dtypes: computed in float32, which is the dtype of scale_inv and amax; q float8_e4m3fn or float8_e5m2; no gradient.
    Raises: ValueError for shapes and options that do not fit.
    Source: Micikevicius et al. 2022 (FP8 formats); TransformerEngine 2 common/recipe/recipe_common.cuh
        (DelayedScaling, Float8CurrentScaling, Float8BlockScaling); DeepSeek-V3 2024, section 3.3.2.
    """
    return to_fp8(x.detach(), None if scale is None else scale.detach(), format, block, power_of_two, min_amax)


def to_fp8(
    x: torch.Tensor, scale: torch.Tensor | None, format: str, block: str, power_of_two: bool, min_amax: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `quantize_fp8`, for references of other ops."""
    _check(x, scale, format, block, power_of_two, min_amax)
    wide, largest = x.float(), torch.finfo(FORMATS[format]).max
    amax = _amax(wide, block)
    if scale is None:
        scale = _scale(amax, largest, power_of_two, min_amax)
    else:
        scale = scale.float().reshape(())
    scaled = times_scale(wide, scale, block)
    return scaled.clamp_(-largest, largest).to(FORMATS[format]), 1 / scale, amax


def times_scale(x: torch.Tensor, scale: torch.Tensor, block: str) -> torch.Tensor:
    """x times the scale of each block. Whole blocks of a row need no scale of the size of x."""
    if block == "1x128" and x.shape[-1] % 128 == 0:
        return (x.view(*scale.shape, 128) * scale.unsqueeze(-1)).view(x.shape)
    return x * spread(scale, x.shape, block)


def spread(scale: torch.Tensor, shape: torch.Size, block: str) -> torch.Tensor:
    """The scale of each element, or the one of them all."""
    if block == "tensor":
        return scale.reshape(())
    rows, columns = BLOCKS[block]
    scale = scale.repeat_interleave(columns, dim=-1)[..., : shape[-1]]
    return scale if rows == 1 else scale.repeat_interleave(rows, dim=0)[: shape[0]]


def _amax(x: torch.Tensor, block: str) -> torch.Tensor:
    """Largest magnitude of the tensor or of each block; 0 of nothing."""
    if block == "tensor":
        return x.abs().amax() if x.numel() else x.new_zeros(())
    rows, columns = BLOCKS[block]
    if rows == 1 and x.shape[-1] % columns == 0:
        found: torch.Tensor = x.unflatten(-1, (-1, columns)).abs().amax(-1)
        return found
    flat = x.reshape(-1, x.shape[-1])
    padded = F.pad(flat, (0, -flat.shape[1] % columns, 0, -flat.shape[0] % rows))
    tiles = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    found = tiles.abs().amax((1, 3))
    return found if rows > 1 else found.view(*x.shape[:-1], found.shape[-1])


def _scale(amax: torch.Tensor, largest: float, power_of_two: bool, min_amax: float) -> torch.Tensor:
    """The scale that takes amax to the largest number of the format."""
    if min_amax:
        amax = amax.clamp(min=min_amax)
    scale = (largest / amax).clamp_(max=_LARGEST)
    scale = torch.where((amax > 0) & (amax < torch.inf), scale, 1)
    return (scale.view(torch.int32) & _EXPONENT).view(torch.float32) if power_of_two else scale


def _check(
    x: torch.Tensor, scale: torch.Tensor | None, format: str, block: str, power_of_two: bool, min_amax: float
) -> None:
    """Refuse what does not fit."""
    if format not in FORMATS:
        raise ValueError(f"quantize_fp8: format={format!r} is unknown; give 'e4m3' or 'e5m2'.")
    if block != "tensor" and block not in BLOCKS:
        raise ValueError(f"quantize_fp8: block={block!r} is unknown; give 'tensor', '1x128' or '128x128'.")
    if block == "128x128" and x.ndim != 2:
        raise ValueError(f"quantize_fp8: blocks of 128x128 are of a matrix; found x {tuple(x.shape)}.")
    if block == "1x128" and not x.ndim:
        raise ValueError("quantize_fp8: blocks of 1x128 are of rows; found a number.")
    if not min_amax >= 0:
        raise ValueError(f"quantize_fp8: min_amax={min_amax} was asked; give 0 or more.")
    if scale is not None and (scale.numel() != 1 or block != "tensor" or power_of_two or min_amax):
        raise ValueError(
            f"quantize_fp8: scale {tuple(scale.shape)} was given with block={block!r}, power_of_two={power_of_two}, "
            f"min_amax={min_amax}; a scale that is given is one number, and used as it is."
        )
