"""Each chip in a process of its own: plain tensors, a training step, bfloat16, and what our kernels refuse there."""

from __future__ import annotations

import pytest

from tests.simulators.npu_checks import said_on

pytestmark = pytest.mark.simulator("npu")

OLDER = ("Ascend310P3", "Ascend910A")
CHIPS = (*OLDER, "Ascend910B3", "Ascend910_9391", "Ascend950")

_STEP = """
import copy
from torch.nn import functional as F

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(20, 32)
        self.norm = torch.nn.LayerNorm(32)
        self.heads = torch.nn.Linear(32, 96)
        self.wide, self.narrow = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, tokens):
        x = self.table(tokens)
        q, k, v = self.heads(self.norm(x)).view(2, 8, 3, 4, 8).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 8, 32)
        x = x + self.narrow(F.gelu(self.wide(x), approximate="tanh"))
        return x @ self.table.weight.t()

def losses(net, device, half=False):
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device, enabled=half)
    found = []
    for _ in range(3):
        with torch.autocast(device, dtype=torch.float16, enabled=half):
            loss = F.cross_entropy(net(tokens.to(device)).float().flatten(0, 1), tokens.to(device).flatten())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        found.append(loss.item())
    return torch.tensor(found)

torch.manual_seed(0)
net, tokens = Net(), torch.randint(0, 20, (2, 8))
twin, third = copy.deepcopy(net).npu(), copy.deepcopy(net).npu()
expected = losses(net, "cpu")
print("float32", bool((losses(twin, "npu") - expected).abs().max() < 1e-4))
print("float16", bool((losses(third, "npu", half=True) - expected).abs().max() < 0.05))
"""

_TENSORS = """
x = torch.arange(24.0).reshape(2, 3, 4)
there = x.npu()
views = [lambda t: t[:, 1], lambda t: t[:, 1:, ::2], lambda t: t.permute(2, 0, 1), lambda t: t[0].t(),
         lambda t: t[:, :1].expand(2, 5, 4), lambda t: t.half(), lambda t: t.long(), lambda t: t.half()[1].t().float(),
         lambda t: t.permute(2, 0, 1)[1:, :, 1], lambda t: t.bool(), lambda t: t.flip(0).transpose(0, 2)]
print(all(torch.equal(view(there).contiguous().cpu(), view(x).contiguous()) for view in views))
print(all(torch.equal(view(there).cpu(), view(x)) for view in views))
for dtype in (torch.float32, torch.float16):
    here, other = torch.zeros(3, 8, dtype=dtype), torch.zeros(3, 8, dtype=dtype).npu()
    for one, source in ((here, x), (other, there)):
        one[:, ::2] = source[1]
        one[:, 1::2].copy_(source[0].t().contiguous().t())
    print(torch.equal(other.cpu(), here))
"""

_OUR_KERNELS = """
import llm_adapt
from llm_adapt.ops.add_rms_norm import add_rms_norm
from llm_adapt.ops.attention import attention
from llm_adapt.ops.decode_attention import decode_attention
from llm_adapt.ops.rms_norm import rms_norm

half = lambda *shape, dtype=torch.float16: torch.randn(shape).to(dtype).npu()
q = half(1, 8, 2, 64)
attention(q, half(1, 8, 2, 64), half(1, 8, 2, 64), causal="top_left")
decode_attention(half(1, 1, 2, 64), half(1, 16, 2, 64), half(1, 16, 2, 64), torch.tensor([7], dtype=torch.int32).npu())
add_rms_norm(half(4, 64), half(4, 64), half(64))
rms_norm(half(4, 64), half(64))
print(llm_adapt.report().to_text())
"""


@pytest.mark.parametrize("chip", CHIPS)
def test_a_training_step(chip: str) -> None:
    """Embedding, norm, attention, GELU, cross entropy, clipping and AdamW: as on the CPU; in float16 nearly."""
    assert said_on(chip, _STEP).splitlines() == ["float32 True", "float16 True"]


