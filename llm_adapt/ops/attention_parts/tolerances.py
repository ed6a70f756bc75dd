"""How far an attention kernel may be from the float64 reference, measured with the kernels of torch 2.13 on the CPU."""

import torch

from llm_adapt.ops.dispatch import Tolerance

__all__ = ["ATTENTION"]

ATTENTION = Tolerance(
    forward={torch.float32: 1000 * 2.0**-24, torch.float16: 8 * 2.0**-11, torch.bfloat16: 8 * 2.0**-8},
    backward_factor=4.0,
    why="exp passes on the absolute error of a score, which for scores of 30 (head size 128) is some 300 roundings of "
    "float32. 16-bit kernels round the weights before the product with V: by half a rounding of sum(p |v|), which in "
    "the first rows of a causal call of 2048 was 4 roundings of |out| + rms(out). In backward they also round the "
    "gradient of the scores, formed with the rounded output.",
)
