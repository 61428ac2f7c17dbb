"""Paired timing: A B A B ..., and the median of the ratios of neighbours.

On a machine that others use as well, speeds drift by more than the differences that matter; two runs next to
each other drift together. With one thread the CPU time of the calling thread leaves out what others take;
with more there is only wall time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Quartiles:
    """Lower quartile, median, upper quartile."""

    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, values: list[float]) -> Quartiles:
        """By linear interpolation; at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q1, q2, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(q1, q2, q3)


@dataclass(frozen=True)
class Paired:
    """Medians `seconds_a` and `seconds_b` in the clock that `clock` names; ratios a / b, pair by pair."""

    clock: str
    pairs: int
    seconds_a: float
    seconds_b: float
    ratio: Quartiles
    wall_ratio: Quartiles

    def to_dict(self) -> dict[str, Any]:
        """For json."""
        return {
            "clock": self.clock,
            "pairs": self.pairs,
            "seconds_dense": self.seconds_a,
            "seconds_compressed": self.seconds_b,
            "ratio": self.ratio.median,
            "ratio_quartiles": [self.ratio.q1, self.ratio.q3],
            "wall_ratio": self.wall_ratio.median,
        }


def paired(
    a: Callable[[], object],
    b: Callable[[], object],
    *,
    seconds: float = 2.0,
    least: int = 5,
    most: int = 200,
    warm_up: int = 2,
    one_thread: bool = True,
) -> Paired:
    """Time `a` and `b` alternately, for about `seconds` in all, `least` to `most` pairs.

    `one_thread`: both do all their work in the calling thread, so that its CPU time is what they cost.
    """
    for _ in range(warm_up):
        a()
        b()
    wall: list[tuple[float, float]] = []
    cpu: list[tuple[float, float]] = []
    start, _ = now()
    while len(wall) < least or (len(wall) < most and now()[0] - start < seconds):
        (wall_a, cpu_a), (wall_b, cpu_b) = _cost(a), _cost(b)
        wall.append((wall_a, wall_b))
        cpu.append((cpu_a, cpu_b))
    kept = cpu if one_thread else wall
    return Paired(
        clock="thread CPU time" if one_thread else "wall time",
        pairs=len(kept),
        seconds_a=statistics.median(x for x, _ in kept),
        seconds_b=statistics.median(y for _, y in kept),
        ratio=Quartiles.of([x / y for x, y in kept]),
        wall_ratio=Quartiles.of([x / y for x, y in wall]),
    )


def now() -> tuple[float, float]:
    """(wall clock, CPU time of this thread), both in seconds; tests put a clock of their own in its place."""
    return time.perf_counter(), time.thread_time()


def _cost(run: Callable[[], object]) -> tuple[float, float]:
    """(wall seconds, CPU seconds of this thread) of one call."""
    wall, cpu = now()
    run()
    wall_after, cpu_after = now()
    return wall_after - wall, cpu_after - cpu
