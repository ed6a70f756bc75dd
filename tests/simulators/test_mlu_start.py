"""How a simulated MLU begins: models, variables, autoload, import order, the vendor's migration, and patch()."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest

from llm_adapt import simulators
from llm_adapt.simulators import SimulatorError
from llm_adapt.simulators.mlu.finder import Finder
from tests.simulators.mlu_process import python


def said(code: str, model: str = "MLU590-M9", **variables: str) -> str:
    """What code prints on a simulated MLU."""
    done = python(code, model, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def refused(code: str, model: str = "MLU590-M9", **variables: str) -> str:
    """The last line of the error that code ends with."""
    done = python(code, model, **variables)
    assert done.returncode != 0, done.stdout
    return done.stderr.strip().splitlines()[-1]


def test_nothing_is_found_without_the_simulator() -> None:
    """Outside of a simulation there is no torch_mlu to import."""
    assert not any(isinstance(finder, Finder) for finder in sys.meta_path)
    assert importlib.util.find_spec("torch_mlu") is None


def test_torch_loads_it_by_itself() -> None:
    """torch's autoload imports torch_mlu, whose metadata names this torch; without autoload an import does."""
    code = "import torch, importlib.metadata as m; print(hasattr(torch, 'mlu'), m.version('torch_mlu'))"
    torch_version = importlib.metadata.version("torch").partition("+")[0]
    assert said(code) == f"True 0.0.0+torch{torch_version}"
    code = "import torch; a = hasattr(torch, 'mlu'); import torch_mlu; print(a, torch.mlu.is_available())"
    assert said(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "False True"


def test_install_wants_torch_mlu() -> None:
    """With autoload off and nothing imported, install() says what is missing."""
    line = refused("import torch; simulators.install()", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "nothing imported torch_mlu" in line


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 8),
        ({"MLU_SIM_DEVICES": "16"}, 16),
        ({"MLU_VISIBLE_DEVICES": "1,3"}, 2),
        ({"CN_VISIBLE_DEVICES": "0", "MLU_VISIBLE_DEVICES": "0,1", "CUDA_VISIBLE_DEVICES": "0,1,2"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, 3),
        ({"MLU_VISIBLE_DEVICES": ""}, 0),
        ({"MLU_VISIBLE_DEVICES": "0,9,1"}, 1),
    ],
)
def test_devices_can_be_hidden(variables: dict[str, str], count: int) -> None:
    """MLU_SIM_DEVICES says how many there are; CN_ goes before MLU_ before CUDA_VISIBLE_DEVICES."""
    assert said("import torch; print(torch.mlu.device_count())", **variables) == str(count)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MLU_SIM_DEVICES": "17"}, "up to 16 devices"),
        ({"MLU_SIM_DEVICES": "many"}, "is a number"),
        ({"MLU_SIM_MEMORY_GB": "much"}, "is a number"),
        ({"MLU_VISIBLE_DEVICES": "MLU-1234"}, "by number"),
    ],
)
def test_bad_variables_raise(variables: dict[str, str], message: str) -> None:
    """A variable without a meaning stops the import, naming itself."""
    assert message in python("import torch", **variables).stderr


def test_memory_is_what_the_variable_says() -> None:
    """MLU_SIM_MEMORY_GB is the memory of each device."""
    code = "import torch; print(torch.mlu.get_device_properties(0).total_memory)"
    assert said(code, MLU_SIM_MEMORY_GB="2") == str(2 * 2**30)


def test_an_mlu370_has_what_is_known_of_it() -> None:
    """Of an MLU370 the first number of the capability is public: no fused attention; memory must be said."""
    code = (
        "import torch; q = torch.ones(2, 8, 512, 64, device='mlu', dtype=torch.float16); "
        "print(torch._fused_sdp_choice(q, q, q), torch.mlu.get_device_properties().major); "
        "torch.mlu.get_device_capability()"
    )
    done = python(code, "MLU370", MLU_SIM_MEMORY_GB="24")
    assert done.stdout.strip() == "0 3"
    assert "DeviceProp.minor was asked; its value for MLU370 is not public" in done.stderr
    assert "its memory is not public" in refused("", "MLU370")
    with pytest.raises(SimulatorError, match="it has MLU590-M9"):
        simulators.parse("mlu:MLU999")


def test_triton_waits_for_torch_mlu(tmp_path: Path) -> None:
    """`import triton` before torch_mlu fails, after it works, whichever way it comes."""
    (tmp_path / "triton.py").write_text("x = 1\n", encoding="ascii")
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    assert "its MLU driver needs torch_mlu first" in refused(path + "import triton")
    assert said(path + "import torch, triton; print(triton.x)") == "1"
    file = str(tmp_path / "triton.py")
    early = f"import sys, importlib.util as u; s = u.spec_from_file_location('triton', {file!r})\n"
    early += "sys.modules['triton'] = u.module_from_spec(s); import torch"
    assert "triton was imported before torch_mlu" in python(early).stderr


