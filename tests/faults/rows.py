"""What a group of trials found, and how large a run is asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table: what was done to the program, how often, and what came of it."""

    fault: str
    trials: int
    result: str


@dataclass(frozen=True)
class Options:
    """trials: kills of each command. minutes: of load. seed: of all that is drawn."""

    trials: int = 100
    minutes: float = 5.0
    seed: int = 0


def times(count: int) -> str:
    """`once`, `7 times`."""
    return "once" if count == 1 else f"{count} times"


class FaultError(Exception):
    """The program did not do what it should: the run ends, and the table is not written."""
