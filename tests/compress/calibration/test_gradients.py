"""Labels are drawn from the distribution that is given, and never where it is zero."""

from __future__ import annotations

import pytest
import torch

from compress.calibration import moments as statistics
from compress.calibration.gradients import sample

PROBABILITIES = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])


def test_frequencies_are_the_probabilities() -> None:
    rows = 40_000
    drawn = sample(PROBABILITIES.expand(rows, -1), torch.Generator().manual_seed(0))
    found = drawn.bincount(minlength=6) / rows
    deviation = (PROBABILITIES * (1 - PROBABILITIES) / rows).sqrt()
    assert bool(((found - PROBABILITIES).abs() <= 4 * deviation).all())


@pytest.mark.parametrize(("drawn", "index"), [(0.0, 1), (1.0, 4)])
def test_the_ends_of_the_range_have_a_probability(drawn: float, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 is where rounding takes the largest numbers below it."""
    monkeypatch.setattr(statistics.torch, "rand", lambda shape, **_: torch.full(tuple(shape), drawn))
    assert sample(PROBABILITIES[None], torch.Generator()).tolist() == [index]


def test_rows_are_independent_and_repeatable() -> None:
    certain = torch.eye(5)
    assert sample(certain, torch.Generator().manual_seed(1)).tolist() == [0, 1, 2, 3, 4]
    even = torch.full((64, 8), 1 / 8)
    first, second = (sample(even, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first, second)
    assert len(first.unique()) == 8
