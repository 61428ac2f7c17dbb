"""Hostile model folders through the commands: one sentence at once, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from tests import tiny
from tests.hostile.conftest import assert_refused
from tests.hostile.models import KINDS, damaged
from tests.hostile.sandbox import Sandbox


@pytest.mark.parametrize("name", KINDS)
def test_compress(
    name: str, sandbox: Sandbox, sound: Callable[[str], Path], small: tuple[object, ...], tmp_path: Path
) -> None:
    kind = KINDS[name]
    model = damaged(sound(kind.model), tmp_path / "model", kind)
    outcome = sandbox.run("compress.run", "--model", model, "--out", tmp_path / "out", *small)
    assert_refused(outcome, kind.code, kind.says)
    assert not (tmp_path / "out" / "checkpoint").exists()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("block_count", 10**9, "block_count = 1,000,000,000, but tensors of 3 layers"),
        ("head_count", 0, "head_count = 0, but a positive whole number"),
    ],
)
def test_a_gguf_file(
    key: str,
    value: int,
    says: str,
    sandbox: Sandbox,
    small: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add = getattr(gguf.GGUFWriter, f"add_{key}")
    monkeypatch.setattr(gguf.GGUFWriter, f"add_{key}", lambda writer, count: add(writer, value))
    model = tiny.write_gguf("tiny_llama", tmp_path / "m.gguf")
    outcome = sandbox.run("compress.run", "--model", model, "--out", tmp_path / "out", *small)
    assert_refused(outcome, 5, says)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_opt", "shards"])
def test_sound_ones_are_not_refused(
    model: str, sandbox: Sandbox, sound: Callable[[str], Path], small: tuple[object, ...], tmp_path: Path
) -> None:
    """The limits of the sandbox are not what refuses the others."""
    outcome = sandbox.run("compress.run", "--model", sound(model), "--out", tmp_path / "out", *small)
    assert outcome.code == 0, outcome
