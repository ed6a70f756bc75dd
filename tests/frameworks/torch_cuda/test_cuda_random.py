"""Random numbers of torch.cuda on the CPU: seeds, states, fork_rng and generators."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("facade")


def draw() -> list[float]:
    """Three numbers on the device."""
    return torch.rand(3, device="cuda").tolist()


@pytest.mark.parametrize(
    "seed", [torch.manual_seed, torch.cuda.manual_seed, torch.cuda.manual_seed_all, torch.cuda.random.manual_seed]
)
def test_seeding(seed: Callable[[int], Any]) -> None:
    """The same seed gives the same numbers, whichever function sets it."""
    seed = getattr(torch if seed is torch.manual_seed else torch.cuda, seed.__name__)
    seed(7)
    first = draw()
    seed(7)
    assert draw() == first
    assert torch.cuda.initial_seed() == 7


def test_a_seed_nobody_chose() -> None:
    """torch.cuda.seed and seed_all start a stream that was not there before."""
    torch.cuda.manual_seed(7)
    torch.cuda.seed()
    assert torch.cuda.initial_seed() != 7
    torch.cuda.manual_seed(7)
    torch.cuda.seed_all()
    assert torch.cuda.initial_seed() != 7


def test_states() -> None:
    """A saved state is continued exactly, for one device and for all."""
    state = torch.cuda.get_rng_state("cuda:1")
    first = draw()
    torch.cuda.set_rng_state(state, "cuda:1")
    assert draw() == first
    torch.cuda.random.set_rng_state(state, device=0)
    assert draw() == first
    states = torch.cuda.get_rng_state_all()
    assert len(states) == 2
    first = draw()
    torch.cuda.set_rng_state_all(states)
    assert draw() == first


def test_the_state_of_an_accelerator(noted: Callable[[], list[str]]) -> None:
    """A state of 16 bytes, from a CUDA checkpoint, chooses a stream of its own, and that is noted once."""
    saved = [torch.tensor([seed, offset], dtype=torch.int64).view(torch.uint8) for seed, offset in ((5, 0), (5, 8))]
    drawn = []
    for state in (*saved, saved[0]):
        torch.cuda.set_rng_state(state)
        drawn.append(draw())
    assert drawn[0] == drawn[2] != drawn[1]
    torch.cuda.set_rng_state_all([saved[0], saved[0]])
    assert draw() == drawn[0]
    assert noted() == ["RNG state of an accelerator"]


@pytest.mark.parametrize(
    "arguments", [{}, {"devices": [0]}, {"devices": ["cuda:1"]}, {"devices": [0, 1], "device_type": "cuda"}]
)
def test_fork_rng(arguments: dict[str, Any]) -> None:
    """What is drawn inside fork_rng does not move the stream outside."""
    torch.manual_seed(3)
    expected = draw()
    torch.manual_seed(3)
    with torch.random.fork_rng(**arguments):
        draw()
    assert draw() == expected


@pytest.mark.parametrize("place", ["cuda", "cuda:1", 0, torch.device("cpu"), "cpu"])
def test_generators(place: Any) -> None:
    """torch.Generator takes every spelling, is an instance of its class, and repeats itself."""
    generator = torch.Generator(device=place).manual_seed(11)
    assert isinstance(generator, torch.Generator)
    assert generator.device == torch.device("cpu")
    first = torch.rand(2, generator=generator, device="cuda")
    again = torch.rand(2, generator=torch.Generator(place).manual_seed(11), device="cuda")
    assert torch.equal(first, again)
    assert torch.Generator().device == torch.device("cpu")


def test_generators_are_copied() -> None:
    """A generator survives pickle and deepcopy with its state."""
    generator = torch.Generator("cuda").manual_seed(11)
    torch.rand(5, generator=generator)
    copies = [pickle.loads(pickle.dumps(generator)), generator.clone_state(), copy.deepcopy(generator)]
    expected = torch.rand(2, generator=generator)
    assert [torch.equal(torch.rand(2, generator=other), expected) for other in copies] == [True] * 3


def test_default_generators() -> None:
    """There is one default generator per ordinal; all are the CPU's."""
    assert torch.cuda.default_generators == (torch.default_generator,) * 2
    torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(5)
    assert torch.initial_seed() == 5


def test_dropout_is_recomputed_alike() -> None:
    """torch.utils.checkpoint restores the stream, so that recomputed dropout drops the same numbers."""
    from torch.utils.checkpoint import checkpoint

    x = torch.ones(64, requires_grad=True, device="cuda")
    for use_reentrant in (True, False):
        torch.cuda.manual_seed(1)
        kept = checkpoint(torch.nn.functional.dropout, x, use_reentrant=use_reentrant)
        (gradient,) = torch.autograd.grad(kept.sum(), x) if not use_reentrant else (_reentrant_gradient(kept, x),)
        assert torch.equal(gradient, kept)


def _reentrant_gradient(kept: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    x.grad = None
    kept.sum().backward()
    assert x.grad is not None
    return x.grad
