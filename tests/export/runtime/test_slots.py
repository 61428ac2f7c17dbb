"""Continuous batching: whoever else decodes at the same time, each sequence gets the logits that it gets alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compress.errors import UsageError
from export.runtime.ort import OrtRunner
from export.runtime.profiles import Span, Spans
from export.runtime.slots import Slots
from tests.export.cases import Case, export
from tests.export.helpers import llama
from tests.export.runtime.narrow import MODELS, NarrowExecutor

SPANS = Spans(Span(1, 2, 4), Span(1, 8, 90), Span(1, 64, 200))


class Alone:
    """One sequence in a runner of its own."""

    def __init__(self, path: Path, ids: list[int]) -> None:
        self.runner = OrtRunner(path)
        self.first = self.runner.prefill([ids])[0, -1]

    def step(self, token: int) -> np.ndarray:
        return self.runner.decode([token])[0, -1]


@pytest.mark.parametrize("name", ["kron", "opt mixture"])
def test_each_sequence_is_as_if_it_were_alone(name: str, tmp_path: Path) -> None:
    """Sequences come and go at random, the cache grows twice; nobody sees anybody else."""
    _, info = export(MODELS[name], tmp_path)
    most = min(200, int(OrtRunner(info.path).metadata["max_positions"]))
    slots = Slots(NarrowExecutor(info.path, Spans(SPANS.batch, SPANS.prompt, Span(1, 32, most))), 3)
    random, alone = np.random.default_rng(0), dict[int, Alone]()
    served = 0
    for _ in range(150):
        while len(slots.active) < 3 and (not slots.active or random.random() < 0.3):
            ids = random.integers(0, 60, random.integers(1, 12)).tolist()
            handle, logits = slots.admit(ids)
            alone[handle] = Alone(info.path, ids)
            np.testing.assert_allclose(logits, alone[handle].first, atol=3e-5)
            served += 1
        tokens = random.integers(0, 60, len(slots.active)).tolist()
        logits = slots.step(tokens)
        for handle, token, row in zip(slots.active, tokens, logits, strict=True):
            np.testing.assert_allclose(row, alone[handle].step(token), atol=3e-5)
            assert slots.length(handle) == alone[handle].runner.length
        for handle in slots.active:
            if slots.length(handle) == most or (random.random() < 0.02 and slots.length(handle) > 20):
                slots.release(handle)
    assert served > 3
    assert slots.room == min(most, 192) or slots.room >= 128 or most < 128


def test_limits(tmp_path: Path) -> None:
    _, info = export(MODELS["kron"], tmp_path)
    slots = Slots(NarrowExecutor(info.path, Spans(Span(1, 1, 2), Span(2, 4, 8), Span(4, 8, 9))), 2)
    assert slots.longest == 9
    for length in (1, 9):
        with pytest.raises(UsageError, match=f"2 to 8 tokens here, not {length}"):
            slots.admit([1] * length)
    first, _ = slots.admit([1, 2])
    slots.admit([3] * 8)
    with pytest.raises(UsageError, match="all 2 rows are taken"):
        slots.admit([1, 2])
    with pytest.raises(UsageError, match="each of the 2 active"):
        slots.step([1])
    slots.step([1, 2])
    with pytest.raises(UsageError, match="9 tokens already"):
        slots.step([1, 2])
    assert slots.length(first) == 3


def test_engines_that_cannot_be_batched_are_refused(tmp_path: Path) -> None:
    _, info = export(MODELS["sliding window"], tmp_path / "window")
    with pytest.raises(UsageError, match="sliding window"):
        Slots(NarrowExecutor(info.path), 2)
    _, info = export(Case(llama()), tmp_path / "plain")
    for rows in (0, 5):
        with pytest.raises(UsageError, match="do not fit an engine"):
            Slots(NarrowExecutor(info.path), rows)
