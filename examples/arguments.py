"""The command line of pretrain_gpt.py: its flags, and the checks that need nothing but the flags.

Every rank parses the same line and finds the same mistakes, so a wrong flag ends the whole job at once,
before any process group exists that somebody could wait on.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from text_data import VOCAB_SIZE

# ------------------------------------------------------------------------------- what a rank may say


def is_first_rank() -> bool:
    """Whether this process speaks for the job; known before the process group exists."""
    return os.environ.get("RANK", "0") == "0"


def end_with_error(message: str) -> NoReturn:
    """End this rank with exit code 2; the first rank says why. All come here: all see the same flags."""
    if is_first_rank():
        print(f"pretrain_gpt.py: error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)  # the launcher stops every rank when the first of them ends: let the speaker finish
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that prints once for the job and not once a rank."""

    def error(self, message: str) -> NoReturn:
        """One line; the usage would fill the screen before it."""
        end_with_error(f"{message} (--help lists all flags)")

    def print_help(self, file=None) -> None:
        """The flags, from the first rank."""
        if is_first_rank():
            super().print_help(file)


# ----------------------------------------------------------------------------------------- the flags


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with defaults filled in; ends the process with one line where they do not fit."""
    args = build_parser().parse_args(argv)
    if "LOCAL_RANK" not in os.environ:
        end_with_error("no ranks: start it with torchrun --nproc-per-node N pretrain_gpt.py [flags]")
    args.world_size = int(os.environ["WORLD_SIZE"])
    problems = number_problems(args)
    if not problems:
        fill_in(args)
        problems = layout_problems(args) + batch_problems(args)
    if problems:
        end_with_error("; ".join(problems))
    return args


def fill_in(args: argparse.Namespace) -> None:
    """What follows from the flags and the number of ranks."""
    if args.tp is None:
        args.tp = 2 if args.world_size % (2 * args.pp) == 0 else 1
    args.dp = max(1, args.world_size // (args.tp * args.pp))
    if args.micro_batch_size is None:  # a pipeline needs several microbatches, to keep its stages busy
        args.micro_batch_size = max(1, args.global_batch_size // (args.dp * args.pp))
    args.validation_samples = round_up(args.validation_samples, args.micro_batch_size * args.dp)
    # Every tensor-parallel rank holds the same number of rows of the embedding.
    args.padded_vocab_size = round_up(VOCAB_SIZE, args.tp)


def round_up(number: int, multiple: int) -> int:
    """The next multiple: round_up(5, 4) is 8."""
    return -(-number // multiple) * multiple


def build_parser() -> Parser:
    """All flags; the defaults are the main job, which two CPU cores finish in a few minutes."""
    parser = Parser(
        description="Pre-train a GPT on bytes with Megatron-Core; the text is Python's own standard library.",
        epilog="Start it with torchrun --nproc-per-node N pretrain_gpt.py [flags].",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_layout_flags(parser.add_argument_group("layout (ranks = tp x pp x dp; dp is what is left)"))
    add_model_flags(parser.add_argument_group("model"))
    add_training_flags(parser.add_argument_group("training"))
    add_file_flags(parser.add_argument_group("files"))
    return parser


def add_layout_flags(group) -> None:
    """How the ranks share the work; none of these changes the loss curve (bf16 does, a little)."""
    flag = group.add_argument
    flag("--tp", type=int, help="tensor parallel size; unset: 2 where the ranks allow it, else 1")
    flag("--pp", type=int, default=1, help="pipeline parallel size")
    flag("--sequence-parallel", action="store_true", help="split the norms along the sequence (with --tp)")
    flag("--distributed-optimizer", action="store_true", help="shard the optimizer over the dp ranks")
    flag("--recompute", action="store_true", help="recompute all activations in the backward pass")
    flag("--bf16", action="store_true", help="train in bfloat16 with float32 master weights")


def add_model_flags(group) -> None:
    """The size of the model; a checkpoint only loads into the size it was saved from."""
    flag = group.add_argument
    flag("--layers", type=int, default=4, help="transformer layers")
    flag("--hidden", type=int, default=128, help="width of the model")
    flag("--heads", type=int, default=4, help="attention heads")
    flag("--seq-length", type=int, default=128, help="bytes in one training sample")


def add_training_flags(group) -> None:
    """How long, how fast, and how much at a time."""
    flag = group.add_argument
    flag("--steps", type=int, default=600, help="the step at which training ends, resumed or not")
    flag("--max-minutes", type=float, default=6.0, help="end training earlier after this time; 0: never")
    flag("--micro-batch-size", type=int, help="samples in one forward pass; unset: global / dp / pp")
    flag("--global-batch-size", type=int, default=16, help="samples in one step, over all ranks")
    flag("--lr", type=float, default=3e-3, help="highest learning rate")
    flag("--seed", type=int, default=1234, help="seed of the weights, the data order and the sample text")
    flag("--validation-samples", type=int, default=256, help="samples of the validation loss; rounded up")
    flag("--print-every", type=int, default=25, help="steps between two lines of progress")
    flag("--timeout-s", type=float, default=600.0, help="longest wait for another rank, in seconds")


def add_file_flags(group) -> None:
    """What is read and what is written."""
    flag = group.add_argument
    flag("--data", nargs="+", metavar="FILE", help="train on these text files instead")
    flag("--out", type=Path, default=Path("runs/pretrain_gpt"), help="folder for all results")
    flag("--save-every", type=int, default=200, help="steps between checkpoints; the end saves too; 0: none")
    flag("--keep", type=int, default=2, help="checkpoints to keep")
    flag("--load", type=Path, help="continue from this checkpoint: a step_ folder, or the --out of a run")
    flag("--finetune", action="store_true", help="take only the weights from --load, and start at step 0")
    flag("--sample-bytes", type=int, default=400, help="length of the text written at the end; 0: none")


# ------------------------------------------------------------------------------- what cannot be done


def number_problems(args: argparse.Namespace) -> list[str]:
    """Flags that are too small for any layout, each as one clause; the other checks can divide by them."""
    positive = "tp pp layers hidden heads seq_length micro_batch_size global_batch_size validation_samples"
    positive += " print_every keep lr timeout_s"
    problems = [
        f"{flag_of(name)} must be above 0"
        for name in positive.split()
        if getattr(args, name) is not None and getattr(args, name) <= 0
    ]
    not_negative = ("steps", "max_minutes", "save_every", "sample_bytes")
    problems += [f"{flag_of(name)} must not be negative" for name in not_negative if getattr(args, name) < 0]
    if args.finetune and args.load is None:
        problems.append("--finetune needs --load")
    return problems


def flag_of(name: str) -> str:
    """seq_length -> --seq-length."""
    return "--" + name.replace("_", "-")


def layout_problems(args: argparse.Namespace) -> list[str]:
    """Where the model does not divide over the ranks."""
    problems = []
    if args.world_size % (args.tp * args.pp):
        problems.append(f"--tp {args.tp} x --pp {args.pp} does not divide the {args.world_size} ranks")
    if args.layers % args.pp:
        problems.append(f"--pp {args.pp} does not divide --layers {args.layers}")
    if args.heads % args.tp:
        problems.append(f"--tp {args.tp} does not divide --heads {args.heads}")
    if args.hidden % (2 * args.heads):
        problems.append(f"--hidden {args.hidden} is not a multiple of 2 x --heads {args.heads}")
    if args.sequence_parallel and args.tp == 1:
        problems.append("--sequence-parallel needs --tp 2 or more")
    if args.sequence_parallel and args.seq_length % args.tp:
        problems.append(f"--tp {args.tp} does not divide --seq-length {args.seq_length}")
    return problems


def batch_problems(args: argparse.Namespace) -> list[str]:
    """Where the samples of a step do not divide over the data-parallel ranks."""
    share = args.micro_batch_size * args.dp
    if args.global_batch_size % share == 0:
        return []
    return [
        f"--global-batch-size {args.global_batch_size} is not a multiple of {share} "
        f"(--micro-batch-size {args.micro_batch_size} x {args.dp} data-parallel ranks)"
    ]
