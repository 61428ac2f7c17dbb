"""Hostile artefacts through validation: their manifest vouches for them, and still one sentence at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile.artefacts import KINDS, UNREAD
from tests.hostile.conftest import assert_refused, validation
from tests.hostile.sandbox import Sandbox

READ = [name for name in KINDS if name not in UNREAD]
# Half a second each: every second one waits for the slow tests.
CASES = [pytest.param(name, marks=pytest.mark.slow if at % 2 else ()) for at, name in enumerate(READ)]


@pytest.mark.parametrize("name", CASES)
def test_validate(
    name: str, whole: Path, sandbox: Sandbox, sound: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    damage, says = KINDS[name]
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    damage(out)
    outcome = sandbox.run("validate.run", out, "--model", sound("tiny_llama"), *validation(text))
    assert_refused(outcome, 5, says)


def test_a_sound_one_is_not_refused(
    whole: Path, sandbox: Sandbox, sound: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    outcome = sandbox.run("validate.run", tmp_path / "out", "--model", sound("tiny_llama"), *validation(text))
    assert outcome.code == 0, outcome
