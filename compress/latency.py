"""A measured cost table for `--budget-latency`: seconds of a linear by structure, shape and parameters."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compress.errors import UsageError
from compress.structures import DenseStructure, SelectStructure, Structure

Key = tuple[str, int, int]


class LatencyTable:
    """Seconds per call at the batch that the table was measured with, interpolated in the number of parameters."""

    def __init__(self, points: Mapping[Key, list[tuple[int, float]]], tokens: int) -> None:
        self.points, self.tokens = points, tokens

    @classmethod
    def of(cls, entries: Iterable[Mapping[str, Any]], tokens: int) -> LatencyTable:
        """entries: structure, in_features, out_features, parameters, seconds of each measurement."""
        points: dict[Key, list[tuple[int, float]]] = defaultdict(list)
        for e in entries:
            points[e["structure"], e["in_features"], e["out_features"]].append((e["parameters"], e["seconds"]))
        return cls({key: sorted(found) for key, found in points.items()}, tokens)

    @classmethod
    def read(cls, path: Path) -> LatencyTable:
        """What `python -m validate.latency` wrote. Raises UsageError when the file is not such a table."""
        try:
            table = json.loads(path.read_text())
            return cls.of(table["entries"], int(table["tokens"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--latency-table {path} cannot be used ({error!r}); measure one with validate.latency"
            ) from error

    def seconds(self, structure: Structure) -> float:
        """Predicted seconds of one call. Raises UsageError for a structure of which nothing was measured."""
        if isinstance(structure, SelectStructure):  # cuts and paddings cost nothing: it is what lies between
            return self._interpolated(structure.reduced, structure)
        return self._interpolated(structure, structure)

    def _interpolated(self, structure: Structure, whole: Structure) -> float:
        if isinstance(structure, DenseStructure):
            points = self.points.get(("dense", whole.in_features, whole.out_features))
        else:
            points = self.points.get((structure.name, structure.in_features, structure.out_features))
        if not points:
            raise UsageError(
                f"the latency table has no {structure.name} matrix of {structure.out_features} x "
                f"{structure.in_features}: measure it with validate.latency for this model"
            )
        size = structure.parameter_count()
        at = bisect_left(points, (size, 0.0))
        if at == 0:  # below the smallest: in proportion
            return points[0][1] * size / points[0][0]
        if at == len(points):
            return points[-1][1] * size / points[-1][0]
        (a, low), (b, high) = points[at - 1], points[at]
        return low + (high - low) * (size - a) / (b - a)
