"""The trained model writes: one byte after another, through the same pipeline that trained it.

Every byte is a whole forward pass (there is no key-value cache), which is plenty for a few hundred bytes. All
ranks take part; the last pipeline stage draws the next byte and tells the others.
"""

from collections.abc import Iterator
from functools import partial

import torch
from megatron.core.parallel_state import is_pipeline_last_stage
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from text_data import VOCAB_SIZE, decode


def write_sample(
    model: torch.nn.Module, prompt: str, num_bytes: int, *, seq_length: int, seed: int, temperature: float = 0.8
) -> str:
    """`prompt` and `num_bytes` more bytes; the same seed and weights give the same text in any layout."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU, whose random numbers no layout changes
    written = list(prompt.encode())
    model.eval()
    with torch.no_grad():
        for _ in range(num_bytes):
            logits = next_byte_logits(model, written[-seq_length:], seq_length)
            written.append(draw_byte(logits, temperature, generator))
    model.train()
    return decode(written)


def next_byte_logits(model: torch.nn.Module, context: list[int], seq_length: int) -> torch.Tensor | None:
    """Logits [VOCAB_SIZE] of the byte after `context`; None on all but the last pipeline stage."""
    # Always the full length: pipeline and sequence parallelism fix the shape of what the ranks exchange. The
    # attention is causal, so the filling after the context cannot reach back into it.
    tokens = torch.zeros(1, seq_length, dtype=torch.long)
    tokens[0, : len(context)] = torch.tensor(context)
    results = get_forward_backward_func()(
        forward_step_func=partial(forward_step, position=len(context) - 1),
        data_iterator=iter([tokens.cuda()]),
        model=[model],
        num_microbatches=1,
        seq_length=seq_length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return results[0] if results else None


def forward_step(batches: Iterator[torch.Tensor], model: torch.nn.Module, position: int):
    """Forward without labels, which gives logits; the second value picks those at `position`."""
    tokens = next(batches)
    position_ids = torch.arange(tokens.size(1), device="cuda").expand_as(tokens)
    return model(tokens, position_ids, attention_mask=None), partial(pick_logits, position=position)


def pick_logits(logits: torch.Tensor, position: int, non_loss_data: bool) -> torch.Tensor:
    """Logits [b, s, vocabulary of this rank] -> those at one position over the whole unpadded vocabulary."""
    return gather_from_tensor_model_parallel_region(logits[0, position])[:VOCAB_SIZE]


def draw_byte(logits: torch.Tensor | None, temperature: float, generator: torch.Generator) -> int:
    """A random byte, the same on every rank: drawn where the logits are, then broadcast."""
    byte = torch.zeros(1, dtype=torch.long, device="cuda")
    if is_pipeline_last_stage():
        probabilities = torch.softmax(logits.float().cpu() / temperature, dim=-1)
        byte += torch.multinomial(probabilities, 1, generator=generator).item()
    torch.distributed.broadcast(byte, src=torch.distributed.get_world_size() - 1)
    return byte.item()
