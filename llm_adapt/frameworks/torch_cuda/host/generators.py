"""Random numbers of the device: those of the CPU's default generator, from which tensors on it draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from llm_adapt.frameworks.torch_cuda.devices import DeviceTranslator
from llm_adapt.report import Report

__all__ = ["functions"]

_PHILOX_BYTES = 16  # the state of an accelerator's generator: int64 seed, int64 offset


def functions(translate: DeviceTranslator, ordinal: Callable[[Any], int], report: Report) -> dict[str, Any]:
    """Seeds and states; every ordinal has the same generator."""
    generator = torch.default_generator

    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        """State of the generator, as a ByteTensor."""
        ordinal(device)
        return generator.get_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
        """Set the state of the generator; one that an accelerator saved chooses a stream of its own."""
        ordinal(device)
        if new_state.numel() == _PHILOX_BYTES:
            # A resumed checkpoint: that stream cannot be continued here, and dropping the state would be silent.
            seed, offset = new_state.cpu().view(torch.int64).tolist()
            report.once("RNG state of an accelerator", "new stream", "seeded by it; another generator made the old one")
            generator.manual_seed((seed + offset) % 2**63)
        else:
            generator.set_state(new_state.cpu())

    def get_rng_state_all() -> list[torch.Tensor]:
        """The state, once per ordinal."""
        return [generator.get_state() for _ in range(translate.count)]

    def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
        """Set the state; the current ordinal's counts."""
        states = list(new_states)
        set_rng_state(states[min(translate.current, len(states) - 1)])

    def manual_seed(seed: int) -> None:
        """Seed the generator."""
        generator.manual_seed(int(seed))

    def seed() -> None:
        """Seed the generator with a number nobody chose."""
        generator.seed()

    def initial_seed() -> int:
        """The number the generator was seeded with."""
        return generator.initial_seed()

    return {
        "default_generators": (generator,) * translate.count,
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "get_rng_state_all": get_rng_state_all,
        "set_rng_state_all": set_rng_state_all,
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed,
        "seed": seed,
        "seed_all": seed,
        "initial_seed": initial_seed,
    }
