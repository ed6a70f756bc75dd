"""Writing keys and values into the pages of a cache and reading them back, over the simulated NPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.simulators.npu_attention_checks import npu, numbers
from tests.simulators.npu_checks import HALVES, refuses, said_on

pytestmark = pytest.mark.simulator("npu")

PAGES, PAGE, N, DK, DV = 5, 4, 2, 16, 32


def _tokens(count: int, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, torch.Tensor]:
    return numbers(count, N, DK).to(dtype), numbers(count, N, DV, seed=1).to(dtype)


def _caches(dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, torch.Tensor]:
    return numbers(PAGES, PAGE, N, DK, seed=2).to(dtype), numbers(PAGES, PAGE, N, DV, seed=3).to(dtype)


def _in_pieces(cache: torch.Tensor) -> torch.Tensor:
    piece = 32 // cache.element_size()
    return cache.flatten(2).unflatten(2, (-1, piece)).transpose(1, 2).contiguous()


def _from_pieces(cache: torch.Tensor, size: int) -> torch.Tensor:
    return cache.transpose(1, 2).flatten(2).unflatten(2, (N, size))


@pytest.mark.parametrize("dtype", [*HALVES, torch.int8], ids=str)
@pytest.mark.parametrize("slots", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("mode", ["Norm", "PA_NZ"])
def test_scatter(mode: str, slots: torch.dtype, dtype: torch.dtype) -> None:
    """Each token goes to the place that its slot names; the rest of the cache stays."""
    key, value = ((x * 50).to(dtype) for x in _tokens(3, torch.float32))
    caches = [(x * 50).to(dtype) for x in _caches(torch.float32)]
    places = torch.tensor([17, 0, 6], dtype=slots)
    expected = [cache.clone() for cache in caches]
    for cache, tokens in zip(expected, (key, value), strict=True):
        for place, token in zip(places.tolist(), tokens, strict=True):
            cache[place // PAGE, place % PAGE] = token
    there = [(_in_pieces(cache) if mode == "PA_NZ" else cache).npu() for cache in caches]
    npu().npu_scatter_pa_kv_cache(key.npu(), value.npu(), *there, places.npu(), cache_mode=mode)
    for found, cache, size in zip(there, expected, (DK, DV), strict=True):
        found = _from_pieces(found, size) if mode == "PA_NZ" else found
        assert torch.equal(found.cpu(), cache)


def test_pieces_are_the_default() -> None:
    """cache_mode is PA_NZ unless given, so a cache of the ordinary form is refused."""
    key, value = (x.npu() for x in _tokens(3))
    with refuses("mode PA_NZ takes pages"):
        npu().npu_scatter_pa_kv_cache(key, value, *(x.npu() for x in _caches()), torch.tensor([0, 1, 2]).npu())


@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize("offset", [None, [4, 0]])
def test_gather(offset: list[int] | None, cumulative: bool) -> None:
    """Tokens from the pages that a row names, from its offset on; pages that do not exist read as zero."""
    caches = _caches()
    table, lengths = torch.tensor([[3, 1, -1], [0, 2, 9]]), [6, 10]
    expected: list[list[torch.Tensor]] = [[], []]
    for row, length, start in zip(table.tolist(), lengths, offset or [0, 0], strict=True):
        for cache, found in zip(caches, expected, strict=True):
            for token in range(length):
                page = row[start // PAGE + token // PAGE]
                found.append(cache[page, token % PAGE] if 0 <= page < PAGES else torch.zeros_like(cache[0, 0]))
    given = torch.tensor([0, 6, 16] if cumulative else lengths).int().npu()
    key, value = (x.npu() for x in _tokens(16))
    options: dict[str, Any] = {"is_seq_lens_cumsum": cumulative}
    options |= {"seq_offset": torch.tensor(offset).int().npu()} if offset else {}
    npu().npu_gather_pa_kv_cache(*(x.npu() for x in caches), table.int().npu(), given, key, value, **options)
    assert torch.equal(key.cpu(), torch.stack(expected[0]))
    assert torch.equal(value.cpu(), torch.stack(expected[1]))


@pytest.mark.parametrize("slots", ["[1, 1]", "[20, 1]", "[-1, 1]"])
def test_wrong_slots(slots: str) -> None:
    """A place named twice, or one that is not there, is an error of the kernel."""
    code = f"""
key, cache = torch.zeros(2, 2, 16).half().npu(), torch.zeros(5, 4, 2, 16).half().npu()
scatter = torch_npu.npu_scatter_pa_kv_cache
outcome(lambda: scatter(key, key, cache, cache.clone(), torch.tensor({slots}).npu(), cache_mode="Norm"))
"""
    said = said_on("Ascend910B3", code)
    assert "names a place twice" in said or "places that are not in [0, 20)" in said


def test_limits() -> None:
    """One dtype for a cache and its tokens, and no compression."""
    key, value = (x.npu() for x in _tokens(2))
    caches = [x.npu() for x in _caches()]
    places = torch.tensor([0, 1]).npu()
    with refuses("have one dtype"):
        npu().npu_scatter_pa_kv_cache(key.float(), value.float(), *caches, places, cache_mode="Norm")
    with refuses("slot_mapping is int32 or int64"):
        npu().npu_scatter_pa_kv_cache(key, value, *caches, places[:1], cache_mode="Norm")
    with refuses("cache_mode is Norm or PA_NZ"):
        npu().npu_scatter_pa_kv_cache(key, value, *caches, places, cache_mode="Rows")
    with refuses("a compressed cache is not modelled"):
        npu().npu_scatter_pa_kv_cache(key, value, *caches, places, seq_lens=places, cache_mode="Norm")
