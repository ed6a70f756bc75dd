"""torch.compile, torch.jit, FX, functorch, torch.export, deepcopy and pickle work on code that says cuda."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import llm_adapt

pytestmark = [
    pytest.mark.usefixtures("facade"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Each test compiles anew."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _region(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return (torch.outer(x, x) @ torch.outer(x, x)).float()


def _streams(x: torch.Tensor) -> torch.Tensor:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.default_stream())
    torch.cuda.synchronize()
    return x * 2


def _side_stream(x: torch.Tensor) -> torch.Tensor:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        y = x * 2
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.device(1):
        return y + torch.cuda.current_device()


CODE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    'to("cuda")': lambda x: x.to("cuda") * 2,
    "to(device=)": lambda x: x.to(device="cuda:1", dtype=torch.float64, non_blocking=True) * 2,
    "cuda()": lambda x: x.cuda() + x.cuda(1),
    'to("cpu")': lambda x: x.to("cpu") * 2,
    "cpu()": lambda x: x.cpu() * 2,
    "zeros": lambda x: x + torch.zeros(3, device="cuda"),
    "ones_like": lambda x: x + torch.ones_like(x, device="cuda:0"),
    "new_ones": lambda x: x + x.new_ones(3, device="cuda"),
    "tensor": lambda x: x + torch.tensor([1.0, 2.0, 3.0], device="cuda"),
    "device": lambda x: x.to(torch.device("cuda")) + torch.arange(3, device=torch.device("cuda", 0)),
    "== device": lambda x: x * 2 if x.device == torch.device("cuda") else x,
    "is_cuda": lambda x: x * 2 if x.is_cuda else x,
    "get_device": lambda x: x + x.get_device(),
    "type()": lambda x: x * 2 if x.type() == "torch.cuda.FloatTensor" else x,
    "type(str)": lambda x: x.type("torch.cuda.DoubleTensor") * 2,
    "isinstance": lambda x: x * 2 if isinstance(x.device, torch.device) else x,
    "is_available": lambda x: x * 2 if torch.cuda.is_available() else x,
    "device_count": lambda x: x * torch.cuda.device_count(),
    "current_device": lambda x: x + torch.zeros(3, device=torch.cuda.current_device()),
    "capability": lambda x: x * torch.cuda.get_device_capability()[0],
    "properties": lambda x: x * torch.cuda.get_device_properties(0).major,
    "is_bf16_supported": lambda x: x * 2 if torch.cuda.is_bf16_supported() else x,
    "autocast": _region,
    "autocast state": lambda x: x * 2 if torch.is_autocast_enabled() else x,
    "streams": _streams,
    "pin_memory": lambda x: x.detach().pin_memory() * 2,
    "logsigmoid": lambda x: torch.nn.functional.logsigmoid(x),  # torch chooses its decomposition by is_cuda
}


@pytest.mark.parametrize("code", CODE.values(), ids=CODE.keys())
def test_compiled_code_computes_what_eager_code_does(code: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """torch.compile takes the whole function, without a graph break, and gives value and gradient of eager code."""
    x, y = (torch.arange(3.0, requires_grad=True) for _ in range(2))
    expected, found = code(x), torch.compile(code, backend="aot_eager", fullgraph=True)(y)
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype
    if expected.requires_grad:
        expected.sum().backward()
        found.sum().backward()
        assert torch.equal(y.grad, x.grad)


SNAPSHOTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cpu()": lambda x: x.cpu(),
    'to("cpu")': lambda x: x.to("cpu"),
    "detach().cpu()": lambda x: x.detach().cpu(),
}


@pytest.mark.parametrize("take", SNAPSHOTS.values(), ids=SNAPSHOTS.keys())
def test_compiled_snapshots_are_copies(take: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A copy brought to the CPU by compiled code does not change with the tensor, as in eager code."""
    x = torch.ones(3)
    taken = torch.compile(take, backend="aot_eager", fullgraph=True)(x)
    x.zero_()
    assert taken.tolist() == [1.0, 1.0, 1.0]


def test_compiled_code_stays_valid() -> None:
    """Translating a device that was not named before does not make compiled code compile again."""
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x: x.to("cuda") + torch.zeros(3, device="cuda:0"), backend=counter)
    for place in ("cuda", "cuda:1", 1, torch.device("cuda:1"), "cpu", "meta"):
        torch.zeros(1).to(place)
        compiled(torch.ones(3))
    assert counter.frame_count == 1


def test_a_compiler_imported_late_knows_the_same(facade: Any) -> None:
    """Dynamo is imported with the facade, so that its tables hold torch's functions and ours are inlined."""
    from torch._dynamo.trace_rules import get_torch_obj_rule_map

    ours = [torch.cuda.device_count, torch.cuda.synchronize, torch.zeros, torch.is_autocast_enabled]
    assert [function for function in ours if function in get_torch_obj_rule_map()] == []


def test_compiled_code_may_break() -> None:
    """Code with side streams and device contexts, which dynamo leaves to Python, computes when it is compiled."""
    x = torch.arange(3.0)
    assert torch.equal(torch.compile(_side_stream, backend="aot_eager")(x), _side_stream(x))
    with torch.device("cuda"):
        assert torch.compile(lambda x: x + torch.ones(3), backend="aot_eager")(x).tolist() == [1.0, 2.0, 3.0]


