"""The runner of TensorRT engines, with ONNX Runtime on the CPU in the engine's place: its cache must change nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compress.errors import UsageError
from export.runtime.device import SLOTS, DeviceRunner
from export.runtime.ort import OrtRunner
from export.runtime.profiles import DECODE, PREFILL, Span, Spans
from tests.export.cases import export
from tests.export.runtime.narrow import MODELS, NarrowExecutor


@pytest.fixture(params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    _, info = export(MODELS[request.param], tmp_path)
    return info.path


def prompts(vocabulary: int, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, length))
    mask = np.ones_like(ids)
    for row in range(1, batch):
        mask[row, : row * (length // batch)] = 0
    return ids, mask


@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_and_decode_equal_onnx_runtime(path: Path, batch: int) -> None:
    """One token at a time and several, through two enlargements of the cache, with padding on the left."""
    ort, executor = OrtRunner(path), NarrowExecutor(path)
    runner = DeviceRunner(executor)
    room = min(SLOTS - 3, int(runner.metadata["max_positions"]) - 12)
    ids, mask = prompts(runner.vocabulary, batch, room)
    np.testing.assert_allclose(runner.prefill(ids, mask), ort.prefill(ids, mask), atol=2e-5)
    tokens = np.random.default_rng(1).integers(0, runner.vocabulary, (batch, 12))
    start = 0
    for new in (1, 1, 1, 1, 3, 1, 1, 2, 1):
        part = tokens[:, start : start + new]
        np.testing.assert_allclose(runner.decode(part), ort.decode(part), atol=2e-5)
        assert runner.length == ort.length == room + start + new
        start += new
    decoded = [shape for profile, shape in executor.calls if profile == DECODE]
    rooms = [past for _, _, past in decoded]
    if runner.metadata["sliding_window"] is not None:
        assert rooms == sorted(set(rooms))  # no gaps: a new shape at every step
    elif room == SLOTS - 3:
        assert set(rooms) == {SLOTS, 2 * SLOTS}
    assert {profile for profile, _ in executor.calls} == {PREFILL, DECODE}


def test_generation_and_run_full_equal_onnx_runtime(path: Path) -> None:
    ort, runner = OrtRunner(path), DeviceRunner(NarrowExecutor(path))
    given = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    assert runner.generate(given, max_new_tokens=12, eos=[]) == ort.generate(given, max_new_tokens=12, eos=[])
    ids, mask = prompts(runner.vocabulary, 2, 9)
    length = runner.length
    np.testing.assert_allclose(runner.run_full(ids, mask), ort.run_full(ids, mask), atol=2e-5)
    assert runner.length == length > 0
    runner.decode([[1], [2], [3]])  # the cache is still that of three sequences
    runner.reset()
    assert runner.length == 0
    with pytest.raises(UsageError, match="call prefill first"):
        runner.decode([1])


def test_sizes_that_the_engine_was_not_built_for_are_refused(tmp_path: Path) -> None:
    _, info = export(MODELS["kron"], tmp_path)
    executor = NarrowExecutor(info.path, Spans(Span(2, 2, 3), Span(2, 4, 8), Span(4, 8, 9)))
    runner = DeviceRunner(executor)
    with pytest.raises(UsageError, match="2 to 3 sequences, not 1"):
        runner.prefill([[1, 2, 3]])
    with pytest.raises(UsageError, match="2 to 8 new tokens, not 9"):
        runner.prefill(np.ones((2, 9)))
    with pytest.raises(UsageError, match="2 to 8 new tokens, not 1"):
        runner.run_full(np.ones((2, 1)))
    runner.prefill(np.ones((2, 2)))  # a cache of two tokens: the engine wants four, and two of them stay empty
    for _ in range(7):
        runner.decode([3, 4])
    with pytest.raises(UsageError, match="10 tokens in the cache are more than the 9"):
        runner.decode([3, 4])
    assert runner.length == 9


def test_half_precision_caches(tmp_path: Path) -> None:
    _, info = export(MODELS["kron"], tmp_path, dtype="float16")
    ort, runner = OrtRunner(info.path), DeviceRunner(NarrowExecutor(info.path))
    given = [[5, 6, 7], [8]]
    assert runner.generate(given, max_new_tokens=6, eos=[]) == ort.generate(given, max_new_tokens=6, eos=[])