@pytest.mark.parametrize("chip", CHIPS)
def test_plain_tensors(chip: str) -> None:
    """Views made contiguous, casts and copies into views: through GE where operators are compiled for each shape."""
    assert said_on(chip, _TENSORS).splitlines() == ["True"] * 4


@pytest.mark.parametrize("chip", CHIPS)
def test_compiling_by_default(chip: str) -> None:
    """A1 and 310P compile operators for each shape unless told otherwise; later chips do not."""
    text = said_on(chip, "torch.ones(1).npu()\nprint(torch.npu.is_jit_compile_false())")
    assert text.strip() == str(chip not in OLDER)


@pytest.mark.parametrize("chip", OLDER)
@pytest.mark.parametrize("call", ["x.npu().bfloat16()", "x.bfloat16().npu() + 1", "x.bfloat16().npu().float()"])
def test_older_chips_have_no_bfloat16(chip: str, call: str) -> None:
    """Neither made by a cast, nor computed with, nor cast from."""
    text = said_on(chip, f"x = torch.ones(3)\noutcome(lambda: {call})\nprint(torch.npu.is_bf16_supported())")
    assert f"which {chip} does not support" in text
    assert text.strip().endswith("False")


@pytest.mark.parametrize("chip", OLDER)
def test_our_kernels_say_what_an_older_chip_lacks(chip: str) -> None:
    """Refused with the reason instead of quarantined after a failure; norms are served on both."""
    text = said_on(chip, _OUR_KERNELS)
    assert "quarantined" not in text
    assert "failed its proof" not in text
    for name in ("npu_fusion_attention", "npu_fused_infer_attention_score"):
        assert f"{name} is not documented for {chip}" in text
    assert "op: rms_norm float16: torch_npu - first in order that serves" in text
    reason = (
        "npu_add_rms_norm has no gradient on" if chip == "Ascend310P3" else "npu_add_rms_norm is not documented for"
    )
    assert f"{reason} {chip}" in text


@pytest.mark.parametrize("chip", OLDER)
def test_our_kernels_refuse_bfloat16_on_older_chips(chip: str) -> None:
    """Before anything is run: a failure in the queue would stop the device."""
    code = """
from llm_adapt.ops.dispatch.registry import find_op, load_library
from llm_adapt.ops.dispatch.call import describe
assert load_library("torch_npu") == ""
x = torch.ones(4, 64).bfloat16().npu()
kernel = find_op("rms_norm").kernels["torch_npu"]
from tests.contracts.kernels import why_not
from tests.ops.cases import Case
print(why_not(kernel, Case(find_op("rms_norm"), 0, torch.bfloat16, find_op("rms_norm").bind(x))))
"""
    assert f"takes no bfloat16 on {chip}" in said_on(chip, code)


@pytest.mark.parametrize("chip", ["Ascend910B3", "Ascend950"])
def test_sinks_of_attention_reach_the_kernel(chip: str) -> None:
    """On Ascend950 through the second version: the first would leave them out without a word."""
    code = """
from llm_adapt.ops.dispatch.proof import prove
from llm_adapt.ops.dispatch.registry import find_op, load_library
assert load_library("torch_npu") == ""
op = find_op("attention")
called = []
for name in ("npu_fusion_attention", "npu_fusion_attention_v2"):
    def spy(*args, real=getattr(torch_npu, name), name=name, **kwargs):
        called.append(name)
        return real(*args, **kwargs)
    setattr(torch_npu, name, spy)
draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(5)).npu()
verdict = prove(op, op.kernels["torch_npu"], op.bind(draw(1, 8, 2, 32), draw(1, 8, 2, 32), draw(1, 8, 2, 32),
                sinks=draw(2), causal="bottom_right"))
print(verdict.holds, verdict.reason, *sorted(set(called)))
"""
    version = "npu_fusion_attention_v2" if chip == "Ascend950" else "npu_fusion_attention"
    assert said_on(chip, code).split() == ["True", version]
