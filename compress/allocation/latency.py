"""A measured cost table for `--budget-latency`: seconds of a linear by structure, shape and size.

The table (`python -m validate.latency`) holds measured linears one by one. Their sum is the time of all projections run
one after another: a graph that joins the readers of one input into one product is somewhat faster, and attention,
norms and the head are not in it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from compress.artifact.reading import RefusedError, read_json
from compress.errors import UsageError
from compress.structures import DenseStructure, Structure, core_of

Key = tuple[str, int, int]
Point = tuple[float, float]
"""(parameters over in * out, seconds)."""


class LatencyTable:
    """Seconds per call on `tokens` rows at once.

    Within a shape times are interpolated in the number of parameters; below the smallest measured size they are those
    of the smallest (a product has a price of its own, whatever its size), above the largest the last slope goes on.
    Only the shapes that selections leave behind are interpolated between shapes, never beyond those measured.
    """

    def __init__(self, points: Mapping[Key, list[Point]], tokens: int) -> None:
        self.points, self.tokens = points, tokens
        # Measured shapes that differ in one side only: (kind, "in" | "out", the other side) -> {that side: key}.
        self._lines: dict[tuple[str, str, int], dict[int, Key]] = defaultdict(dict)
        for kind, m, n in points:
            self._lines[kind, "in", n][m] = self._lines[kind, "out", m][n] = (kind, m, n)

    @classmethod
    def of(cls, entries: Iterable[Mapping[str, Any]], tokens: int) -> LatencyTable:
        """entries: structure, in_features, out_features, parameters, seconds of each measurement, and `variant`
        (`Structure.variant`) where it tells more than `structure`; of equal ones the median counts.

        Raises UsageError for an entry that is no measurement.
        """
        found: dict[Key, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for e in entries:
            m, n = int(e["in_features"]), int(e["out_features"])
            seconds, parameters = float(e["seconds"]), int(e["parameters"])
            if min(m, n, parameters) < 1 or not 0 < seconds < float("inf"):
                raise UsageError(
                    f"the latency table has {seconds!r} seconds for {parameters} parameters of a {n} x {m} "
                    f"{e['structure']}; measure it again with validate.latency"
                )
            found[str(e.get("variant", e["structure"])), m, n][parameters / (m * n)].append(seconds)
        return cls({key: sorted((x, median(s)) for x, s in sizes.items()) for key, sizes in found.items()}, tokens)

    @classmethod
    def read(cls, path: Path) -> LatencyTable:
        """What `python -m validate.latency` wrote. Raises UsageError when the file is not such a table."""
        try:
            table = read_json(path)
            return cls.of(table["entries"], int(table["tokens"]))
        except RefusedError as error:
            raise UsageError(f"--latency-table {path} {error}; measure one with python -m validate.latency") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UsageError(
                f"--latency-table {path} cannot be used ({error!r}); measure one with python -m validate.latency"
            ) from error

    def seconds(self, structure: Structure) -> float:
        """Predicted seconds of one call. Raises UsageError for a structure of which nothing was measured.

        A selection costs what lies between its kept features, at that shape: its cut or padding moves activations
        only. A follower that shares a V has its own U alone to multiply, and is looked up by its parameters.
        """
        core = core_of(structure)
        m, n = core.in_features, core.out_features
        size = core.parameter_count() / (m * n)
        kinds = dict.fromkeys((core.variant, core.name))  # a table made by hand need not tell variants apart
        for kind in kinds:
            if (kind, m, n) in self.points:
                return _interpolated(self.points[kind, m, n], size)
        for kind in kinds:
            if (between := self._between(kind, m, n, size)) is not None:
                return between
        raise UsageError(
            f"the latency table has no {core.variant} matrix of {n} x {m} (out x in), nor what lies around it: "
            f"measure it with python -m validate.latency for this model, with this --unit, --structures {core.name}, "
            f"and --inner for what is selected"
        )

    def dense(self, in_features: int, out_features: int) -> float:
        """Seconds of a dense matrix. Raises as `seconds`."""
        return self.seconds(DenseStructure(in_features, out_features))

    def _between(self, kind: str, m: int, n: int, size: float) -> float | None:
        """Between the measured shapes next to this one along the side that a selection cuts; None without two.

        Where both sides could be the one, the closer pair of shapes counts.
        """
        found: list[tuple[float, float]] = []
        for wanted, side, other in ((m, "in", n), (n, "out", m)):
            line = self._lines.get((kind, side, other), {})
            widths = sorted(line)
            at = bisect_left(widths, wanted)
            if 0 < at < len(widths):  # equal ones were found before
                a, b = widths[at - 1], widths[at]
                low, high = (_interpolated(self.points[line[width]], size) for width in (a, b))
                found.append((b / a, low + (high - low) * (wanted - a) / (b - a)))
        return min(found)[1] if found else None


def _interpolated(points: list[Point], size: float) -> float:
    at = bisect_left(points, (size, 0.0))
    if at == 0:
        return points[0][1]
    if at < len(points):
        (a, low), (b, high) = points[at - 1], points[at]
        return low + (high - low) * (size - a) / (b - a)
    (b, high) = points[-1]
    if len(points) == 1:
        return high * size / b
    a, low = points[-2]
    return high + max(0.0, (high - low) / (b - a)) * (size - b)
