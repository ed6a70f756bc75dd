"""The clock of an accelerator, on a simulated one: its events are real, its speed says nothing."""

from __future__ import annotations

import pytest
import torch

from llm_adapt.cli.bench.timing import DeviceClock, take_turns

pytestmark = pytest.mark.simulator("mlu", "npu")


def test_the_device_is_kept_busy_while_the_host_launches(device: str) -> None:
    """An act that takes the host longer to launch has more writes before it; each act is asked once."""
    clock = DeviceClock(torch.device(device))
    clock.write_s = 1e-3
    launched = []

    def quick() -> None:
        launched.append("quick")

    def slow() -> None:
        torch.ones(8, device=device).sum().item()
        sum(range(200_000))

    for act in (quick, slow, quick):
        assert clock.sample(act, 2) >= 0.0
    assert clock.writes[quick] == 1 < clock.writes[slow]
    assert len(launched) == 3 + 2 + 2


def test_a_sample_has_few_calls(device: str) -> None:
    """A device's queue holds about a thousand launches: an act of no time at all is still called 20 times at most."""
    calls = 0

    def act() -> None:
        nonlocal calls
        calls += 1

    take_turns({"act": act}, DeviceClock(torch.device(device)), budget_s=0.0)
    assert calls <= 1 + 1 + 3 + 6 * DeviceClock.most_calls
