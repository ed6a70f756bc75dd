"""fused_weight_gradient_mlp_cuda, a compiled part of apex. input [T, I], d_output [T, O], main_grad [O, I].

Source: the calls in Hygon's Megatron adaptor (core/tensor_parallel/layers.py); it may not be imported before torch.
"""

from __future__ import annotations

from llm_adapt.simulators.dcu.das.limits import demand, demand_torch, missing

demand_torch("fused_weight_gradient_mlp_cuda")

import torch  # noqa: E402 - the check above must come first

__all__ = ["wgrad_gemm_accum_fp16", "wgrad_gemm_accum_fp32"]

__getattr__ = missing("fused_weight_gradient_mlp_cuda")

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def _accumulate(
    input: torch.Tensor, d_output: torch.Tensor, main_grad: torch.Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    demand(all(x.is_cuda for x in (input, d_output, main_grad)), "all tensors are on cuda")
    demand(input.dtype == d_output.dtype and input.dtype in _FLOATS, "input and d_output have one dtype, 16 or 32 bits")
    demand(input.is_contiguous() and d_output.is_contiguous() and main_grad.is_contiguous(), "all are contiguous")
    demand(main_grad.dtype in dtypes, f"main_grad is one of {dtypes}")
    rows, gradients = input.reshape(-1, input.shape[-1]), d_output.reshape(-1, d_output.shape[-1])
    demand(main_grad.shape == (gradients.shape[1], rows.shape[1]), "main_grad is [outputs, inputs]")
    main_grad.copy_(main_grad.float() + gradients.float().t() @ rows.float())


def wgrad_gemm_accum_fp32(input: torch.Tensor, d_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad += d_output^T input; main_grad in float32.

    Raises:
        RuntimeError: tensors that the kernel does not take.
    """
    _accumulate(input, d_output, main_grad, (torch.float32,))


def wgrad_gemm_accum_fp16(input: torch.Tensor, d_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """The same; main_grad in float16 or bfloat16, as input.

    Raises:
        RuntimeError: tensors that the kernel does not take.
    """
    _accumulate(input, d_output, main_grad, (input.dtype,) if input.dtype != torch.float32 else ())
