"""CUDA-only code, unchanged, on the device that the tests run on: what training scripts do, with the CPU's numbers.

pytest tests/devices/test_cuda_scripts.py [--simulate npu | mlu | dcu] [--device npu]
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import llm_adapt

pytestmark = pytest.mark.every_device


@pytest.fixture(autouse=True)
def patched(pytestconfig: pytest.Config, adapter_name: str) -> Iterator[None]:
    """CUDA is the device under test inside each test."""
    with llm_adapt.patched(device=adapter_name, simulate=pytestconfig.getoption("--simulate")):
        yield


def block() -> nn.Module:
    """A small network with the layers of a language model; the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 32), nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 50))


def tokens(rows: int = 8) -> torch.Tensor:
    """Tokens of a fixed text."""
    return torch.randint(0, 50, (rows, 12), generator=torch.Generator().manual_seed(1))


def losses(device: str, make: Callable[..., torch.optim.Optimizer], steps: int = 8) -> list[float]:
    """Train to repeat the input; the loss of each step."""
    model, text = block().to(device), tokens().to(device)
    optimizer = make(model.parameters())
    found = []
    for _ in range(steps):
        loss = F.cross_entropy(model(text).flatten(0, 1), text.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=True),
    "adam loop": lambda p: torch.optim.Adam(p, lr=3e-3, foreach=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_gives_the_losses_of_the_cpu(name: str) -> None:
    """Eight steps of each optimizer on the device and on the CPU."""
    make = OPTIMIZERS[name]
    assert losses("cuda", make) == pytest.approx(losses("cpu", make), rel=2e-5)


def test_a_tensor_of_cuda_is_one() -> None:
    """Factories, moves and questions of CUDA code agree with each other."""
    made = [torch.zeros(2, device="cuda"), torch.zeros(2).cuda(), torch.zeros(2).to("cuda:0"), torch.zeros(2).to(0)]
    assert all(tensor.is_cuda for tensor in made)
    assert len({tensor.device for tensor in made}) == 1
    assert made[0].device == torch.device("cuda:0")
    assert torch.cuda.current_device() == 0
    assert torch.cuda.is_available()
    assert isinstance(torch.cuda.get_device_name(), str)
    assert torch.cuda.get_device_capability() >= (8, 0)
    assert torch.cuda.get_device_properties(0).total_memory > 0


def test_tensors_of_two_devices_do_not_mix() -> None:
    """As on CUDA; on the CPU there is one device."""
    if torch.zeros(1, device="cuda").device.type == "cpu":
        pytest.skip("the CPU is one device")
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="cuda") + torch.ones(3)


def test_autocast_and_scaler() -> None:
    """Mixed precision: the matmul is in bfloat16, the loss near float32's, and a scaler finds an overflow."""
    model, text = block().cuda(), tokens().cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = model(text)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(text), rtol=0.05, atol=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    before = model[2].weight.detach().clone()
    scaler.scale(model(text).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model[2].weight, before)
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_dropout_drops_the_same(reentrant: bool) -> None:
    """Activation checkpointing restores the device's random state: the gradients are the same bits."""

    def gradient(recompute: bool) -> torch.Tensor:
        torch.manual_seed(3)
        layer = nn.Linear(16, 16).cuda()
        nn.init.constant_(layer.weight, 0.1)
        x = torch.ones(4, 16, device="cuda", requires_grad=True)
        act = lambda x: F.dropout(layer(x), 0.5)  # noqa: E731
        torch.cuda.manual_seed(3)
        out = checkpoint(act, x, use_reentrant=reentrant) if recompute else act(x)
        torch.rand(5, device="cuda")  # moves the state on before backward
        out.square().sum().backward()
        return x.grad

    assert torch.equal(gradient(True), gradient(False))


def test_random_state_can_be_put_back() -> None:
    """Seeds, states and forks of the device's generator."""
    torch.cuda.manual_seed_all(5)
    state = torch.cuda.get_rng_state()
    first = torch.randn(6, device="cuda")
    with torch.random.fork_rng(devices=[0]):
        torch.rand(3, device="cuda")
    second = torch.randn(6, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.randn(6, device="cuda"), first)
    assert torch.equal(torch.randn(6, device="cuda"), second)
    assert not torch.equal(first, second)


