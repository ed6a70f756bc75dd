"""Programs on the simulated NPU: streams, memory, AMP, checkpoints, optimizers, exceptions, the end of a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.simulators.npu_checks import refuses

pytestmark = pytest.mark.simulator("npu")
_START = "import llm_adapt\nllm_adapt.patch(simulate='npu')\nimport torch, torch_npu\n"


def ran(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own on the simulated NPU."""
    command = [sys.executable, "-c", _START + code]
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def model() -> nn.Module:
    """A small model with the parts that training needs, the same one at every call."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets on the CPU, the same ones at every call."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(6, 8, generator=generator), torch.randn(6, 4, generator=generator)


def test_streams_and_events_are_ordered() -> None:
    """Work on a second stream after wait_event sees what the first wrote; events know that they are done."""
    first, second = torch.npu.Stream(), torch.npu.Stream()
    start, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    with torch.npu.stream(first):
        start.record()
        x = torch.ones(1000, device="npu").mul_(3)
        end.record()
    second.wait_event(end)
    with torch.npu.stream(second):
        assert torch.npu.current_stream() == second
        total = (x * 2).sum()
    torch.npu.current_stream().wait_stream(second)
    assert total.item() == 6000
    end.synchronize()
    assert end.query()
    assert start.elapsed_time(end) >= 0
    assert torch.npu.current_stream() == torch.npu.default_stream()


def test_memory_has_a_limit() -> None:
    """Beyond NPU_SIM_HBM_GB torch.OutOfMemoryError comes, and freed memory can be had again."""
    code = """
small = torch.zeros(20 << 18, device="npu")
try:
    torch.zeros(60 << 18, device="npu")
except torch.OutOfMemoryError as error:
    print("refused", "out of memory" in str(error))
del small
torch.npu.empty_cache()
print(torch.zeros(30 << 18, device="npu").sum().item(), torch.npu.mem_get_info()[1] >> 20)
"""
    done = ran(code, NPU_SIM_HBM_GB="0.0625")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-3:-1] == ["refused True", "0.0 64"]


@pytest.mark.parametrize("queue", ["0", "1", "2"])
def test_task_queue(queue: str) -> None:
    """The same training step under each mode of torch_npu's task queue."""
    code = """
torch.manual_seed(0)
model, twin = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)
twin.load_state_dict(model.state_dict())
x = torch.randn(40, 6)
model.npu()
for step in range(30):
    strided = torch.zeros(40, 12).npu()[:, ::2].copy_(x.npu())
    found, expected = model(strided.t().contiguous().t()).square().mean(), twin(x).square().mean()
    found.backward(), expected.backward()
    with torch.no_grad():
        for one in (*model.parameters(), *twin.parameters()):
            one -= 0.1 * one.grad
            one.grad = None
print(abs(found.item() - expected.item()) < 1e-6)
"""
    done = ran(code, TASK_QUEUE_ENABLE=queue)
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["True"]), done.stderr[-2000:]


def test_autocast_and_grad_scaler() -> None:
    """float16 under autocast with torch.amp.GradScaler; an overflow halves the scale and skips the step."""
    net, (x, y) = model().npu(), batch()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("npu", init_scale=2.0**10)
    losses = []
    for _ in range(5):
        with torch.autocast("npu", dtype=torch.float16):
            out = net(x.npu())
            assert out.dtype == torch.float16
            loss = nn.functional.mse_loss(out.float(), y.npu())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    before = [one.detach().clone() for one in net.parameters()]
    scaler.scale(net(x.npu()).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(one, old) for one, old in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_repeats_its_dropout(reentrant: bool) -> None:
    """Recomputation draws the same dropout mask: gradients equal those without a checkpoint to the bit."""
    layers = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 3)).npu()
    gradients = []
    for recompute in (False, True):
        torch.npu.manual_seed(5)
        x = batch()[0].npu().requires_grad_()
        out = checkpoint(layers, x, use_reentrant=reentrant) if recompute else layers(x)
        gradients.append(torch.autograd.grad(out.sum(), x)[0] if not reentrant else _backward(out, x))
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


