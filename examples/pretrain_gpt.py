"""Pre-train a small GPT on bytes with Megatron-Core: tensor, pipeline and data parallel, resumable.

    torchrun --nproc-per-node 2 pretrain_gpt.py                        # tensor parallel over two GPUs
    torchrun --nproc-per-node 8 pretrain_gpt.py --tp 2 --pp 2 --bf16 --distributed-optimizer
    torchrun --nproc-per-node 2 pretrain_gpt.py --load runs/pretrain_gpt --steps 2000

Read it from top to bottom: the layout of the ranks, the model, one training step, the loss on text that the
model never saw, and the job that puts them together. Beside it stand arguments.py (the flags), text_data.py
(the bytes), checkpoints.py (save and resume), sample_text.py (the model writes) and report_progress.py (what
you see).

There is no dropout, so training draws no random numbers once the weights are made, and a resumed run repeats
the uninterrupted one.
"""

import os
from argparse import Namespace
from collections.abc import Iterator
from datetime import timedelta
from math import log
from pathlib import Path

import torch
import torch.nn.functional as F
from arguments import end_with_error, parse_arguments
from checkpoints import (
    CheckpointError,
    TrainingState,
    check_can_save,
    check_description,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import unwrap_model
from report_progress import Progress
from sample_text import write_sample
from text_data import (
    VOCAB_SIZE,
    Text,
    TextError,
    load_text,
    microbatch_indices,
    samples_at,
    training_offsets,
    validation_offsets,
)

# --------------------------------------------------------------------------- the layout of the ranks


def initialize_ranks(args: Namespace) -> None:
    """One process per GPU: join the job, then divide the ranks into tensor, pipeline and data groups."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(backend="nccl", timeout=timedelta(seconds=args.timeout_s))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
        distributed_timeout_minutes=args.timeout_s / 60,
    )
    torch.manual_seed(args.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)


def print_once(line: str) -> None:
    """Rank 0 speaks for all."""
    if torch.distributed.get_rank() == 0:
        print(line, flush=True)


# ----------------------------------------------------------------------------------------- the model


def model_config(args: Namespace) -> TransformerConfig:
    """Blocks in the shape of Llama's (SwiGLU, rotary positions, no biases), in any layout.

    LayerNorm and not RMSNorm: without TransformerEngine, only LayerNorm can be sequence parallel.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    return TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.heads,
        ffn_hidden_size=-(-8 * args.hidden // 3 // 64) * 64,  # three of these are as big as two of 4 h
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        add_bias_linear=False,
        normalization="LayerNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
        sequence_parallel=args.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=args.bf16,
        recompute_granularity="full" if args.recompute else None,
        recompute_method="uniform" if args.recompute else None,
        recompute_num_layers=1 if args.recompute else None,
    )


def build_model(args: Namespace) -> DistributedDataParallel:
    """The part of the GPT that this rank holds, on its GPU, ready for data parallelism."""
    config = model_config(args)
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    )
    model.cuda(torch.cuda.current_device())
    return DistributedDataParallel(
        config=config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=args.distributed_optimizer,
            check_for_nan_in_grad=True,
        ),
        module=Float16Module(config, model) if args.bf16 else model,
    )


