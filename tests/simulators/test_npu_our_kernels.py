"""Our kernels of torch_npu over the real torch_npu: where op-plugin's C++ says less, or something else, than documents.

tests/devices/test_ops.py has all ops on the same device; here are the calls that only op-plugin tells apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import llm_adapt
from llm_adapt.ops.attention_parts.sdpa import why_not_sdpa
from llm_adapt.ops.dispatch.registry import Kernel, find_op, load_library
from tests.contracts.kernels import cases_of, served, why_not
from tests.devices.test_ops import moved
from tests.ops.cases import Case
from tests.simulators.npu_checks import FLOATS, close, refuses

pytestmark = pytest.mark.simulator("npu")

HALF = torch.bfloat16
CHOSEN = torch.eye(4, dtype=torch.bool)


def _npu() -> Any:
    import torch_npu

    return torch_npu


def kernel_of(op: str) -> Kernel:
    """Our kernel of an op."""
    assert load_library("torch_npu") == ""
    return find_op(op).kernels["torch_npu"]


def case_of(op: str, *args: Any, **kwargs: Any) -> Case:
    """A call of an op on the NPU."""
    arguments = find_op(op).bind(*args, **kwargs)
    return Case(find_op(op), 0, torch.float32, moved(arguments, "npu"))


def ours(op: str, *args: Any, **kwargs: Any) -> Any:
    """Our kernel of an op, called as the op would be."""
    kernel, given = kernel_of(op), find_op(op).bind(*args, **kwargs)
    return kernel.function(**{name: value for name, value in given.items() if name in kernel.honours})


def ask(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers on the NPU that want a gradient."""
    drawn = torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes)))
    return drawn.to(dtype).npu().requires_grad_()


@pytest.mark.parametrize("pairs", ["half", "interleaved", "interleaved_to_half"])
@pytest.mark.parametrize(("batch", "heads"), [(2, 600), (30, 40), (999, 2), (2, 1000), (1000, 1)])
def test_rope_of_many_heads_and_sequences(batch: int, heads: int, pairs: str) -> None:
    """A call past a limit is refused, and one within is right with its gradient: also past that of the tables."""
    table = torch.rand(1, 2)
    case = case_of("rope", torch.randn(batch, 1, heads, 2), table, table, pairs=pairs)
    few = batch < 1000 and heads < 1000 and (pairs != "interleaved" or batch * heads < 1000)
    assert served(kernel_of("rope"), case) == few


def test_rope_gives_no_gradient_of_tables() -> None:
    """Where a table needs a gradient the kernel is not used: past B N = 1024 op-plugin's backward would fail."""
    table = torch.rand(1, 2).requires_grad_()
    case = case_of("rope", torch.randn(2, 1, 3, 2), torch.rand(1, 2), table)
    assert why_not(kernel_of("rope"), case) == "gives no gradient of sin, which the reference does"
    x = ask(2, 1, 600, 2)
    ours("rope", x, table.npu(), table.npu()).sum().backward()
    assert x.grad is not None
    wide = table.detach().npu().reshape(1, 1, 1, 2).requires_grad_()
    with refuses("B N at most 1024"):
        _npu().npu_rotary_mul(x, wide, wide).sum().backward()


def test_norms_of_what_the_fakes_take() -> None:
    """npu_rms_norm takes an empty tensor, npu_add_rms_norm one axis: the fakes say the same."""
    one = torch.ones(4).npu()
    assert _npu().npu_rms_norm(torch.ones(0, 4).npu(), one)[0].shape == (0, 4)
    assert _npu().npu_add_rms_norm(one, one, one)[0].shape == (4,)


