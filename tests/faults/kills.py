"""SIGKILL at random moments of compress, export and validate; the same command then gives the same bytes."""

from __future__ import annotations

import random
from pathlib import Path

from tests.faults.commands import Reference, commands, kill_after
from tests.faults.rows import Options, Row, times

SHARES = {"compress": 0.5, "export": 0.25, "validate": 0.25}


def run(folder: Path, options: Options) -> list[Row]:
    """One row for each command. Raises FaultError where a run that goes on after a kill does not give the same."""
    drawn, rows = random.Random(options.seed), list[Row]()
    for command in commands(folder):
        reference, kills, resumed = Reference.of(command), 0, 0
        wanted = max(1, round(options.trials * SHARES[command.name]))
        while kills < wanted:
            command.reset()
            if not kill_after(command.start(), drawn.uniform(0, reference.seconds)):
                continue
            kills += 1
            command.require(f"after kill {kills}")
            resumed += any(word in command.log() for word in ("resuming", "re-using"))
            reference.require(command, f"after kill {kills}")
        told = f"{len(reference.files)} of {len(reference.names)} files, all that hold no measured times"
        went_on = f"; {resumed} went on from finished pieces" if command.name != "validate" else ""
        rows.append(Row(f"SIGKILL of {command.name}", kills, f"{times(kills)} the same bytes ({told}){went_on}"))
    return rows