def test_streams_order_what_they_are_told() -> None:
    """A side stream that waits, works and is waited for; events measure and are recorded."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    side = torch.cuda.Stream()
    x = torch.full((1000,), 2.0, device="cuda")
    start.record()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 3
        y.record_stream(side)
    torch.cuda.current_stream().wait_stream(side)
    end.record()
    torch.cuda.synchronize()
    assert y.sum().item() == 6000.0
    assert start.elapsed_time(end) >= 0
    assert end.query()


def test_a_checkpoint_goes_from_device_to_device() -> None:
    """torch.save on the device, torch.load to the CPU, to CUDA and to where it was."""
    file = io.BytesIO()
    torch.save(block().cuda().state_dict(), file)
    for place in ("cpu", "cuda", torch.device("cuda:0"), None):
        file.seek(0)
        model = block()
        model.load_state_dict(torch.load(file, map_location=place, weights_only=True))
    file.seek(0)
    weights = torch.load(file, map_location="cpu", weights_only=True)
    assert all(torch.equal(weights[name], value) for name, value in block().state_dict().items())


def test_batches_are_pinned_and_moved() -> None:
    """A DataLoader with pin_memory feeds the device."""
    loader = DataLoader(TensorDataset(torch.arange(12.0).view(6, 2)), batch_size=2, pin_memory=True)
    moved = [batch.cuda(non_blocking=True) for (batch,) in loader]
    assert torch.cat(moved).cpu().flatten().tolist() == list(range(12))


def test_grouped_attention_is_the_cpus() -> None:
    """scaled_dot_product_attention with a causal mask, forward and backward."""
    values = torch.randn(3, 2, 4, 7, 16, generator=torch.Generator().manual_seed(2))

    def run(device: str) -> list[torch.Tensor]:
        q, k, v = (part.to(device).requires_grad_() for part in values.unbind())
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return [part.cpu() for part in (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))]

    for found, expected in zip(run("cuda"), run("cpu"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_compiled_code_is_the_same() -> None:
    """torch.compile without a code generator: the graph and its gradient run on the device."""
    torch._dynamo.reset()
    model, text = block().cuda(), tokens().cuda()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(text), model(text))
    compiled(text).sum().backward()
    assert model[2].weight.grad.isfinite().all()


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A job of one rank on what the script calls nccl."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_collectives_of_one_rank() -> None:
    """The reductions and gathers that training uses, AVG too."""
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX):
        x = torch.tensor([1.0, 2.0], device="cuda")
        dist.all_reduce(x, op=op)
        assert x.tolist() == [1.0, 2.0]
    out = torch.empty(2, device="cuda")
    dist.all_gather_into_tensor(out, x)
    dist.reduce_scatter_tensor(out, x, op=dist.ReduceOp.AVG)
    assert out.tolist() == x.tolist() == [1.0, 2.0]
    objects: list[object] = [None]
    dist.all_gather_object(objects, {"rank": 0})
    assert objects == [{"rank": 0}]
    dist.barrier()


@pytest.mark.usefixtures("one_rank")
def test_data_parallel_training() -> None:
    """DistributedDataParallel gives the gradients of the module alone."""
    model, text = block().cuda(), tokens().cuda()
    wrapped = nn.parallel.DistributedDataParallel(model, device_ids=[0])
    wrapped(text).square().sum().backward()
    expected = block()
    expected(tokens()).square().sum().backward()
    torch.testing.assert_close(model[2].weight.grad.cpu(), expected[2].weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("one_rank")
def test_fully_sharded_training() -> None:
    """FSDP2 trains to the losses of the plain module."""
    from torch.distributed.fsdp import fully_shard

    model, text = fully_shard(block().cuda()), tokens().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    for _ in range(3):
        loss = F.cross_entropy(model(text).flatten(0, 1), text.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[0] == pytest.approx(losses("cpu", OPTIMIZERS["adamw"], 1)[0], rel=1e-5)
    assert found[2] < found[1] < found[0]


def test_integers_are_counted() -> None:
    """histc of integers, by which mixture-of-experts code counts the tokens of each expert."""
    experts = torch.tensor([0, 2, 2, 1, 2], device="cuda")
    if experts.device.type == "cpu":
        experts = experts.float()  # torch's CPU has none of integers, and such code asks for the device
    assert torch.histc(experts, bins=3, min=0, max=2).tolist() == [1, 1, 3]


def test_memory_is_counted() -> None:
    """What CUDA code asks of memory answers with numbers that move."""
    before = torch.cuda.memory_allocated()
    held = torch.ones(4 << 20, device="cuda")
    held.add_(1)
    assert torch.cuda.memory_allocated() >= before
    assert torch.cuda.max_memory_allocated() >= torch.cuda.memory_allocated()
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total
    del held
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
