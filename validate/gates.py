"""Gates: limits that the user sets, parsed strictly, and what came of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from compress.errors import UsageError

_NUMBER = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)"


@dataclass(frozen=True)
class Gate:
    """`value` must not be above `limit`, or not below it where `at_least`; `percent`: how both are shown."""

    name: str
    value: float
    limit: float
    at_least: bool = False
    percent: bool = False

    @property
    def passed(self) -> bool:
        """False also for NaN."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def failure(self) -> str:
        """`max-ppl-increase: 7.3% > 5%`."""
        sign = "<" if self.at_least else ">"
        return f"{self.name}: {self._show(self.value)} {sign} {self._show(self.limit)}"

    def _show(self, figure: float) -> str:
        return f"{100 * figure:.4g}%" if self.percent else f"{figure:.4g}"

    def to_dict(self) -> dict[str, Any]:
        """For manifest.json."""
        value: float | str = self.value if math.isfinite(self.value) else str(self.value)
        return {"value": value, "limit": self.limit, "at_least": self.at_least, "passed": self.passed}


def parse_ppl_increase(text: str) -> float:
    """`5%`, `0.05` and `1.05x` are all 0.05: compressed / dense - 1.

    Raises UsageError for anything else, also for a bare number of 1 or more (5 would be 500 %, and is surely
    meant to be 5 %) and for a factor below 1.
    """
    form = re.fullmatch(_NUMBER + r"(%|x)?", text)
    if form is not None:
        figure, unit = float(form[1]), form[2]
        if unit == "%":
            return figure / 100
        if unit == "x" and figure >= 1:
            return figure - 1
        if unit is None and figure < 1:
            return figure
    raise UsageError(
        f"--max-ppl-increase {text!r} is not a limit; write it as 5%, as a fraction below 1 (0.05) or as "
        "a factor of at least 1 (1.05x)"
    )


def parse_speedup(text: str) -> float:
    """`1.2` or `1.2x`. Raises UsageError for anything that is not a positive number."""
    form = re.fullmatch(_NUMBER + "x?", text)
    if form is None or not 0 < float(form[1]) < math.inf:
        raise UsageError(f"--min-speedup {text!r} is not a limit; write a positive number such as 1.2")
    return float(form[1])


def parse_batch_sizes(text: str, flag: str = "--batch-sizes") -> tuple[int, ...]:
    """`1,8` -> (1, 8). Raises UsageError, which names `flag`, unless they are positive, and each is given once."""
    if re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*", text):
        sizes = tuple(int(size) for size in text.split(","))
        if len(set(sizes)) == len(sizes):
            return sizes
    raise UsageError(f"{flag} {text!r} is not a list of different positive numbers such as 1,8")


def failures(gates: Iterable[Gate]) -> list[str]:
    """The sentence of each gate that did not pass."""
    return [gate.failure() for gate in gates if not gate.passed]
