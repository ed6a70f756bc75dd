"""Data, sharded and tensor parallel training of a CUDA script on two ranks over gloo; run by test_training.py."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from on_ranks import check, main
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP


def model() -> nn.Module:
    """The same model on every rank."""
    torch.manual_seed(0)
    torch.cuda.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).cuda()


def batch() -> torch.Tensor:
    """The whole batch; a rank trains on every second row."""
    return torch.randn(6, 4, generator=torch.Generator("cuda").manual_seed(1), device="cuda")


def gradients(module: nn.Module, rows: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of one backward pass, whole ones."""
    module(rows).square().mean().backward()
    found = [parameter.grad for parameter in module.parameters()]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in found]


def close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-6) -> None:
    """The two lists of gradients agree."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@check
def ddp(rank: int, size: int) -> None:
    """DDP with device_ids, in every spelling, gives the gradients of the whole batch."""
    expected = gradients(model(), batch())
    for ids in ([rank], [torch.device("cuda", rank)], [f"cuda:{rank}"], None):
        wrapped = DDP(model(), device_ids=ids, output_device=ids[0] if ids else None)
        close(gradients(wrapped, batch()[rank::2]), expected)


@check
def ddp_hooks(rank: int, size: int) -> None:
    """DDP's float16 and bfloat16 hooks compress, no_sync and join work."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    expected = gradients(model(), batch())
    for hook in (default_hooks.fp16_compress_hook, default_hooks.bf16_compress_hook):
        wrapped = DDP(model(), device_ids=[rank])
        wrapped.register_comm_hook(None, hook)
        close(gradients(wrapped, batch()[rank::2]), expected, 2e-2)
    wrapped = DDP(model(), device_ids=[rank])
    with wrapped.no_sync():
        wrapped(batch()[rank::2]).sum().backward()
    with wrapped.join():
        for _ in range(rank + 1):
            wrapped(batch()[rank::2]).sum().backward()


@check
def fsdp2(rank: int, size: int) -> None:
    """fully_shard on a mesh of cuda, per layer and whole, gives the gradients of the whole batch."""
    expected = gradients(model(), batch())
    mesh = init_device_mesh("cuda", (size,), mesh_dim_names=("dp",))
    sharded = model()
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    close(gradients(fully_shard(sharded, mesh=mesh), batch()[rank::2]), expected)
    close(gradients(fully_shard(model()), batch()[rank::2]), expected)
    close(gradients(fully_shard(model(), offload_policy=CPUOffloadPolicy()), batch()[rank::2]), expected)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    close(gradients(fully_shard(model(), mp_policy=policy), batch()[rank::2].bfloat16()), expected, 3e-2)


@check
def fsdp2_step(rank: int, size: int) -> None:
    """The FSDP2 tutorial: a model made on meta, sharded, materialized on cuda, trained with clipping and AdamW."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    with torch.device("meta"):
        sharded = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    fully_shard(sharded, mesh=init_device_mesh("cuda", (size,)))
    sharded.to_empty(device="cuda")
    for layer in sharded:
        layer.reset_parameters()
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-2, fused=True)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = sharded(batch()).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sharded.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert set(whole) == ({"0.weight", "0.bias", "1.weight", "1.bias"} if rank == 0 else set())


@check
def fsdp1_starts_alike(rank: int, size: int) -> None:
    """FSDP with sync_module_states=True gives every rank the parameters of rank 0."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    module = model()
    with torch.no_grad():
        module[0].weight.add_(rank)
    wrapped = FSDP(module, device_id=torch.cuda.current_device(), sync_module_states=True, use_orig_params=True)
    with FSDP.summon_full_params(wrapped):
        torch.testing.assert_close(wrapped.module[0].weight, model()[0].weight)


@check
def fsdp1(rank: int, size: int) -> None:
    """FullyShardedDataParallel with and without device_id trains, and hands out the full state offloaded to the CPU."""
    from torch.distributed.fsdp import FullStateDictConfig, StateDictType
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    for options in ({"device_id": torch.cuda.current_device()}, {"device_id": torch.device("cuda", rank)}, {}):
        wrapped = FSDP(model(), use_orig_params=True, **options)
        wrapped(batch()[rank::2]).square().mean().backward()
        wrapped.clip_grad_norm_(1.0)
    config = FullStateDictConfig(offload_to_cpu=True, rank0_only=True)
    with FSDP.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT, config):
        found = wrapped.state_dict()
    if rank == 0:
        close([found["0.weight"]], [model()[0].weight.detach()])


@check
def meshes(rank: int, size: int) -> None:
    """DeviceMesh takes cuda in every form: by size, by ranks, from a group, and with nccl for a dimension."""
    mesh = init_device_mesh("cuda", (1, size), mesh_dim_names=("dp", "tp"))
    found = [mesh, mesh["tp"], DeviceMesh("cuda", list(range(size))), DeviceMesh(device_type="cuda", mesh=[0, 1])]
    found.append(DeviceMesh.from_group(dist.group.WORLD, "cuda"))
    found.append(init_device_mesh("cuda", (size,), mesh_dim_names=("x",), backend_override={"x": "nccl"}))
    options = dist.ProcessGroupNCCL.Options()
    found.append(init_device_mesh("cuda", (size,), mesh_dim_names=("x",), backend_override={"x": ("nccl", options)}))
    assert [item.device_type for item in found] == ["cpu"] * len(found)
    x = torch.ones(1, device="cuda")
    dist.all_reduce(x, group=found[-1].get_group())
    assert x.item() == 2.0


