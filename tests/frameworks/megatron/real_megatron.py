"""Real Megatron-Core in this process, on one rank, with and without the operators; for the tests of the tables.

`megatron` is a fixture of a whole test module: patched with ops="off", so that Megatron keeps its own code, and
`served` puts the rows of given tables on top for the time of a block, as patch() does without ops="off".
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import llm_adapt
from llm_adapt.adapters.cpu import ADAPTER
from llm_adapt.frameworks.context import Context
from llm_adapt.patching.plan import Outcome, Plan
from llm_adapt.report import Report
from llm_adapt.settings import resolve

__all__ = [
    "BATCH",
    "SEQUENCE",
    "TABLES",
    "TOLERANCE",
    "VOCAB",
    "agree",
    "calling",
    "calls",
    "gradients",
    "model",
    "on_one_rank",
    "reseed",
    "served",
    "step",
]

VOCAB, SEQUENCE, BATCH, HIDDEN, HEADS = 64, 16, 2, 32, 4
# Largest difference relative to the largest number: a few units in the last place, through a few layers.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 6e-3}
TABLES = ("norms", "attention", "softmax", "rotary", "activations", "losses")


@contextlib.contextmanager
def on_one_rank() -> Iterator[None]:
    """Megatron-Core imported, its groups made and its generators seeded; all of it is gone afterwards."""
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed; run: pip install megatron-core==0.16.1")
    warnings.simplefilter("ignore")
    known = set(sys.modules)
    with llm_adapt.patched(device="cpu", ops="off"):
        torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state = importlib.import_module("megatron.core.parallel_state")
        try:
            parallel_state.initialize_model_parallel()
            reseed(7)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
    # The next test module, and tests of patch(), find a process without Megatron.
    names = {name for name in sys.modules if name.partition(".")[0] == "megatron"}
    for name in () if names & known else names:  # a part of a package, imported anew, would hold copies of the other
        del sys.modules[name]


def reseed(seed: int) -> None:
    """Put every generator that Megatron draws from into a known state."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    torch.manual_seed(seed)
    random.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


@contextlib.contextmanager
def served(*tables: str) -> Iterator[list[Outcome]]:
    """The rows of these tables in force, or of all; yields what became of them."""
    context = Context(ADAPTER, resolve({}, device="cpu"), Report())
    modules = [importlib.import_module(f"llm_adapt.frameworks.megatron.{name}") for name in tables or TABLES]
    plan = Plan([row for module in modules for row in module.rows(context)])
    plan.apply()
    try:
        yield plan.outcomes()
    finally:
        assert plan.undo() == []


def calls(op: str) -> int:
    """How often the op was called so far, in this process."""
    from llm_adapt.ops.dispatch.receipt import receipt

    return sum(row["calls"] for row in receipt() if row["op"] == op)


@contextlib.contextmanager
def calling(op: str, times: int = 1) -> Iterator[None]:
    """The block calls the op that often."""
    before = calls(op)
    yield
    assert calls(op) - before == times, op


def model(normalization: str, dtype: torch.dtype = torch.float32, seed: int = 11, **values: Any) -> Any:
    """A small GPT of the local spec, with the fusions that Megatron's scripts ask for."""
    gpt = importlib.import_module("megatron.core.models.gpt")
    specs = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    transformer = importlib.import_module("megatron.core.transformer")
    reseed(seed)
    spec_values = {"qk_layernorm": values.get("qk_layernorm", False), "normalization": normalization}
    settings = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "bias_dropout_fusion": True,
        "bias_activation_fusion": True,
        "masked_softmax_fusion": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "gradient_accumulation_fusion": False,
    }
    config = transformer.TransformerConfig(normalization=normalization, **{**settings, **values})
    spec = specs.get_gpt_layer_local_spec(**spec_values)
    return gpt.GPTModel(config, spec, VOCAB, SEQUENCE, position_embedding_type="rope").cuda().to(dtype)


def step(gpt: Any, with_mask: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of one batch, and the gradient of every parameter."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=generator)
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE).tril() < 0.5 if with_mask else None
    gpt.zero_grad(set_to_none=True)
    losses = gpt(tokens, positions, mask, labels=tokens.roll(-1, 1))
    losses.float().mean().backward()
    found = {name: parameter.grad.clone() for name, parameter in gpt.named_parameters() if parameter.grad is not None}
    assert len(found) == len(list(gpt.parameters()))
    return losses.detach(), found


def gradients(function: Callable[..., torch.Tensor], *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The result on copies of these tensors, and its gradients for an upstream gradient that is drawn once."""
    leaves = [
        tensor.detach().clone().requires_grad_(tensor.is_floating_point()) if tensor is not None else None
        for tensor in tensors
    ]
    y = function(*leaves)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    y.backward(upstream)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def agree(found: Any, expected: Any, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Both have the same shapes and dtypes, and the same numbers as far as the dtype carries them."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, torch.Tensor):
        found, expected = [found], [expected]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if b is None:
            continue
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if not b.numel():
            continue
        limit = factor * TOLERANCE[dtype] * max(1e-6, float(b.double().abs().max()))
        assert float((a.double() - b.double()).abs().max()) <= limit
