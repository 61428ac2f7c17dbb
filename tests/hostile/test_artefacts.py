"""Hostile artefacts through validation: their manifest vouches for them, and still one sentence at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile.artefacts import KINDS, UNREAD
from tests.hostile.conftest import assert_refused, validation
from tests.hostile.sandbox import Sandbox


@pytest.mark.parametrize("name", sorted(KINDS.keys() - UNREAD))
def test_validate(
    name: str, whole: Path, sandbox: Sandbox, sound: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    damage, says = KINDS[name]
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    damage(out)
    outcome = sandbox.run("validate.run", out, "--model", sound("tiny_llama"), *validation(text))
    assert_refused(outcome, 2 if name.startswith("recipe") else 5, says)


def test_a_sound_one_is_not_refused(
    whole: Path, sandbox: Sandbox, sound: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    outcome = sandbox.run("validate.run", tmp_path / "out", "--model", sound("tiny_llama"), *validation(text))
    assert outcome.code == 0, outcome
