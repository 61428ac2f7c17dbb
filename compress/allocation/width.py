"""One kept width for the whole stream: every linear keeps the same leading coordinates at every position.

What SliceGPT does, and what the gauge-fixed skips (compress/rotation/gauge.py) ask for.
"""

from __future__ import annotations

from math import gcd

from compress.allocation.size import overhead_parameters
from compress.architecture import WRITERS, Architecture
from compress.errors import UsageError
from compress.model.skips import parameters_of
from compress.structures import KroneckerStructure, Structure

UNIT = 8
"""Step of the kept width: SliceGPT's round_interval."""


def leading_structures(arch: Architecture, kept: int, head: int) -> dict[str, Structure]:
    """Every linear with the first `kept` coordinates of the rotated stream, the last writer with the first `head`.

    Linear name -> structure; one that keeps all d coordinates is dense and left out. Raises UsageError for a width
    that is not in 1 ... d, or of which a narrow reader has no Kronecker sum (blocks of one feature).
    """
    d, last = arch.hidden_size, f"layers.{arch.num_layers - 1}.{WRITERS['mlp']}"
    for width in (kept, head):
        if not 1 <= width <= d:
            raise UsageError(f"{width} kept coordinates of a stream of {d}: choose 1 ... {d}")
    chosen: dict[str, Structure] = {}
    for layer in range(arch.num_layers):
        for role, (n, m) in arch.linears().items():
            name = f"layers.{layer}.{role}"
            width = head if name == last else kept
            if width < d:
                unit = gcd(width, d)
                side = "out" if role in WRITERS.values() else "in"
                chosen[name] = KroneckerStructure(m, n, d // unit, width // unit, side, "leading")  # type: ignore[arg-type]
    return chosen


def kept_for_ratio(
    arch: Architecture, ratio: float, skip: str = "slice", *, unit: int = UNIT, reflections: int | None = None
) -> int:
    """The largest k, a multiple of `unit`, with which `leading_structures` and skips keep `ratio` of the projections.

    Every position keeps k, the head's too but for skip "slice", where it keeps all. Skips (dense, cs, householder with
    `reflections`, slice) and the map before a tied head count. Raises UsageError when even the smallest k is too much.
    """
    d, layers, linears = arch.hidden_size, arch.num_layers, arch.linears()
    per_kept = layers * sum(m if role in WRITERS.values() else n for role, (n, m) in linears.items())
    widest = d - 1 if skip == "cs" else d
    costs = {}
    for k in range(unit, widest + 1, unit):
        whole_head = (d - k) * linears[WRITERS["mlp"]][1] if skip == "slice" else 0
        skips = parameters_of(skip, d, layers, kept=k, reflections=reflections)
        costs[k] = k * per_kept + whole_head + overhead_parameters(arch, "block", skips)
    fitting = [k for k, cost in costs.items() if cost <= ratio * arch.projection_parameters()]
    if not fitting:
        least = min(costs.values(), default=0) / arch.projection_parameters()
        raise UsageError(
            f"--ratio {ratio:g} is too low for rotation 'block' with skip {skip!r} in steps of {unit}: skips and the "
            f"smallest width keep {least:.3f}; raise --ratio or lower --unit"
        )
    return max(fitting)
