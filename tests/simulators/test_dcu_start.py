"""How a simulated DCU is chosen, what its variables and models decide, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_adapt.simulators import SIMULATORS, SimulatorError, parse
from llm_adapt.simulators.dcu.chips import CHIPS
from llm_adapt.simulators.dcu.machine import read_machine
from tests.simulators.dcu_process import python

FOLDER = Path("/nowhere")

SCRIPT = """
import llm_adapt
report = llm_adapt.patch(simulate="dcu")
import torch
layer = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.AdamW(layer.parameters())
for _ in range(3):
    layer(torch.ones(2, 8, device="cuda")).square().mean().backward()
    optimizer.step()
print(str(report).splitlines()[0])
print(report.device, torch.cuda.get_device_name(), next(layer.parameters()).device)
from llm_adapt.ops.rms_norm import rms_norm
x = torch.randn(4, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
rms_norm(x, torch.ones(32, device="cuda", dtype=torch.bfloat16)).sum().backward()
from llm_adapt.ops.attention import attention
q = torch.randn(2, 8, 4, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
attention(q, q, q, causal="bottom_right").sum().backward()
from llm_adapt.ops.dispatch.receipt import receipt
print(sorted((row["op"], row["library"]) for row in receipt()))
llm_adapt.unpatch()
"""


def test_a_cuda_script_runs_patched() -> None:
    """patch(simulate="dcu") makes a CUDA script train on the device with DTK's kernels; the report says so first."""
    done = python(SCRIPT, model=None)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("SIMULATED on host memory, not on hardware: dcu:BW1000")
    assert lines[1:] == ["dcu BW cuda:0", "[('attention', 'flash_attn'), ('rms_norm', 'lightop')]"]


def test_models_are_those_of_the_facts() -> None:
    """Each model has its gfx code; names and abilities that are not public are not invented."""
    assert "dcu" in SIMULATORS
    assert parse("dcu").model == "BW1000"
    assert {name: chip.gfx for name, chip in CHIPS.items()} == {
        "BW1000": "gfx936", "BW1100": "gfx938", "K200_AI": "gfx92a", "K100_AI": "gfx928", "K100": "gfx926",
        "Z100": "gfx906",
    }  # fmt: skip
    assert [chip.name for chip in CHIPS.values()] == ["BW", "BW1101", "", "", "", ""]
    assert parse("dcu").simulator.unknown
    with pytest.raises(SimulatorError, match="BW2000"):
        parse("dcu:BW2000")


def test_masks() -> None:
    """The three masks hide devices where they agree; where they differ nothing is guessed."""
    both = {"HIP_VISIBLE_DEVICES": "0,3", "CUDA_VISIBLE_DEVICES": "0,3"}
    assert read_machine(FOLDER, "BW1000", both).num_devices == 2
    assert read_machine(FOLDER, "BW1000", {"HCU_VISIBLE_DEVICES": ""}).num_devices == 0
    assert read_machine(FOLDER, "BW1000", {"DCU_SIM_DEVICES": "2"}).num_devices == 2
    with pytest.raises(SimulatorError, match="masks that differ"):
        read_machine(FOLDER, "BW1000", {"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"})
    for mask in ("9", "a", "1,1", "-1"):
        with pytest.raises(SimulatorError, match="different ordinals below 8"):
            read_machine(FOLDER, "BW1000", {"CUDA_VISIBLE_DEVICES": mask})


@pytest.mark.parametrize(
    ("name", "value"),
    [("DCU_SIM_DEVICES", "0"), ("DCU_SIM_DEVICES", "2.5"), ("DCU_SIM_MEMORY_GB", "much"), ("DCU_SIM_PACKAGES", "te")],
)
def test_variables_without_meaning(name: str, value: str) -> None:
    """A variable that means nothing is an error that names it."""
    with pytest.raises(SimulatorError, match=name):
        read_machine(FOLDER, "BW1000", {name: value})


def test_attention_without_flash_attn() -> None:
    """Without the package, attention without a mask raises as on DTK; with a mask, or by choice of math, it runs."""
    done = python(
        """
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
q = torch.ones(1, 1, 4, 8, device="cuda", dtype=torch.bfloat16)
try:
    F.scaled_dot_product_attention(q, q, q)
except RuntimeError as error:
    print(error)
F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(4, 4, device="cuda", dtype=torch.bool))
with sdpa_kernel(SDPBackend.MATH):
    print(F.scaled_dot_product_attention(q, q, q).shape)
try:
    import flash_attn
except ModuleNotFoundError as error:
    print(error)
""",
        DCU_SIM_PACKAGES="apex,lightop",
    )
    missing = "No matching libraries found for flash_attn_2_cuda*.so"
    assert done.stdout.splitlines() == [missing, "torch.Size([1, 1, 4, 8])", "No module named 'flash_attn'"], (
        done.stderr
    )


def test_models_decide_what_is_refused() -> None:
    """A chip of which bfloat16 and the name are not public refuses both; gfx938 has the float8 product."""
    done = python(
        """
x = torch.ones(2, 2, device="cuda")
print(torch.cuda.get_device_capability(), (x.half() @ x.half()).sum().item())
for act in (torch.cuda.get_device_name, lambda: x.bfloat16() + 1):
    try:
        act()
    except (RuntimeError, NotImplementedError) as error:
        print("refused:", error)
""",
        model="K100",
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "(9, 2) 8.0", done.stderr
    assert "get_device_properties().name was read; for gfx926 it is not public" in lines[1]
    assert "was called with bfloat16; whether this chip has it is not public" in lines[2]
    done = python(
        """
x, one = torch.ones(16, 16, device="cuda"), torch.ones((), device="cuda")
eight = x.to(torch.float8_e4m3fn)
print(torch.cuda.get_device_name(), torch._scaled_mm(eight, eight.t(), one, one, out_dtype=torch.float32).sum().item())
""",
        model="BW1100",
    )
    assert done.stdout == "BW1101 4096.0\n", done.stderr


def test_import_order() -> None:
    """The simulator must be entered before torch, and compiled parts of apex imported after it."""
    code = "from llm_adapt import simulators; simulators.enter('dcu')\n"
    late = python("import torch\n" + code, model=None)
    assert "after torch was imported" in late.stderr
    early = python(code + "import fused_weight_gradient_mlp_cuda", model=None)
    assert "ImportError: libc10.so: cannot open shared object file" in early.stderr


def test_nothing_of_it_without_entering() -> None:
    """The packages are found by no process that does not simulate a DCU, and torch is as it was."""
    done = python("import importlib.util, torch; print(importlib.util.find_spec('lightop'), torch.version.hip)", None)
    assert done.stdout == "None None\n"
