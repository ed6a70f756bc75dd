"""Megatron's mixture of experts reaches the operators, on one rank; run by test_moe.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.frameworks.megatron.moe_model import EVERYTHING, EXPERTS, TOPK, agree, model, same_with_and_without, trained
from tests.frameworks.megatron.served_rows import REFERENCES, served
from tests.parallel.on_ranks import check, main


@check
def sequential_experts(rank: int, size: int) -> None:
    """Softmax after the choice, in float32 and bfloat16."""
    same_with_and_without(moe_aux_loss_coeff=0.05, moe_z_loss_coeff=0.01)
    same_with_and_without(torch.bfloat16, moe_aux_loss_coeff=0.05, moe_z_loss_coeff=0.01)


@check
def sigmoid_scores_in_groups(rank: int, size: int) -> None:
    """DeepSeek's router: sigmoid, groups, scaling; with the losses of whole sequences and of the global batch."""
    same_with_and_without(**EVERYTHING)
    losses = ["seq_aux_loss", "global_aux_loss"]
    values = EVERYTHING | {"moe_router_load_balancing_type": losses, "moe_aux_loss_coeff": [0.05, 0.02]}
    same_with_and_without(**values)


@check
def softmax_before_the_choice(rank: int, size: int) -> None:
    """use_pre_softmax, which leaves probabilities that do not sum to 1."""
    same_with_and_without(moe_router_pre_softmax=True, moe_router_load_balancing_type="none")


@check
def grouped_experts(rank: int, size: int) -> None:
    """GroupedMLP trains without its CUDA package, as the same experts one after the other do."""
    same_with_and_without(torch.bfloat16, grouped=True)


@check
def dropped_and_padded(rank: int, size: int) -> None:
    """An expert's capacity: some tokens are dropped; with padding every expert has the same rows."""
    for pad in (False, True):
        same_with_and_without(moe_expert_capacity_factor=0.75, moe_pad_expert_input_to_capacity=pad)


@check
def all_gathered_tokens(rank: int, size: int) -> None:
    """The allgather dispatcher, which counts its rows by the map."""
    same_with_and_without(moe_token_dispatcher_type="allgather")


@check
def fused_permutation_without_transformer_engine(rank: int, size: int) -> None:
    """moe_permute_fusion and moe_router_fusion, which raise in Megatron, give what the unfused forms give."""
    values = {"moe_aux_loss_coeff": 0.05}
    expected = trained(model(**values))
    with pytest.raises((ImportError, ValueError), match="fused"):
        model(moe_permute_fusion=True)
    for ops in (None, REFERENCES):
        with served(ops):
            agree(trained(model(moe_permute_fusion=True, moe_router_fusion=True, **values)), expected, torch.float32)


@check
def rows_of_each_token_are_told(rank: int, size: int) -> None:
    """Kernels that need K rows of every token learn K without dropping, and do not where tokens are dropped."""
    from llm_adapt.ops.dispatch.dispatcher import dispatchers
    from llm_adapt.ops.moe_permute import moe_permute
    from llm_adapt.ops.moe_unpermute import moe_unpermute

    both = (moe_permute.op.name, moe_unpermute.op.name)

    def told() -> set[Any]:
        assert moe_permute.op.name == "moe_permute"
        calls = [
            item.example for name in ("moe_permute", "moe_unpermute") for item in dispatchers[name].bindings.values()
        ]
        return {call.options["topk"] for call in calls}

    for values, expected in (({}, {TOPK}), ({"moe_expert_capacity_factor": 0.75}, {None})):
        for name in both:
            dispatchers[name].start_over()
        with served(REFERENCES):
            trained(model(**values))
            assert told() == expected, (told(), expected)


@check
def weight_gradients_are_added_in_float32(rank: int, size: int) -> None:
    """gradient_accumulation_fusion leaves in main_grad what two backwards without it leave in grad."""
    from llm_adapt.ops.dispatch.dispatcher import dispatchers
    from llm_adapt.ops.wgrad_accumulate import wgrad_accumulate

    assert wgrad_accumulate.op.name in dispatchers
    for dtype in (torch.float32, torch.bfloat16):
        expected = trained(model(dtype))
        gpt = model(dtype, gradient_accumulation_fusion=True)
        for parameter in gpt.parameters():
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
            parameter.grad_added_to_main_grad = False  # Megatron sets it where the function has been called
        before = sum(item.calls for item in dispatchers["wgrad_accumulate"].bindings.values())
        for _ in range(2):
            trained(gpt)
        calls = sum(item.calls for item in dispatchers["wgrad_accumulate"].bindings.values()) - before
        assert calls > 0
        fused = {name: p.main_grad / 2 for name, p in gpt.named_parameters() if p.grad_added_to_main_grad}
        assert len(fused) == 2 * (2 + 2 * EXPERTS) + 1, sorted(fused)
        assert sum(bool(grad.any()) for grad in fused.values()) >= 9  # an expert may have no tokens
        agree(fused, {name: expected[name] for name in fused}, dtype)


if __name__ == "__main__":
    main()
