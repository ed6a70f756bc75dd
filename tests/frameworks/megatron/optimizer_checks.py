"""Megatron's optimizers with and without the operators, on one rank; run by test_optimizer.py."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import torch

from llm_adapt.frameworks.megatron import checkpoints
from llm_adapt.frameworks.megatron import optimizer as ours  # the class itself would be taken back with the rows
from llm_adapt.ops.dispatch.receipt import receipt
from tests.frameworks.megatron.moe_model import prepare
from tests.frameworks.megatron.served_rows import served
from tests.parallel.on_ranks import check, main

warnings.simplefilter("ignore")
SEQUENCE, VOCAB = 8, 32
FLAGS = {"distributed": {"use_distributed_optimizer": True}, "plain": {}}


def build(dtype: torch.dtype = torch.float32, kind: str = "plain", **values: Any) -> tuple[Any, Any]:
    """A small GPT in Megatron's data parallelism, and its optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    prepare()
    narrow = dtype == torch.bfloat16
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, hidden_dropout=0.0, attention_dropout=0.0,
        bf16=narrow, params_dtype=dtype, gradient_accumulation_fusion=False,
    )  # fmt: skip
    gpt = GPTModel(config, get_gpt_layer_local_spec(), VOCAB, SEQUENCE).cuda()
    generator = torch.Generator().manual_seed(3)  # the same numbers at each call, on any device
    with torch.no_grad():
        for name, parameter in sorted(gpt.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + ("norm.weight" in name))
    gpt = Float16Module(config, gpt) if narrow else gpt
    ddp = DistributedDataParallelConfig(**FLAGS[kind])
    wrapped = DistributedDataParallel(config, ddp, gpt)
    given = {"lr": 3e-3, "weight_decay": 0.1, "clip_grad": 0.2, "bf16": narrow, "params_dtype": dtype}
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", **FLAGS[kind], **(given | values)), [wrapped])
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    return wrapped, optimizer


def step(gpt: Any, optimizer: Any, count: int, start: int = 0) -> list[float]:
    """The norms of the gradients of some steps, each on its own batch."""
    norms = []
    for number in range(start, start + count):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, VOCAB, (2, SEQUENCE), generator=generator).cuda()
        positions = torch.arange(SEQUENCE, device="cuda").expand(2, -1)
        mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, device="cuda").tril() < 0.5
        gpt.zero_grad_buffer()
        optimizer.zero_grad()
        gpt(tokens, positions, mask, labels=tokens.roll(-1, 1)).mean().backward()
        gpt.finish_grad_sync()
        is_done, norm, _ = optimizer.step()
        assert is_done
        norms.append(norm)
    return norms


def numbers(gpt: Any) -> dict[str, torch.Tensor]:
    """All parameters."""
    return {name: parameter.detach().float().clone() for name, parameter in gpt.named_parameters()}


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """The same numbers up to a share of a step's size."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = float((found[name] - value).abs().max())
        assert error <= tolerance, f"{name}: {error}"


def inner(optimizer: Any) -> list[Any]:
    """The optimizers of torch inside Megatron's."""
    return [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]


