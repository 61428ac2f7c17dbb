"""Hostile artefacts through validation: their manifest vouches for them, and still one sentence at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile.artefacts import KINDS, UNREAD
from tests.hostile.conftest import assert_refused
from tests.hostile.sandbox import Sandbox


@pytest.fixture(scope="module")
def whole(
    sandbox: Sandbox,
    sound: Callable[[str], Path],
    small: tuple[object, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A sound artefact of the tiny model. Not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    flags = ("--structure", "auto", "--ratio", "0.6", "--out", out)
    outcome = sandbox.run("export.build", "--model", sound("tiny_llama"), *small, *flags)
    assert outcome.code == 0, outcome
    return out


def flags(text: Path) -> tuple[object, ...]:
    """A validation of the parts that read most files."""
    return ("--no-plot", "--skip", "speed", "--max-windows", 1, "--sequence-length", 32, "--data", text)


@pytest.mark.parametrize("name", sorted(KINDS.keys() - UNREAD))
def test_validate(
    name: str, whole: Path, sandbox: Sandbox, sound: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    damage, says = KINDS[name]
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    damage(out)
    outcome = sandbox.run("validate.run", out, "--model", sound("tiny_llama"), *flags(text))
    assert_refused(outcome, 2 if name.startswith("recipe") else 5, says)


def test_a_sound_one_is_not_refused(
    whole: Path, sandbox: Sandbox, sound: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    outcome = sandbox.run("validate.run", tmp_path / "out", "--model", sound("tiny_llama"), *flags(text))
    assert outcome.code == 0, outcome