@pytest.mark.parametrize("options", [{"ignore_index": 1}, {"label_smoothing": 0.1}, {"weight": torch.ones(5)}])
def test_options_of_the_loss_without_a_gradient(options: Any) -> None:
    """What the gradient of the loss does not know fails in backward alone; our kernel refuses it before."""
    loss = _npu().npu_cross_entropy_loss(ask(3, 5), torch.zeros(3).long().npu(), **moved(options, "npu"))[0]
    with refuses("the gradient"):
        loss.sum().backward()
    given = {"class_weight" if name == "weight" else name: value for name, value in options.items()}
    assert why_not(kernel_of("cross_entropy"), case_of("cross_entropy", torch.randn(3, 5), torch.zeros(3), **given))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_permutation_with_a_loss_of_the_probs_alone(dtype: torch.dtype) -> None:
    """op-plugin's backward wants the gradient of the rows; our kernel hands it zeros where no loss reached them."""
    tokens, probs = ask(4, 8, dtype=dtype), ask(4, 4, dtype=dtype)
    call = _npu().npu_moe_token_permute_with_routing_map
    with pytest.raises(IndexError):
        call(tokens, CHOSEN.npu(), probs=probs, num_out_tokens=4)[1].sum().backward()
    assert call(tokens, CHOSEN.npu(), num_out_tokens=4)[1] is None
    ours("moe_permute", tokens, CHOSEN.npu(), 4, probs=probs, topk=1)[1].sum().backward()
    close(probs.grad, CHOSEN.double())
    assert tokens.grad is None or tokens.grad.count_nonzero() == 0
    rows = ours("moe_permute", tokens, CHOSEN.npu(), 4, probs=probs, topk=1)[0]
    rows.mul_(2).sum().backward()
    close(tokens.grad, torch.full((4, 8), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_wide_probs_are_not_rounded(dtype: torch.dtype) -> None:
    """The gradient of float32 probs is exact to float32 whatever the dtype of the rows; op-plugin would round it."""
    rows, probs, dy = ask(4, 64, dtype=dtype), ask(4, 4), ask(4, 64, dtype=dtype).detach()
    expected = torch.diag((rows.cpu().double() * dy.cpu().double()).sum(1))
    given = {"probs": probs, "routing_map": CHOSEN.npu()}
    y = ours("moe_unpermute", rows, torch.arange(4).npu(), 4, **given, topk=1)
    y.backward(dy)
    assert y.dtype == rows.grad.dtype == dtype
    close(probs.grad, expected)


def test_rows_and_probs_of_every_pair_of_dtypes() -> None:
    """The reverse permutation serves rows and probs of two dtypes, and is right."""
    map_, places = torch.ones(3, 2, dtype=torch.bool), torch.arange(3).repeat(2)
    for rows in FLOATS:
        for probs in FLOATS:
            given = {"probs": torch.randn(3, 2).to(probs), "routing_map": map_, "topk": 2}
            case = case_of("moe_unpermute", torch.randn(6, 8).to(rows), places, 3, **given)
            assert served(kernel_of("moe_unpermute"), case), f"{rows}, {probs}"


@pytest.mark.parametrize("counts", [[6], [2, 4], [0, 4]], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products_of_transposed_memory(counts: list[int], transposed: bool) -> None:
    """x and the gradient of y may lie transposed or in wider memory, which op-plugin refuses; one expert is served."""
    weight, groups = torch.randn(len(counts), 4, 4), torch.tensor(counts)
    for x in (torch.randn(4, 6).t(), torch.randn(6, 8)[:, :4], torch.randn(6, 4)):
        assert served(kernel_of("grouped_gemm"), case_of("grouped_gemm", x, weight, groups, transposed=transposed))
    left = ask(6, 4)
    ours("grouped_gemm", left, weight.npu(), groups.npu()).backward(torch.ones(4, 6).npu().t())
    expert = torch.arange(len(counts)).repeat_interleave(groups)
    expected = torch.zeros(6, 4, dtype=torch.float64)
    expected[: len(expert)] = weight.double().sum(2)[expert]
    close(left.grad, expected)


def test_adamw_with_betas_of_float32() -> None:
    """op-plugin rounds the betas to float32; a first step, and one that nearly cancels, are within the tolerance."""
    p, g, zero = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    assert served(kernel_of("adamw"), case_of("adamw", [p], [g], [zero], [zero.clone()], weight_decay=0.1))
    for case in cases_of(["adamw"]):
        here = case._replace(arguments=moved(case.arguments, "npu"))
        assert served(kernel_of("adamw"), here) or why_not(kernel_of("adamw"), here)


def test_scaled_masked_softmax_is_served() -> None:
    """Before Ascend950 op-plugin hands it to GE; sizes that are steps of 32 are served there."""
    found = [case._replace(arguments=moved(case.arguments, "npu")) for case in cases_of(["scaled_masked_softmax"])]
    done = [case for case in found if served(kernel_of("scaled_masked_softmax"), case)]
    assert len(done) >= 10
    x = torch.randn(1, 2, 32, 64)
    given = {"mask": torch.rand(1, 1, 32, 64) > 0.5, "scale": 0.5}
    assert served(kernel_of("scaled_masked_softmax"), case_of("scaled_masked_softmax", x, **given))


@pytest.mark.parametrize("lengths", [(3, 0), (0, 3)])
def test_attention_of_nothing_is_left_to_the_reference(lengths: tuple[int, int]) -> None:
    """aclnnFlashAttentionScore fails on 0 keys: off the CPU torch's attention is not asked for empty tensors."""
    rows, columns = lengths
    q, k = torch.ones(1, rows, 2, 16), torch.ones(1, columns, 2, 16)
    assert "no queries or no keys" in str(why_not_sdpa(case_of("attention", q, k, k).call))
    on_host = find_op("attention").bind(q, k, k)
    assert why_not_sdpa(Case(find_op("attention"), 0, torch.float32, on_host).call) is None


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, with CUDA as the simulated NPU."""
    with llm_adapt.patched(simulate="npu"):
        dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def test_gather_takes_group_dst(one_rank: None) -> None:
    """torch_npu replaces dist.gather by that of an older torch: group_dst and dst=None are torch's again."""
    x = torch.full((2,), 3.0, device="cuda")
    for given in ({"group_dst": 0}, {"dst": None}, {"group": dist.new_group([0]), "group_dst": 0}):
        out = [torch.zeros(2, device="cuda")]
        dist.gather(x, out, **given)
        assert out[0].tolist() == [3, 3]
    objects = [None]
    dist.gather_object({"a": 1}, objects, group_dst=0)
    assert objects == [{"a": 1}]
    with pytest.raises(ValueError, match="both given"):
        dist.gather(x, out, 0, group_dst=0)
