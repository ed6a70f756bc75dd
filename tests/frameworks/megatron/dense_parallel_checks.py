"""Dense operators on two tensor-parallel ranks over gloo; run by test_losses.py with ops="off"."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import torch.distributed as dist

from tests.frameworks.megatron.real_megatron import agree, calling, gradients, model, reseed, served, step
from tests.parallel.on_ranks import check, main


@functools.cache
def groups() -> Any:
    """Megatron's groups: both ranks are one tensor-parallel group."""
    parallel_state = importlib.import_module("megatron.core.parallel_state")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    reseed(7)
    return parallel_state.get_tensor_model_parallel_group()


def losses_of(rank: int, dtype: torch.dtype, smoothing: float, is_fused: bool) -> list[torch.Tensor | None]:
    """Loss and gradient of this rank's columns of one tensor of logits."""
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(6, 2, 16, generator=generator), torch.randint(16, (6, 2), generator=generator)
    mine = logits[..., 8 * rank : 8 * rank + 8].to(dtype)
    if is_fused:
        module = importlib.import_module("megatron.core.fusions.fused_cross_entropy")
        return gradients(lambda x: module.fused_vocab_parallel_cross_entropy(x * 1.0, target, groups()), mine)
    module = importlib.import_module("megatron.core.tensor_parallel")
    return gradients(lambda x: module.vocab_parallel_cross_entropy(x * 1.0, target, smoothing), mine)


@check
def losses_are_of_the_tensor_parallel_group(rank: int, size: int) -> None:
    """On two data-parallel ranks the vocabulary is whole on each, and neither sees the other's logits."""
    parallel_state = importlib.import_module("megatron.core.parallel_state")
    parallel_state.initialize_model_parallel()
    module = importlib.import_module("megatron.core.tensor_parallel")
    generator = torch.Generator().manual_seed(rank)
    logits, target = torch.randn(6, 2, 16, generator=generator), torch.randint(16, (6, 2), generator=generator)
    expected = gradients(lambda x: module.vocab_parallel_cross_entropy(x * 1.0, target), logits)
    with served("losses"), calling("softmax_partials"):
        found = gradients(lambda x: module.vocab_parallel_cross_entropy(x * 1.0, target), logits)
    agree(found, expected, torch.float32)
    parallel_state.destroy_model_parallel()


@check
def losses_are_megatrons(rank: int, size: int) -> None:
    """Loss and gradients of both functions are Megatron's on each rank, smoothed over the rank's own columns too."""
    groups()
    for dtype in (torch.float32, torch.bfloat16):
        for smoothing, is_fused in ((0.0, False), (0.1, False), (0.0, True)):
            expected = losses_of(rank, dtype, smoothing, is_fused)
            with served("losses"), calling("softmax_partials"):
                found = losses_of(rank, dtype, smoothing, is_fused)
            agree(found[0], expected[0], torch.float32)
            agree(found[1], expected[1], torch.bfloat16 if is_fused else dtype)


@check
def sequence_parallel_models_are_megatrons(rank: int, size: int) -> None:
    """Sequence-parallel norms, dropout-free: losses and this rank's gradients are those without the operators."""
    groups()
    for normalization, values in (("LayerNorm", {}), ("RMSNorm", {"layernorm_zero_centered_gamma": True})):
        options: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True, **values}
        for dtype in (torch.float32, torch.bfloat16):
            expected = step(model(normalization, dtype, **options))
            with served():
                gpt = model(normalization, dtype, **options)
                marks = {getattr(p, "sequence_parallel", None) for n, p in gpt.named_parameters() if "layernorm" in n}
                assert marks == {True}
                found = step(gpt)
            agree(found[0], expected[0], dtype)
            agree(found[1], expected[1], dtype, factor=2.0)


@check
def ranks_drop_alike_where_they_hold_copies(rank: int, size: int) -> None:
    """Without sequence parallelism both ranks hold the residual stream, and it stays the same through dropout."""
    groups()
    with served():
        gpt = model("LayerNorm", tensor_model_parallel_size=2, hidden_dropout=0.3, attention_dropout=0.3)
        reseed(9)
        losses, _ = step(gpt, with_mask=False)
    both = [torch.empty_like(losses) for _ in range(size)]
    dist.all_gather(both, losses)
    torch.testing.assert_close(both[0], both[1])


@check
def heads_of_the_ranks_drop_differently(rank: int, size: int) -> None:
    """Attention's dropout draws from the tensor-parallel state, so the ranks' heads lose other weights."""
    groups()
    attention = importlib.import_module("megatron.core.transformer.dot_product_attention").DotProductAttention
    transformer = importlib.import_module("megatron.core.transformer")
    mask_type = importlib.import_module("megatron.core.transformer.enums").AttnMaskType.causal
    config = transformer.TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, tensor_model_parallel_size=2, attention_dropout=0.5
    )
    x = torch.randn(6, 1, 2, 8, generator=torch.Generator().manual_seed(0))
    with served("attention"):
        reseed(3)
        y = attention(config, 1, mask_type, "self")(x, x, x, None)
    both = [torch.empty_like(y) for _ in range(size)]
    dist.all_gather(both, y.detach())
    assert not torch.allclose(both[0], both[1])


if __name__ == "__main__":
    main()
