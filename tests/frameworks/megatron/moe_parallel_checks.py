"""Experts on two ranks (expert parallelism over gloo); run by test_experts.py."""

from __future__ import annotations

import torch

from tests.frameworks.megatron.moe_model import agree, model, same_with_and_without, trained
from tests.frameworks.megatron.served_rows import REFERENCES, served
from tests.parallel.on_ranks import check, main


@check
def exchanged_tokens(rank: int, size: int) -> None:
    """The alltoall dispatcher sends rows by expert and brings them back, in float32 and bfloat16."""
    same_with_and_without(moe_aux_loss_coeff=0.05, moe_z_loss_coeff=0.01)
    same_with_and_without(torch.bfloat16)


@check
def gathered_tokens(rank: int, size: int) -> None:
    """The allgather dispatcher permutes the rows of its own experts alone."""
    same_with_and_without(moe_token_dispatcher_type="allgather")


@check
def grouped_experts_of_both_ranks(rank: int, size: int) -> None:
    """GroupedMLP on both ranks, as the same experts one after the other."""
    same_with_and_without(torch.bfloat16, grouped=True)


@check
def fused_permutation(rank: int, size: int) -> None:
    """moe_permute_fusion sorts the chunks of both ranks as the unfused form does."""
    expected = trained(model())
    for ops in (None, REFERENCES):
        with served(ops):
            agree(trained(model(moe_permute_fusion=True)), expected, torch.float32)


@check
def a_rank_without_tokens_has_gradients(rank: int, size: int) -> None:
    """Where every token goes to the experts of rank 0, the grouped weights of rank 1 get gradients of 0."""
    with served(REFERENCES):
        gpt = model(torch.bfloat16, grouped=True, moe_router_load_balancing_type="none")
        for layer in gpt.decoder.layers:
            layer.mlp.router.forward = lambda hidden, *args, **kwargs: to_the_first(hidden)
        found = trained(gpt)
    experts = [grad for name, grad in found.items() if "local_experts" in name]
    assert len(experts) == 8
    assert all(bool(grad.any()) == (rank == 0) for grad in experts)


def to_the_first(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and map of a router that chooses experts 0 and 1 for every token."""
    chosen = torch.tensor([True, True, False, False]).expand(hidden.shape[0] * hidden.shape[1], -1)
    return chosen * hidden.float().mean(-1).sigmoid().view(-1, 1), chosen.clone()


if __name__ == "__main__":
    main()