@check
def tensor_parallel(rank: int, size: int) -> None:
    """parallelize_module on a mesh of cuda gives the outputs of one process; DTensors move and say where they are."""
    from torch.distributed.tensor import Shard, distribute_tensor, zeros
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cuda", (size,))
    split = parallelize_module(model(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    torch.testing.assert_close(split(batch()), model()(batch()))
    tensor = distribute_tensor(batch(), mesh, [Shard(0)])
    for moved in (tensor.to("cuda"), tensor.cuda(), tensor.cpu(), tensor.to("cpu")):
        assert type(moved) is type(tensor)
        assert torch.equal(moved.full_tensor(), batch())
    assert tensor.is_cuda
    assert tensor.type() == "torch.cuda.FloatTensor"
    assert zeros(4, 4, device_mesh=mesh, placements=[Shard(0)]).to_local().shape == (2, 4)


class Block(nn.Module):
    """A layer that calls fused operators: norm, attention, gated unit."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(8))
        self.qkv, self.up, self.out = nn.Linear(8, 24), nn.Linear(8, 32), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, 8] -> [B, S, 8]."""
        from llm_adapt.ops.attention import attention
        from llm_adapt.ops.glu import glu
        from llm_adapt.ops.rms_norm import rms_norm

        q, k, v = (part.unflatten(-1, (2, 4)) for part in self.qkv(rms_norm(x, self.norm)).chunk(3, -1))
        x = x + attention(q, k, v, causal="bottom_right").flatten(2)
        return x + self.out(glu(self.up(x)))


@check
def fused_operators(rank: int, size: int) -> None:
    """Fused operators under DDP and FSDP2, with and without recomputation, give the gradients of one process."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def blocks() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Block(), Block()).cuda()

    rows = torch.randn(4, 6, 8, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    expected = gradients(blocks(), rows)
    close(gradients(DDP(blocks(), device_ids=[rank]), rows[rank::2]), expected, 1e-5)
    for wrap in (lambda layer: layer, checkpoint_wrapper):
        sharded = nn.Sequential(*(wrap(layer) for layer in blocks()))
        for layer in sharded:
            fully_shard(layer)
        close(gradients(fully_shard(sharded), rows[rank::2]), expected, 1e-5)


@check
def pipeline(rank: int, size: int) -> None:
    """A pipeline stage on cuda hands its activations on."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    stage = PipelineStage(nn.Linear(4, 4).cuda(), rank, size, device=torch.device("cuda", rank))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda out, target: (out - target).square().mean())
    losses: list[torch.Tensor] = []
    if rank == 0:
        schedule.step(torch.ones(4, 4, device="cuda"))
    else:
        schedule.step(target=torch.ones(4, 4, device="cuda"), losses=losses)
        assert len(losses) == 2


@check
def distributed_checkpoints(rank: int, size: int) -> None:
    """torch.distributed.checkpoint saves and loads, and an asynchronous save is a snapshot."""
    import torch.distributed.checkpoint as dcp

    folder = os.path.join(os.environ["OUTCOMES"], "checkpoint")
    module, other = model(), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).cuda()
    expected = module[0].weight.detach().clone()
    writing = dcp.async_save({"model": module.state_dict()}, checkpoint_id=folder)
    with torch.no_grad():
        module[0].weight.zero_()
    writing.result()
    found = {"model": other.state_dict()}
    dcp.load(found, checkpoint_id=folder)
    assert torch.equal(found["model"]["0.weight"], expected)


@check
def sharded_optimizer(rank: int, size: int) -> None:
    """ZeroRedundancyOptimizer steps a DDP model."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapped = DDP(model(), device_ids=[rank])
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.Adam, lr=0.1)
    gradients(wrapped, batch()[rank::2])
    optimizer.step()
    parts = [torch.empty_like(wrapped.module[0].weight) for _ in range(size)]
    dist.all_gather(parts, wrapped.module[0].weight.detach())
    assert torch.equal(parts[0], parts[1])


@check
def a_loader_per_rank(rank: int, size: int) -> None:
    """A DistributedSampler with pinned memory and a worker gives every row to one rank."""
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    data = TensorDataset(torch.arange(8.0))
    loader = DataLoader(data, batch_size=2, sampler=DistributedSampler(data), pin_memory=True, num_workers=1)
    seen = torch.cat([rows.cuda(rank, non_blocking=True) for (rows,) in loader])
    everything = torch.empty(8, device="cuda")
    dist.all_gather_into_tensor(everything, seen)
    assert sorted(everything.tolist()) == list(range(8))


if __name__ == "__main__":
    main()