def build_optimizer(
    args: Namespace, model: DistributedDataParallel
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Adam with clipped gradients, and a learning rate that warms up and then falls along a cosine."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=args.lr,
        min_lr=args.lr / 10,
        weight_decay=0.1,
        adam_beta2=0.95,
        clip_grad=1.0,
        bf16=args.bf16,
        params_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        use_distributed_optimizer=args.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, [model])
    num_steps = max(args.steps, 1)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=args.lr / 100,
        max_lr=args.lr,
        min_lr=args.lr / 10,
        lr_warmup_steps=min(100, num_steps // 10),
        lr_decay_steps=num_steps,
        lr_decay_style="cosine",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
        # The flags of this run count, not those of the run that saved: --steps may grow on resuming.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    # Megatron-Core's schedules find in the model's config what they call at the end of a step.
    model.config.grad_scale_func = optimizer.scale_loss
    model.config.finalize_model_grads_func = finalize_model_grads
    return optimizer, scheduler


# --------------------------------------------------------------------------------- one training step

Batch = dict[str, torch.Tensor]  # tokens and labels [b, s]


def microbatches(args: Namespace, text: torch.Tensor, offsets: list[int]) -> Iterator[Batch]:
    """This rank's share of the global batch whose samples start at `offsets`."""
    rank = parallel_state.get_data_parallel_rank()
    for number in range(len(offsets) // (args.micro_batch_size * args.dp)):
        mine = [offsets[index] for index in microbatch_indices(number, rank, args.dp, args.micro_batch_size)]
        batch = samples_at(text, mine, args.seq_length)
        yield {name: tensor.cuda(non_blocking=True) for name, tensor in batch.items()}


def forward_step(batches: Iterator[Batch], model: torch.nn.Module):
    """One microbatch through this rank's part of the model; the last stage gives the loss of every byte."""
    batch = next(batches)
    position_ids = torch.arange(batch["tokens"].size(1), device="cuda").expand_as(batch["tokens"])
    # No attention mask: the layer spec says causal, so the attention makes its own.
    losses = model(batch["tokens"], position_ids, attention_mask=None, labels=batch["labels"])
    return losses, mean_loss


def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean over a microbatch. All are of one size, so the mean of their means is that of the global batch."""
    loss = losses.float().mean()
    return loss, {"loss": loss.detach().clone()}


def run_batch(args: Namespace, model, text: torch.Tensor, offsets: list[int], forward_only: bool) -> float:
    """Forward (and backward) over a global batch; returns its mean loss, the same on every rank."""
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=microbatches(args, text, offsets),
        model=[model],
        num_microbatches=len(offsets) // (args.micro_batch_size * args.dp),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=forward_only,
    )
    loss = torch.zeros(1, device="cuda")
    if results:  # only the last pipeline stage knows the loss
        loss += torch.stack([result["loss"] for result in results]).mean()
        torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group())
        loss /= args.dp
    last_rank = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(loss, src=last_rank, group=parallel_state.get_pipeline_model_parallel_group())
    return loss.item()


def train_step(args: Namespace, model, state: TrainingState, text: Text, step: int) -> dict[str, float]:
    """One step of the optimizer."""
    model.zero_grad_buffer()
    state.optimizer.zero_grad()
    offsets = training_offsets(args.seed, step, args.global_batch_size, len(text.train), args.seq_length)
    loss = run_batch(args, model, text.train, offsets, forward_only=False)
    lr = state.optimizer.param_groups[0]["lr"]
    _, grad_norm, _ = state.optimizer.step()
    state.scheduler.step(increment=1)
    return {"loss": loss, "grad_norm": float(grad_norm), "lr": lr}


def validation_loss(args: Namespace, model, text: Text) -> float:
    """Mean loss per byte over samples of text that took no part in training."""
    offsets = validation_offsets(args.validation_samples, len(text.validation), args.seq_length)
    model.eval()
    with torch.no_grad():
        loss = run_batch(args, model, text.validation, offsets, forward_only=True)
    model.train()
    return loss


# ------------------------------------------------------------------------------------------- the job


def check_inputs(args: Namespace) -> tuple[Text, Path | None]:
    """The text, and the checkpoint to load if any; ends the job with one line where one cannot be used."""
    try:
        if args.save_every:
            check_can_save()
        text = load_text(args.data, args.seq_length)
        folder = find_checkpoint(args.load) if args.load else None
        if folder:
            check_description(folder, description(args, weights_only=args.finetune))
    except (TextError, CheckpointError) as error:
        end_with_error(str(error))
    return text, folder


def description(args: Namespace, weights_only: bool = False) -> dict[str, object]:
    """What a checkpoint and the run that loads it must have in common. The layout is not part of it."""
    names = ["layers", "hidden", "heads"] + ([] if weights_only else ["bf16", "distributed_optimizer"])
    return {name: getattr(args, name) for name in names}


def time_is_up(args: Namespace, seconds: float) -> bool:
    """Whether --max-minutes have passed. No two clocks agree, so rank 0's counts for all."""
    if not args.max_minutes:
        return False
    answer = torch.tensor([seconds > args.max_minutes * 60], dtype=torch.int32, device="cuda")
    torch.distributed.broadcast(answer, src=0)
    return bool(answer.item())


def train(args: Namespace, model, state: TrainingState, text: Text, first_step: int) -> Progress:
    """The steps from `first_step` + 1 to --steps, with checkpoints; returns the record of them."""
    is_writer = torch.distributed.get_rank() == 0
    tokens_per_step = args.global_batch_size * args.seq_length
    progress = Progress(args.out, is_writer, (first_step, args.steps), tokens_per_step, args.print_every)
    saved_step = first_step or None
    while progress.step < args.steps and not time_is_up(args, progress.seconds()):
        step = progress.step + 1
        progress.step_done({"step": step, **train_step(args, model, state, text, step)})
        if args.save_every and step % args.save_every == 0:
            save_checkpoint(args.out / "checkpoints", step, state, args.keep)
            saved_step = step
    if progress.step < args.steps:
        print_once(f"stopped after step {progress.step}: --max-minutes {args.max_minutes:g} have passed")
    if args.save_every and saved_step != progress.step:
        save_checkpoint(args.out / "checkpoints", progress.step, state, args.keep)
    return progress


def main() -> None:
    """Train from scratch or from a checkpoint, measure, let the model write, leave the results in --out."""
    args = parse_arguments()
    text, folder = check_inputs(args)
    initialize_ranks(args)
    layout = f"TP={args.tp} PP={args.pp} DP={args.dp}" + " SP" * args.sequence_parallel
    precision = "bf16" if args.bf16 else "fp32"
    print_once(f"{text.description}\n{args.world_size} ranks: {layout}, {precision}")

    model = build_model(args)
    optimizer, scheduler = build_optimizer(args, model)
    state = TrainingState(unwrap_model(model), optimizer, scheduler, description(args))
    first_step = 0
    if folder and args.finetune:
        load_weights(folder, state)
        print_once(f"starting with the weights of {folder}")
    elif folder:
        first_step = load_checkpoint(folder, state)
        print_once(f"continuing {folder} after step {first_step}")

    progress = train(args, model, state, text, first_step)
    summary = progress.summary() | {"layout": layout, "precision": precision, "ranks": args.world_size}
    summary["validation_loss"] = validation_loss(args, model, text)
    print_once(f"validation loss {summary['validation_loss']:.4f} nats/byte (chance: {log(VOCAB_SIZE):.2f})")
    sample = ""
    if args.sample_bytes:
        sample = write_sample(model, "def ", args.sample_bytes, seq_length=args.seq_length, seed=args.seed)
        print_once(f"the model writes:\n\n{sample}\n")
    progress.finish(summary, sample)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
