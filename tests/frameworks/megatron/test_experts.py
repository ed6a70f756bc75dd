"""Grouped experts: the stand-in for the package grouped_gemm, and experts on two ranks."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapt.adapters.cpu import ADAPTER
from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron import experts
from llm_adapt.frameworks.stand_ins.grouped_gemm import gmm, modules
from llm_adapt.report import Report
from llm_adapt.settings import Settings
from tests.frameworks.megatron import moe_parallel_checks
from tests.parallel.on_ranks import CHECKS, outcomes

NAMES = [name for name, function in CHECKS.items() if function.__module__ == moe_parallel_checks.__name__]
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2.0**-6, "atol": 2.0**-5}}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Outcome of every check on two ranks."""
    script = Path(moe_parallel_checks.__file__)
    return outcomes(script, 2, tmp_path_factory.mktemp("experts"), ["--ops", "off"])


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", NAMES)
def test_on_two_ranks(found: dict[str, str], name: str) -> None:
    """Each check of moe_parallel_checks.py holds on both ranks; its docstring says what it is."""
    assert found[name] == "", found[name]


def draw(*sizes: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal numbers that are the same at each run, with a gradient."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def one_by_one(a: torch.Tensor, b: torch.Tensor, sizes: list[int], trans_a: bool, trans_b: bool) -> torch.Tensor:
    """The products of each group in float64."""
    rows, found = a.double().split(sizes), []
    for index, part in enumerate(rows):
        other = b.double().split(sizes)[index] if trans_a else b[index].double()
        left, right = part.transpose(0, 1) if trans_a else part, other.transpose(0, 1) if trans_b else other
        found.append(left @ right)
    return torch.stack(found) if trans_a else torch.cat(found)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    columns=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    form=st.sampled_from(["plain", "trans_a", "trans_b"]),
    counts=st.sampled_from([torch.int64, torch.int32]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 9),
)
def test_each_group_is_multiplied_by_its_own_matrix(
    sizes: list[int], columns: tuple[int, int], form: str, counts: torch.dtype, dtype: torch.dtype, seed: int
) -> None:
    """Products and both gradients are those of each group alone, transposed in the last two axes, with empty groups."""
    inner, outer = columns
    trans_a, trans_b = form == "trans_a", form == "trans_b"
    a = draw(sum(sizes), inner, dtype=dtype, seed=seed)
    shape = (sum(sizes), outer) if trans_a else (len(sizes), outer, inner) if trans_b else (len(sizes), inner, outer)
    b = draw(*shape, dtype=dtype, seed=seed + 1)
    found = gmm(a, b, torch.tensor(sizes, dtype=counts), trans_b=trans_b, trans_a=trans_a)
    expected = one_by_one(a, b, sizes, trans_a, trans_b)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, **TOLERANCE[dtype])
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(9))
    ours = torch.autograd.grad(found, (a, b), upstream.to(dtype))
    theirs = torch.autograd.grad(expected, (a, b), upstream.to(dtype).double())
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other.double(), **TOLERANCE[dtype])


def test_no_rows_at_all_still_gives_gradients() -> None:
    """A rank without tokens has a gradient of 0 for every weight."""
    a, b = draw(0, 4, dtype=torch.bfloat16, seed=0), draw(2, 4, 3, dtype=torch.bfloat16, seed=1)
    y = gmm(a, b, torch.zeros(2, dtype=torch.int64))
    y.sum().backward()
    assert y.shape == (0, 3)
    assert b.grad is not None
    assert torch.equal(b.grad, torch.zeros(2, 4, 3, dtype=torch.bfloat16))
    assert a.grad is not None


def test_the_fourth_argument_is_trans_b() -> None:
    """Positional calls are those of the package, whose trans_b comes fourth; it turns the last two axes (B11)."""
    a, b, sizes = torch.randn(3, 4), torch.randn(2, 5, 4), torch.tensor([1, 2])
    torch.testing.assert_close(gmm(a, b, sizes, True), torch.cat([a[:1] @ b[0].t(), a[1:] @ b[1].t()]))


def test_shapes_that_do_not_fit_are_refused() -> None:
    """Sizes of other columns, rows that are missing, and both transpositions are errors."""
    a, b, sizes = torch.randn(3, 4), torch.randn(2, 5, 4), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="do not fit"):
        gmm(a, b, sizes)
    with pytest.raises(ValueError, match="trans_a takes"):
        gmm(a, a, torch.tensor([1, 1]), trans_a=True)
    with pytest.raises(ValueError, match="trans_a takes"):
        gmm(a, a, sizes, True, True)


def test_the_package_has_one_function() -> None:
    """grouped_gemm.ops.gmm, and nothing that it does not compute."""
    package = modules()["grouped_gemm"]
    assert {name for name in vars(package.ops) if not name.startswith("__")} == {"gmm"}
    assert package.ops.gmm is gmm


def test_an_installed_package_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row where grouped_gemm is installed, none with ops="off", and what Megatron found is kept."""

    def rows(ops: str | None = None) -> list[str]:
        return [row.target.partition(":")[2] for row in experts.rows(Context(ADAPTER, Settings(ops=ops), Report()))]

    assert rows() == ["grouped_gemm", "ops"]
    assert rows("off") == []
    found = ModuleType("grouped_gemm")
    assert experts.package_or_stand_in(found) is found
    assert experts.stand_in_of("ops")(found) is found
    assert experts.package_or_stand_in(None).ops.gmm is gmm
    assert experts.stand_in_of("ops")(None).gmm is gmm
    (tmp_path / "grouped_gemm.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert rows() == []