def shape_of(value: Any) -> Any:
    """What a checkpoint looks like: keys, types, shapes and dtypes, and plain values."""
    if isinstance(value, dict):
        return {name: shape_of(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [shape_of(item) for item in value]
    return (tuple(value.shape), value.dtype, value.device.type) if isinstance(value, torch.Tensor) else value


def kinds() -> list[tuple[torch.dtype, str]]:
    """Every wrapper that Megatron puts around its Adam."""
    return [(dtype, kind) for dtype in (torch.float32, torch.bfloat16) for kind in ("plain", "distributed")]


@check
def twenty_steps(rank: int, size: int) -> None:
    """Parameters, gradient norms and the form of the state are those of Megatron with torch's AdamW."""
    for dtype, kind in kinds():
        gpt, optimizer = build(dtype, kind)
        assert {type(item) for item in inner(optimizer)} == {torch.optim.AdamW}
        norms, expected = step(gpt, optimizer, 20), numbers(gpt)
        form = shape_of([item.state_dict() for item in inner(optimizer)])
        with served():
            gpt, optimizer = build(dtype, kind)
            assert {type(item) for item in inner(optimizer)} == {ours.FusedAdam}
            found = step(gpt, optimizer, 20)
            # 20 steps of at most lr; a rounding of bfloat16 is the largest step between two values of it
            close(numbers(gpt), expected, 2e-4 if dtype == torch.float32 else 1.6e-2)
            torch.testing.assert_close(found, norms, rtol=1e-3 if dtype == torch.float32 else 3e-2, atol=0.0)
            assert shape_of([item.state_dict() for item in inner(optimizer)]) == form


@check
def adam_without_decoupled_decay(rank: int, size: int) -> None:
    """decoupled_weight_decay=False is torch's Adam."""
    gpt, optimizer = build(decoupled_weight_decay=False)
    assert {type(item) for item in inner(optimizer)} == {torch.optim.Adam}
    step(gpt, optimizer, 10)
    expected = numbers(gpt)
    with served():
        gpt, optimizer = build(decoupled_weight_decay=False)
        step(gpt, optimizer, 10)
    close(numbers(gpt), expected, 2e-4)
    gpt, optimizer = build()
    step(gpt, optimizer, 10)
    assert max(float((numbers(gpt)[name] - expected[name]).abs().max()) for name in expected) > 1e-3


@check
def checkpoints_cross(rank: int, size: int) -> None:
    """A state written with the operators is read without them and the other way round, and training goes on as if."""
    for dtype, kind in kinds():
        for writer, reader in ((False, True), (True, False), (True, True)):
            with served() if writer else own_functions():
                gpt, optimizer = build(dtype, kind)
                step(gpt, optimizer, 4)
                saved = copy.deepcopy(written(optimizer, kind))
                parameters = copy.deepcopy(gpt.state_dict())
                step(gpt, optimizer, 3, start=4)
                expected = numbers(gpt)
            with served() if reader else own_functions():
                gpt, optimizer = build(dtype, kind)
                gpt.load_state_dict(parameters)
                read(optimizer, kind, saved)
                goes_on(gpt, optimizer, expected, dtype, counts=reader or kind == "plain")


def goes_on(gpt: Any, optimizer: Any, expected: dict[str, torch.Tensor], dtype: torch.dtype, counts: bool) -> None:
    """Three more steps end where the optimizer that was never stopped does, at the seventh."""
    steps = {float(kept["step"]) for item in inner(optimizer) for kept in item.state.values()}
    assert steps == {4.0}, steps
    step(gpt, optimizer, 3, start=4)
    if counts:  # torch counts up one tensor once for each parameter where Megatron loads one for all
        close(numbers(gpt), expected, 2e-4 if dtype == torch.float32 else 1.6e-2)
        steps = {float(kept["step"]) for item in inner(optimizer) for kept in item.state.values()}
        assert steps == {7.0}, steps


@check
def distributed_checkpoints(rank: int, size: int) -> None:
    """Through Megatron's distributed checkpoints, in both formats that 0.16 writes, from and to either optimizer."""
    import tempfile

    from megatron.core import dist_checkpointing

    for form in ("fully_reshardable", "dp_reshardable"):
        metadata = {"distrib_optim_sharding_type": form, "distrib_optim_fully_reshardable_mem_efficient": False}
        for writer, reader in ((False, True), (True, False)):
            with tempfile.TemporaryDirectory() as folder:
                with served() if writer else own_functions():
                    gpt, optimizer = build(torch.bfloat16, "distributed")
                    step(gpt, optimizer, 4)
                    state = optimizer.sharded_state_dict(gpt.sharded_state_dict(), metadata=metadata)
                    dist_checkpointing.save({"optimizer": state}, folder)
                    parameters = copy.deepcopy(gpt.state_dict())
                    step(gpt, optimizer, 3, start=4)
                    expected = numbers(gpt)
                with served() if reader else own_functions():
                    gpt, optimizer = build(torch.bfloat16, "distributed")
                    gpt.load_state_dict(parameters)
                    model = gpt.sharded_state_dict()
                    state = optimizer.sharded_state_dict(model, is_loading=True, metadata=metadata)
                    optimizer.load_state_dict(dist_checkpointing.load({"optimizer": state}, folder)["optimizer"])
                    goes_on(gpt, optimizer, expected, torch.bfloat16, counts=reader)


@check
def offloaded_parameters(rank: int, size: int) -> None:
    """CPU offload of half of the parameters is untouched, to the last bit."""
    values = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5, "overlap_cpu_optimizer_d2h_h2d": False}
    results = []
    for rows in (False, True):
        with served() if rows else own_functions():
            gpt, optimizer = build(**values)
            step(gpt, optimizer, 5)
            results.append(numbers(gpt))
            for item in inner(optimizer):
                assert {type(part) for part in item.sub_optimizers} == {torch.optim.AdamW}
                assert item.defaults["gpu_optimizer_cls"] is torch.optim.AdamW
                assert b"llm_adapt" not in pickle.dumps(item.state_dict())
    close(results[1], results[0], 0.0)


@check
def sharded_parameters(rank: int, size: int) -> None:
    """Parameters that are DTensors, as FSDP has them, are updated in place as torch's AdamW does, by kernels."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    results = []
    for adam in (torch.optim.AdamW, ours.FusedAdam):
        value = torch.linspace(-1, 1, 12).reshape(4, 3)
        p = torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
        optimizer = adam([p], lr=0.1, weight_decay=0.1)
        for number in range(3):
            placement = Replicate() if number == 1 else Shard(0)
            p.grad = distribute_tensor(value * (number - 1.5), mesh, [placement]).redistribute(mesh, [Shard(0)])
            optimizer.step()
        assert type(optimizer.state[p]["exp_avg"]) is type(p.data)
        results.append(p.full_tensor().detach())
    served_by = [(row["library"], str(row["refusals"])) for row in receipt() if row["op"] == "adamw"]
    assert served_by
    assert not [item for item in served_by if "DTensor" in item[1]], served_by  # kernels get this rank's own part
    torch.testing.assert_close(results[1], results[0])


def own_functions() -> Any:
    """Megatron's own functions, whose distributed optimizer can be loaded."""
    return served(tables=(checkpoints,))


def written(optimizer: Any, kind: str) -> Any:
    """What Megatron saves of an optimizer."""
    if kind == "plain":
        return optimizer.state_dict()
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [(part.state_dict(), part.get_parameter_state_dp_zero()) for part in parts]


@torch.no_grad()
def read(optimizer: Any, kind: str, saved: Any) -> None:
    """Load it again."""
    if kind == "plain":
        optimizer.load_state_dict(saved)
        return
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    for part, (state, parameters) in zip(parts, saved, strict=True):
        part.load_state_dict(state)
        part.load_parameter_state_from_dp_zero(parameters)


if __name__ == "__main__":
    main()
