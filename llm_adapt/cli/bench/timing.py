"""Timing: candidates of one call in turn, round after round, and what order statistics say of their medians.

Turns make whatever drifts (clocks, other work on the machine) fall on all candidates alike, and ratios are formed
within a round. The order is drawn anew for each round: nobody always follows the one who leaves the caches full and the
heap trimmed. On the CPU a sample is the mean of a few calls by the host's clock, behind one that is not timed. On an
accelerator each call lies between two events of the device, behind writes of twice the last-level cache: it finds
nothing there, and the device writes for longer than the host needs to launch the call, so that no gap between its
kernels is counted.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

__all__ = ["Clock", "DeviceClock", "HostClock", "Interval", "interval", "ratio", "take_turns"]

Act = Callable[[], Any]
LEAST_ROUNDS = 6  # the fewest whose smallest and largest enclose the median with a confidence of 95 %
_SAMPLE_S = 1e-3  # a sample on the CPU is at least so long: the clock's own cost disappears in it
_LEAD, _MOST_WRITES = 2, 50  # a device writes for so many times the launch of an act before it, within reason


class Interval(NamedTuple):
    """A median and the interval that holds it with the confidence that was asked."""

    median: float
    low: float
    high: float


class Clock(Protocol):
    """How long an act takes.

    Attributes:
        most_calls: of a sample.
    """

    most_calls: int

    def sample(self, act: Act, calls: int) -> float:
        """Seconds of one call, of so many made."""


class HostClock:
    """The host's clock: for the CPU, and for simulated devices, whose queue `wait` waits for."""

    most_calls = 200

    def __init__(self, wait: Act | None = None) -> None:
        self.wait = wait

    def sample(self, act: Act, calls: int) -> float:
        """The mean of the calls, behind one that meets what the candidate before it left, and is not timed."""
        act()
        if self.wait is not None:
            self.wait()
        start = time.perf_counter()
        for _ in range(calls):
            act()
        if self.wait is not None:
            self.wait()
        return (time.perf_counter() - start) / calls


class DeviceClock:
    """Events of an accelerator around each call, behind writes that empty its cache and let the host get ahead."""

    most_calls = 20  # of which the median counts; more would fill the device's queue, and the host would wait

    def __init__(self, device: torch.device) -> None:
        self.module: Any = getattr(torch, device.type)
        properties = self.module.get_device_properties(device)
        size = 2 * int(getattr(properties, "L2_cache_size", 0) or 2**27)
        self.cache = torch.empty(size, dtype=torch.int8, device=device)
        self.writes: weakref.WeakKeyDictionary[Act, int] = weakref.WeakKeyDictionary()
        self.write_s = self._seconds_of_a_write()

    def sample(self, act: Act, calls: int) -> float:
        """The median of the calls."""
        if act not in self.writes:
            self.writes[act] = self._writes_for(act)
        pairs = [self._between_events(act, self.writes[act]) for _ in range(calls)]
        self.module.synchronize()
        return interval([start.elapsed_time(end) / 1e3 for start, end in pairs]).median

    def _seconds_of_a_write(self) -> float:
        start, end = self._between_events(lambda: [self.cache.zero_() for _ in range(20)], writes=20)
        self.module.synchronize()
        return float(start.elapsed_time(end)) / 20e3

    def _between_events(self, act: Act, writes: int) -> tuple[Any, Any]:
        for _ in range(writes):
            self.cache.zero_()
        start, end = (self.module.Event(enable_timing=True) for _ in range(2))
        start.record()
        act()
        end.record()
        return start, end

    def _writes_for(self, act: Act) -> int:
        """How many writes outlast the launch of an act: by the least of three times of the host."""
        launches = []
        for _ in range(3):
            self.module.synchronize()
            start = time.perf_counter()
            act()
            launches.append(time.perf_counter() - start)
        self.module.synchronize()
        return max(1, min(_MOST_WRITES, math.ceil(_LEAD * min(launches) / self.write_s)))


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def take_turns(acts: Mapping[str, Act], clock: Clock, budget_s: float, most_rounds: int = 30) -> dict[str, list[float]]:
    """Seconds of each act, one sample a round, in an order that is drawn anew for each.

    Args:
        budget_s: no new round begins after so many seconds, but for the least number of rounds.
    """
    names = list(acts)
    draw = random.Random(0)
    calls = {}
    with _no_collector():
        for name in names:
            acts[name]()  # compiles, chooses, fills caches
            calls[name] = max(1, min(clock.most_calls, math.ceil(_SAMPLE_S / max(clock.sample(acts[name], 1), 1e-7))))
        samples: dict[str, list[float]] = {name: [] for name in names}
        start = time.perf_counter()
        for number in range(most_rounds):
            if number >= LEAST_ROUNDS and time.perf_counter() - start > budget_s:
                break
            for name in draw.sample(names, len(names)):
                samples[name].append(clock.sample(acts[name], calls[name]))
    return samples


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median, and the two order statistics that enclose the true one with that confidence (the widest, if none).

    The number of values below the true median is binomial with p = 1/2, whatever the distribution.
    """
    ordered = sorted(values)
    number = len(ordered)
    if not number:
        return Interval(math.nan, math.nan, math.nan)
    middle = (ordered[(number - 1) // 2] + ordered[number // 2]) / 2
    rank, tail = 0, 2.0**-number  # P(at most `rank` values lie below)
    while rank + 1 < (number + 1) // 2:
        more = tail + math.comb(number, rank + 1) * 2.0**-number
        if 2 * more > 1 - confidence:
            break
        rank, tail = rank + 1, more
    return Interval(middle, ordered[rank], ordered[number - 1 - rank])


def ratio(base: Sequence[float], other: Sequence[float]) -> Interval:
    """base / other, round by round: above 1 the other is faster."""
    return interval([a / b for a, b in zip(base, other, strict=True)])