def test_compiled_code_after_unpatch() -> None:
    """After unpatch() compiled code asks torch again."""
    compiled = torch.compile(lambda x: x * 2 if x.is_cuda else x, backend="aot_eager")
    assert compiled(torch.ones(1)).item() == 2.0
    llm_adapt.unpatch()
    torch._dynamo.reset()
    assert compiled(torch.ones(1)).item() == 1.0


def test_script() -> None:
    """torch.jit.script recognises the functions of torch that are replaced, and its own types."""

    def code(x: torch.Tensor, place: torch.device) -> torch.Tensor:
        if torch.is_autocast_enabled():
            return x
        return x.to(place) + torch.zeros(3) + torch.ones_like(x) + torch.arange(3, device=x.device)

    def draw(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return x + torch.rand(3, generator=generator)

    def make(x: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(device="cpu")
        return x.to(torch.device("cpu", 0)) + torch.rand(3, device=torch.device("cpu"), generator=generator)

    assert torch.jit.script(make)(torch.ones(3)).shape == (3,)
    assert torch.jit.script(code)(torch.ones(3), torch.device("cuda")).tolist() == [2.0, 3.0, 4.0]
    assert torch.jit.script(draw)(torch.ones(3), torch.Generator("cuda")).shape == (3,)


def test_scripted_modules() -> None:
    """A module whose code asks for autocast's state is scripted, moved and computed."""
    encoder = torch.nn.TransformerEncoderLayer(8, 2, dropout=0.0).cuda()
    x = torch.ones(2, 1, 8, device="cuda")
    assert torch.allclose(torch.jit.script(encoder)(x), encoder(x))


def test_trace() -> None:
    """torch.jit.trace records code that moves tensors."""
    traced = torch.jit.trace(lambda x: x.cuda() + x.cpu() + torch.zeros(2, device="cuda"), torch.ones(2))
    assert traced(torch.tensor([1.0, 2.0])).tolist() == [2.0, 4.0]


class Moves(torch.nn.Module):
    """A module that says cuda in every way."""

    def forward(self, x):  # without hints: FX pickles hints as objects, and here they are text
        """Three times x, moved about."""
        zeros = torch.zeros(3, device=torch.device("cuda"))
        return x.to("cuda") + x.cuda() + x.cpu() + zeros + torch.zeros_like(x, device="cuda:1")


def test_fx() -> None:
    """torch.fx traces, runs, pickles and copies such a module."""
    x, traced = torch.arange(3.0), torch.fx.symbolic_trace(Moves())
    for module in (traced, pickle.loads(pickle.dumps(traced)), copy.deepcopy(traced)):
        assert torch.equal(module(x), 3 * x)
    assert "x.to('cuda')" in traced.code


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_export(strict: bool) -> None:
    """torch.export keeps the copy to the CPU and names this device."""
    exported = torch.export.export(Moves(), (torch.ones(3),), strict=strict)
    assert "cuda" not in exported.graph_module.code
    assert "copy = True" in exported.graph_module.code
    assert exported.module()(torch.arange(3.0)).tolist() == [0.0, 3.0, 6.0]


def test_make_fx() -> None:
    """make_fx records the operators, on this device."""
    graph = make_fx(Moves())(torch.ones(3))
    assert "_to_copy" in graph.code
    assert "cuda" not in graph.code
    assert graph(torch.arange(3.0)).tolist() == [0.0, 3.0, 6.0]


def test_functorch() -> None:
    """vmap, grad, jvp and functional_call transform code that says cuda."""

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (x.to("cuda") * torch.arange(3.0, device="cuda")).cpu().sum()

    x = torch.ones(2, 3)
    assert torch.func.vmap(loss)(x).tolist() == [3.0, 3.0]
    assert torch.func.vmap(torch.func.grad(loss))(x).tolist() == [[0.0, 1.0, 2.0]] * 2
    assert torch.func.jvp(loss, (x[0],), (x[0],))[1].item() == 3.0
    module = torch.nn.Linear(3, 1, bias=False, device="cuda")
    weights = {"weight": torch.ones(1, 3, device="cuda")}
    assert torch.func.functional_call(module, weights, (x.cuda(),)).tolist() == [[3.0], [3.0]]


def test_copies_and_pickles() -> None:
    """Modules, optimizers and devices made with cuda survive deepcopy and pickle."""
    module = torch.nn.Linear(2, 2, device="cuda")
    optimizer = torch.optim.Adam(module.parameters())
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again.weight, module.weight)
    assert pickle.loads(pickle.dumps(optimizer)).param_groups[0]["lr"] == 1e-3
    for device in (torch.device("cuda:1"), torch.device("meta")):
        assert copy.deepcopy(device) == copy.copy(device) == pickle.loads(pickle.dumps(device)) == device


def test_fake_tensors() -> None:
    """FakeTensorMode runs code that says cuda without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.ones(3, device="cuda")
        assert (x.cuda() + x.to("cuda:1")).is_cuda
        assert x.cpu().device.type == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_inductor(mode: str) -> None:
    """The default compiler gives eager numbers too, in every mode."""
    x = torch.arange(3.0)
    assert torch.allclose(torch.compile(Moves(), fullgraph=True, mode=mode)(x), 3 * x)
