"""Checkpoints that are whole or absent, and that load in another layout than the one that saved them.

The content is Megatron-Core's distributed format (`torch_dist`): every tensor is stored by its place in the
whole model, so what was saved at TP=2 loads at TP=1, PP=2 or DP=2. The safety is plain files:

    checkpoints/
      step_0000200/            a whole checkpoint: it got this name after its last byte was written
      step_0000400/
      latest                   "step_0000400"; replaced in one motion, after the folder has its name
      step_0000600.partial/    a save that was cut short; never read, removed by the next save

A job killed at any moment leaves the last whole checkpoint, and `latest` naming it.
"""

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import maybe_load_config
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint import FileSystemReader

LATEST = "latest"
PARTIAL = ".partial"


class CheckpointError(Exception):
    """The checkpoint cannot be used or made; the message says which one, why, and what to do."""


@dataclass
class TrainingState:
    """What a checkpoint holds. `model` is the bare GPTModel; `description` is what must agree on loading."""

    model: torch.nn.Module
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    description: dict[str, Any]


# -------------------------------------------------------------------------------------------- saving


def check_can_save() -> None:
    """Raise CheckpointError where Megatron-Core's writer lacks what it needs: it would wait for ever.

    Source: megatron-core 0.16.1, dist_checkpointing/strategies/filesystem_async.py: its writer processes end
    without psutil, and the training process never stops waiting for them.
    """
    if find_spec("psutil") is None:
        raise CheckpointError("saving a checkpoint needs psutil: pip install psutil, or give --save-every 0")


def save_checkpoint(root: Path, step: int, state: TrainingState, num_kept: int) -> None:
    """Write `root`/step_NNNNNNN; all ranks call it together. Of older ones, `num_kept` - 1 stay."""
    final = root / f"step_{step:07d}"
    partial = root / (final.name + PARTIAL)
    is_writer = torch.distributed.get_rank() == 0
    if is_writer:
        for leftover in root.glob("*" + PARTIAL):
            remove(leftover)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    content = sharded_state(state, step, is_loading=False)
    dist_checkpointing.save(content, str(partial), content_metadata=stored_metadata())
    # The save ends in a barrier of its own: from here on every rank has written its part.
    if is_writer:
        publish(partial, final)
        for old in sorted(root.glob("step_*[0-9]"))[:-num_kept]:
            if old != final:
                remove(old)
    torch.distributed.barrier()


def publish(partial: Path, final: Path) -> None:
    """Give a finished save its name, then let `latest` name it."""
    if final.exists():  # a resumed run may pass a step for the second time
        final.rename(final.with_name(final.name + ".old" + PARTIAL))
    partial.rename(final)
    pointer = final.with_name(LATEST + PARTIAL)
    pointer.write_text(final.name + "\n")
    pointer.replace(final.with_name(LATEST))


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def sharded_state(state: TrainingState, step: int, is_loading: bool) -> dict[str, Any]:
    """The state of this rank, in which every tensor knows which part of the whole model it is."""
    metadata = running_metadata()
    content = {"model": state.model.sharded_state_dict(metadata=metadata)}
    content["optimizer"] = state.optimizer.sharded_state_dict(content, is_loading, metadata=metadata)
    if not is_loading:
        content |= {"scheduler": state.scheduler.state_dict(), "step": step, "description": state.description}
    return content


def stored_metadata() -> dict[str, Any]:
    """The choices that shape the stored state; loading makes the same ones.

    `fully_reshardable` stores the distributed optimizer's state as tensors of the whole model; the default is
    quicker to write, but then only the data-parallel size may change.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def running_metadata() -> dict[str, Any]:
    """The same, and the process group, which has no meaning outside this job."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {**stored_metadata(), "dp_cp_group": group}


# ------------------------------------------------------------------------------------------- loading


def find_checkpoint(path: Path) -> Path:
    """The folder that `--load path` means: that very one, or the latest in it or in its checkpoints/.

    Raises: CheckpointError where there is none, or where it is not whole.
    """
    if path.name.endswith(PARTIAL):
        raise CheckpointError(f"--load {path}: this save was cut short; take --load {path.parent}")
    folder = path
    for root in (path / "checkpoints", path):
        if (root / LATEST).is_file():
            folder = root / (root / LATEST).read_text().strip()
            break
    if not folder.is_dir():
        raise CheckpointError(f"--load {path}: there is no checkpoint folder {folder}")
    check_whole(folder)
    return folder


def check_whole(folder: Path) -> None:
    """Raise CheckpointError unless every file that the checkpoint's index names is there in full length."""
    required = ("metadata.json", "common.pt", ".metadata")
    missing = [name for name in required if not (folder / name).is_file()]
    if missing or maybe_load_config(str(folder)) is None:
        raise CheckpointError(
            f"{folder} is not a whole checkpoint: {' and '.join(missing) or 'metadata.json'} "
            "cannot be read; name another step_ folder"
        )
    lengths: dict[str, int] = {}
    for stored in FileSystemReader(str(folder)).read_metadata().storage_data.values():
        end = stored.offset + stored.length
        lengths[stored.relative_path] = max(end, lengths.get(stored.relative_path, 0))
    for name, num_bytes in lengths.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found < num_bytes:
            raise CheckpointError(
                f"{folder} is not a whole checkpoint: {name} has {found} of {num_bytes} bytes; "
                "copy it again, or name another step_ folder"
            )


def check_description(folder: Path, wanted: dict[str, Any]) -> None:
    """Raise CheckpointError where the checkpoint holds another model, or the state of another optimizer."""
    stored = load_common_state_dict(str(folder)).get("description", {})
    differences = [
        f"{name} {stored.get(name)} there and {value} here"
        for name, value in wanted.items()
        if stored.get(name) != value
    ]
    if differences:
        raise CheckpointError(
            f"{folder} does not fit these flags: {', '.join(differences)}. Give those it was saved with "
            "(with --finetune, which takes just the weights, bf16 and distributed_optimizer may change)"
        )


def load_checkpoint(folder: Path, state: TrainingState) -> int:
    """Continue from `folder`: weights, optimizer, learning rate. Returns the step that it was saved after."""
    make_optimizer_state(state.optimizer)
    content = dist_checkpointing.load(sharded_state(state, step=0, is_loading=True), str(folder))
    state.model.load_state_dict(content["model"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.scheduler.load_state_dict(content["scheduler"])
    return content["step"]


def make_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Let torch's Adam do an empty step, so that the distributed optimizer has a state to load into.

    Only needed where neither apex nor TransformerEngine is installed; the checkpoint overwrites all that the
    step did. Source: megatron-core 0.16.1, DistributedOptimizer.state_dict() asserts that a step was done.
    """
    for member in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = member.optimizer
        if isinstance(member, DistributedOptimizer) and isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
            for group in adam.param_groups:
                for param in group["params"]:
                    param.grad = torch.zeros_like(param)
            adam.step()
            adam.zero_grad()


def load_weights(folder: Path, state: TrainingState) -> None:
    """Start with the weights in `folder`, and with nothing else of it."""
    wanted = {"model": state.model.sharded_state_dict(metadata=running_metadata())}
    state.model.load_state_dict(dist_checkpointing.load(wanted, str(folder))["model"])
    # Mixed precision and the distributed optimizer keep float32 copies of the weights; those must follow.
    state.optimizer.reload_model_params()
