"""torch.mlu.random: one generator for each device, with a seed and a Philox offset, as on CUDA."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch_mlu import _native

from .device_index import index_of

__all__ = [
    "get_rng_state", "get_rng_state_all", "initial_seed", "manual_seed", "manual_seed_all", "seed", "seed_all",
    "set_rng_state", "set_rng_state_all",
]  # fmt: skip


def _generators() -> list[torch.Generator]:
    return [_native.default_generator(index) for index in range(_native.device_count())]


def get_rng_state(device: Any = "mlu") -> torch.Tensor:
    """State of a device's generator: 16 bytes on the host."""
    state: torch.Tensor = _native.default_generator(index_of(device)).get_state()
    return state


def get_rng_state_all() -> list[torch.Tensor]:
    """States of all devices' generators."""
    return [generator.get_state() for generator in _generators()]


def set_rng_state(new_state: torch.Tensor, device: Any = "mlu") -> None:
    """Set the state of a device's generator."""
    _native.default_generator(index_of(device)).set_state(new_state)


def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    """Set the states of the devices' generators in order."""
    for index, state in enumerate(new_states):
        set_rng_state(state, index)


def manual_seed(seed: int) -> None:
    """Seed the current device's generator."""
    _native.default_generator(-1).manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    """Seed all devices' generators."""
    for generator in _generators():
        generator.manual_seed(int(seed))


def seed() -> None:
    """Seed the current device's generator with a number that nobody knows."""
    _native.default_generator(-1).seed()


def seed_all() -> None:
    """Seed all devices' generators with one number that nobody knows."""
    generators = _generators()
    chosen = generators[0].seed()
    for generator in generators[1:]:
        generator.manual_seed(chosen)


def initial_seed() -> int:
    """Seed of the current device's generator."""
    return int(_native.default_generator(-1).initial_seed())