def test_the_vendors_migration_is_another_way() -> None:
    """gpu_migration makes torch.cuda the MLU's, as it does on hardware, and jit.script an identity."""
    code = """
import torch, warnings
warnings.simplefilter("ignore")
if {by_import}:
    from torch_mlu.utils.gpu_migration import migration
net = torch.nn.Linear(2, 2).cuda().to("cuda:1")
function = lambda x: x
print(torch.cuda.is_available(), torch.zeros(1, device="cuda").device, net.weight.device, torch.ones(1).cuda().is_cuda,
      torch.Generator("cuda").device.type, torch.jit.script(function) is function, torch.device("cuda").type)
with torch.autocast("cuda", dtype=torch.bfloat16):
    print(net(torch.ones(2, 2, device="cuda:1")).dtype)
import sys
print(sys.modules["torch.cuda"] is torch.cuda, torch.load.__name__)
"""
    expected = "True mlu:0 mlu:1 True mlu True cuda\ntorch.bfloat16\nFalse load"
    assert said(code.format(by_import=True)) == expected
    assert said(code.format(by_import=False), TORCH_MLU_GPU_MIGRATION="1") == expected
    old = "import warnings; warnings.simplefilter('ignore'); import torch; from torch_mlu.utils.model_transfer import "
    assert said(old + "transfer; print(torch.cuda.device_count())") == "8"


SCRIPT = """
import llm_adapt
llm_adapt.patch(device="mlu")
import torch
torch.cuda.set_device(0)
torch.manual_seed(1)
net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))
x, y = torch.randn(16, 8), torch.randn(16, 1)
found = []
for device in ("cpu", "cuda"):
    torch.nn.init.constant_(net[0].weight, 0.1), torch.nn.init.constant_(net[2].weight, 0.2)
    torch.nn.init.zeros_(net[0].bias), torch.nn.init.zeros_(net[2].bias)
    net.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(5):
        loss = (net(x.to(device)) - y.to(device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found.append(loss.item())
assert abs(found[0] - found[1]) < 1e-5 * found[0], found
weight = net[0].weight
print(weight.device.type, weight.is_cuda, weight.type(), torch.cuda.get_device_capability(), torch.cuda.device_count())
"""


def test_a_cuda_script_trains_after_patch() -> None:
    """llm_adapt.patch(device="mlu") on the simulator: a CUDA script trains to the CPU's loss."""
    assert said(SCRIPT) == "mlu True torch.cuda.FloatTensor (8, 0) 8"


KERNELS = """
import llm_adapt
llm_adapt.patch(device="mlu")
import torch
from llm_adapt.ops.attention import attention
from llm_adapt.ops.rms_norm import rms_norm
x, weight = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((4, 8), (8,)))
with torch.inference_mode():
    rms_norm(x, weight)
q = torch.randn(2, 512, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
attention(q, q, q, causal="top_left").float().sum().backward()
served = [line.strip() for line in str(llm_adapt.report()).splitlines() if "op: " in line]
print(*(line.split(" - ")[0] for line in served), sep="\\n")
"""


def test_the_vendor_s_kernels_are_proved_and_serve() -> None:
    """Attention in training and norms in inference go to torch_mlu's kernels, after their proof."""
    assert said(KERNELS).splitlines() == [
        "[ok] op: attention causal='top_left' bfloat16: torch_mlu",
        "[ok] op: rms_norm bfloat16: torch_mlu",
    ]


MOVING = """
import llm_adapt
llm_adapt.patch(device="mlu")
import torch
from torch._C import _dispatch_has_kernel_for_dispatch_key as has_kernel
net = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 3), "head": torch.nn.Linear(3, 4, bias=False)})
net["head"].weight = weight = net["embed"].weight
optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
for device in ("cuda", "cpu", "cuda"):
    net.to(device)
    assert net["embed"].weight is net["head"].weight is weight, device
before = weight.detach().cpu()
net["head"](net["embed"](torch.tensor([0, 1], device="cuda"))).sum().backward()
optimizer.step()
print(weight.device, torch.equal(weight.detach().cpu(), before))
with torch.device("meta"):
    empty = torch.nn.Linear(2, 2)
print(empty.to_empty(device="cuda").weight.device)
print(has_kernel("aten::_has_compatible_shallow_copy_type", "PrivateUse1"))
llm_adapt.unpatch()
print(net.cpu()["embed"].weight is weight)
"""


def test_a_moved_module_keeps_its_parameters() -> None:
    """Module.to("cuda") leaves tied weights tied and known to the optimizer; torch alone makes new ones on an MLU."""
    assert said(MOVING).splitlines() == ["mlu:0 False", "mlu:0", "False", "False"]