def _backward(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    out.sum().backward()
    assert x.grad is not None
    return x.grad


def test_pinned_batches() -> None:
    """DataLoader(pin_memory=True) gives pinned tensors, and a non-blocking copy brings them over."""
    data = torch.utils.data.TensorDataset(torch.arange(10.0), torch.arange(10))
    seen = []
    for x, y in torch.utils.data.DataLoader(data, batch_size=4, pin_memory=True):
        assert x.is_pinned()
        assert y.is_pinned()
        seen += x.npu(non_blocking=True).tolist()
    assert seen == list(range(10))


def test_save_and_load(tmp_path: Path) -> None:
    """Tensors of the NPU load where map_location says, by default where they were; shared memory stays shared."""
    base = torch.arange(6.0, device="npu:1")
    torch.save({"x": base, "view": base[2:4]}, tmp_path / "file.pt")
    loaded = torch.load(tmp_path / "file.pt")
    assert loaded["x"].device == torch.device("npu", 1)
    loaded["view"].zero_()
    assert loaded["x"].tolist() == [0, 1, 0, 0, 4, 5]
    for where in ("cpu", "npu:0", {"npu:1": "npu:0"}):
        x = torch.load(tmp_path / "file.pt", map_location=where)["x"]
        assert x.device == torch.device("cpu" if where == "cpu" else "npu:0")
        assert x.tolist() == list(range(6))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW for loop": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    """Ten steps end in the parameters that the CPU ends in."""
    parameters = []
    for device in ("cpu", "npu"):
        net, (x, y) = model().to(device), batch()
        optimizer = OPTIMIZERS[name](net.parameters())
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x.to(device)), y.to(device)).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        parameters.append([one.detach().cpu() for one in net.parameters()])
    torch.testing.assert_close(parameters[1], parameters[0], rtol=1e-5, atol=1e-6)


class Failing(torch.autograd.Function):
    """The identity whose backward raises."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        """Return x."""
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Raise."""
        raise ValueError("from a backward")


class Mixing(Failing):
    """The identity whose backward asks the NPU for what a kernel refuses."""

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Add tensors of two devices."""
        return gradient + torch.ones(3)


def test_an_exception_in_backward_arrives() -> None:
    """From Python and from a kernel that refuses, in the threads of autograd; work goes on afterwards."""
    x = torch.ones(3, device="npu", requires_grad=True)
    with pytest.raises(ValueError, match="from a backward"):
        Failing.apply(x).sum().backward()
    with refuses("on the same device"):
        Mixing.apply(x).sum().backward()
    (x * 2).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]


def test_calls_that_are_not_modelled_name_themselves() -> None:
    """A symbol of CANN that nobody wrote ends in an error that names it, instead of claiming success."""
    done = ran("import ctypes\nctypes.CDLL('libascendcl.so').rtKernelLaunch(None, 0, None, 0, None, None)")
    assert done.returncode != 0
    assert "does not model rtKernelLaunch" in done.stderr


@pytest.mark.parametrize("queue", ["0", "1"])
def test_a_process_ends_well(queue: str) -> None:
    """A process that used streams, backward and pinned memory ends with exit code 0."""
    code = """
x = torch.ones(4, device="npu", requires_grad=True)
with torch.npu.stream(torch.npu.Stream()):
    (x * 2).sum().backward()
torch.ones(4).pin_memory().npu(non_blocking=True)
"""
    done = ran(code, TASK_QUEUE_ENABLE=queue)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_mask_hides_devices() -> None:
    """ASCEND_RT_VISIBLE_DEVICES leaves the devices that it names; a spelling that is not documented is refused."""
    code = "print(torch.npu.device_count()); torch.ones(1, device='npu:1'); torch.ones(1, device='npu:2')"
    done = ran(code, ASCEND_RT_VISIBLE_DEVICES="2,5")
    assert done.stdout.splitlines()[-1] == "2", done.stderr
    assert "the simulator has 2 (NPU_SIM_DEVICES, ASCEND_RT_VISIBLE_DEVICES)" in done.stderr
    for mask in ("5,2", "8"):
        done = ran("torch.npu.device_count()", ASCEND_RT_VISIBLE_DEVICES=mask)
        assert f'ASCEND_RT_VISIBLE_DEVICES="{mask}" was set; the NPU simulator takes ascending numbers' in done.stderr


def test_memory_that_the_runtime_did_not_give() -> None:
    """Giving back what was never taken fails: registered, reserved and mapped memory."""
    calls = ("aclrtHostUnregister", "aclrtReleaseMemAddress", "aclrtUnmapMem", "aclrtFree", "aclrtFreeHost")
    code = f"import ctypes\nrun = ctypes.CDLL('libascendcl.so')\nprint([run[n](ctypes.c_void_p(64)) for n in {calls}])"
    assert ran(code).stdout.splitlines()[-1] == str([107000] * 5)


def test_how_busy_a_device_is_is_not_invented() -> None:
    """torch.npu.utilization has nothing to measure, and says so."""
    done = ran("torch.npu.utilization()")
    assert "does not model aclrtGetDeviceUtilizationRate" in done.stderr
