"""The sandbox, sound models to damage, and what every refusal must be."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.hostile.sandbox import Outcome, Sandbox

Refused = Callable[..., None]


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """Commands in forked children with limits."""
    box = Sandbox(tmp_path_factory.mktemp("sandbox"))
    yield box
    box.close()


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> folder of a tiny model, "shards" for one in several files. Not to be changed."""
    root = tmp_path_factory.mktemp("sound")

    def folder(name: str) -> Path:
        path = root / name
        if path.exists():
            return path
        if name == "shards":
            return tiny.write("tiny_llama", path, max_shard_size="200KB")
        return tiny.write(name, path)

    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text for tiny models."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.TEXT)
    return path


@pytest.fixture(scope="session")
def small(text: Path) -> tuple[object, ...]:
    """Flags of a compression of a tiny model that takes a blink."""
    return (
        *("--calibration-data", text, "--calibration-samples", 4, "--sequence-length", 32),
        *("--set", "rotation_iterations=2", "--set", "sensitivity_samples=2"),
    )


@pytest.fixture(scope="session")
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


def validation(text: Path) -> tuple[object, ...]:
    """A validation of the parts that read most files."""
    return ("--no-plot", "--skip", "speed", "--max-windows", 1, "--sequence-length", 32, "--data", text)


def assert_refused(outcome: Outcome, code: int, says: str) -> None:
    """One sentence, with this exit code."""
    assert is_told(outcome), outcome
    assert outcome.code == code, outcome
    assert re.search(says, outcome.sentence()), outcome


def is_told(outcome: Outcome) -> bool:
    """Whether a command that failed said why in a sentence, and nothing else went wrong."""
    sentence = outcome.sentence()
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    return (
        outcome.code in (2, 4, 5)
        and len(errors) == 1
        and "Traceback" not in outcome.err
        and "panicked" not in outcome.err  # Rust's own line
        and len(sentence) < 1000
        and sentence.isprintable()
    )
