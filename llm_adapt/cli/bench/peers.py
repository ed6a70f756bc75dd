"""Peers: what packages offer beside the kernel libraries of llm_adapt, and torch's other ways of doing the same.

A package is imported when its kernels are asked for; one that is absent is listed with the reason. Liger, apex,
TransformerEngine, flash-attn and the vendors' packages are kernel libraries already (llm_adapt/ops/kernels): they are
asked about every call whether or not they are in this device's order.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_adapt.cli.bench.counterparts import only
from llm_adapt.ops.dispatch.call import Call
from llm_adapt.ops.dispatch.registry import Kernel

__all__ = ["PEERS", "inductor", "peers_of"]


def _not_on_cpu(call: Call) -> str | None:
    return "runs on the devices of Triton" if call.device == "cpu" else None


def _flag_gems() -> dict[str, Kernel]:
    """FlagGems. Source: src/flag_gems/ops/rms_norm.py and fused/silu_and_mul.py at FlagGems 30820dd."""
    gems = importlib.import_module("flag_gems")

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Any:
        return gems.rms_norm(x, x.shape[-1:], weight, eps)

    def glu(x: Tensor, up: Tensor) -> Any:
        return gems.silu_and_mul(x, up)

    functions: dict[str, Callable[..., Any]] = {"rms_norm": rms_norm, "glu": glu}
    return {op: Kernel(op, "flag_gems", call, "FlagGems", _not_on_cpu) for op, call in functions.items()}


def _torch_foreach() -> dict[str, Kernel]:
    """torch.optim.AdamW(foreach=True), which is not the default on the CPU."""
    update = importlib.import_module("torch.optim.adamw").adamw

    def adamw(
        params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], lr: float,
        beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
    ) -> None:  # fmt: skip
        steps = [torch.tensor(float(step - 1)) for _ in params]
        with torch.no_grad():
            update(
                params, grads, exp_avgs, exp_avg_sqs, [], steps, foreach=True, amsgrad=False,
                beta1=beta1, beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps, maximize=False,
            )  # fmt: skip

    return {"adamw": Kernel("adamw", "torch_foreach", adamw, "torch.optim.AdamW(foreach=True)")}


def _experts_loop() -> dict[str, Kernel]:
    """experts_implementation="eager" of transformers, SequentialMLP of Megatron-Core."""
    eager = importlib.import_module("llm_adapt.cli.bench.eager")
    kernel = Kernel("grouped_gemm", "experts_loop", eager.experts_loop, "PyTorch: a loop over the experts")
    return {"grouped_gemm": kernel}


def _torch_sdpa() -> dict[str, Kernel]:
    """attn_implementation="sdpa" of transformers, which is its default."""

    def attention(q: Tensor, k: Tensor, v: Tensor, layout: str, causal: str) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    takes = only(layout="bhsd", causal="bottom_right")
    return {"attention": Kernel("attention", "torch_sdpa", attention, "scaled_dot_product_attention", takes)}


# Name on the command line -> its kernels; the import inside says why it cannot be used.
PEERS: dict[str, Callable[[], dict[str, Kernel]]] = {
    "experts_loop": _experts_loop,
    "flag_gems": _flag_gems,
    "torch_foreach": _torch_foreach,
    "torch_sdpa": _torch_sdpa,
}


@functools.cache
def peers_of(name: str) -> tuple[dict[str, Kernel], str]:
    """The kernels of a peer by op, and why there are none ("" when there are)."""
    try:
        return PEERS[name](), ""
    except Exception as error:  # noqa: BLE001 - kept, and shown for every op that the peer would have served
        return {}, f"{type(error).__name__}: {error}".partition("\n")[0]


def inductor(kernel: Kernel) -> Kernel:
    """A formulation as torch.compile makes it, for the very shapes of a call."""
    torch._dynamo.reset()
    function = torch.compile(kernel.function, dynamic=False)
    return Kernel(kernel.op, "inductor", function, f"torch.compile of {kernel.source}", kernel.refuses)
