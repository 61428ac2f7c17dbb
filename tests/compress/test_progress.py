"""Progress goes to stderr: lines where it is no terminal, a bar where it is."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from compress.pipeline import compress_model
from compress.progress import log, track
from tests.compress import helpers
from tests.compress.helpers import TinyModel


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_off_a_terminal(capsys, monkeypatch):
    """The first and the last, and one a second between them."""
    clock = iter([0.0, 0.1, 0.2, 1.0, 1.1, 2.5, 2.6, 2.7])
    monkeypatch.setattr("compress.progress.time.monotonic", lambda: next(clock))
    assert list(track("abcdefg", description="layer")) == list("abcdefg")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        "layer 1/7 (0.1 s)",
        "layer 4/7 (1.1 s)",
        "layer 5/7 (2.5 s)",
        "layer 7/7 (2.7 s)",
    ]


def test_a_line_comes_after_its_item(capsys):
    steps = track(iter([1, 2]), description="step", total=2)
    next(steps)
    assert capsys.readouterr().err == ""
    next(steps)
    assert capsys.readouterr().err.startswith("step 1/2 ")


def test_unknown_total(capsys):
    assert list(track((i for i in range(2)), description="batch")) == [0, 1]
    assert re.match(r"batch 1 \(", capsys.readouterr().err)


def test_empty():
    assert list(track([], description="nothing")) == []


def test_an_error_of_the_source_passes_through():
    def source():
        yield 1
        raise RuntimeError("source")

    with pytest.raises(RuntimeError, match="source"):
        list(track(source(), description="x"))


def test_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    items = []
    for item in track(range(3), description="layer"):
        log(f"saw {item}")
        items.append(item)
    assert items == [0, 1, 2]
    text = terminal.getvalue()
    assert "layer: 100%" in text
    assert "3/3" in text
    assert "saw 1\n" in text


def test_log_writes_to_stderr(capsys):
    log("reading weights")
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "reading weights\n")


def test_every_long_phase_of_a_compression_shows_progress(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing that takes a minute on a large model is silent."""
    recipe = helpers.recipe(helpers.text_file(tmp_path), structure="kron", rotation="shared", sensitivity="fisher")
    compress_model(helpers.tiny_source(tiny_model, "tiny_llama"), recipe, tmp_path / "out")
    lines = [line for line in capsys.readouterr().err.splitlines() if "/" in line or "terms" in line]
    phases = list(dict.fromkeys(re.sub(r" [0-9]+(/[0-9]+)? \(.*", "", line) for line in lines))
    for phase in (
        *("check weights", "calibrate", "gradients of the head", "sensitivity", "start of the rotations"),
        *("terms of the rotation", "plan", "rotate", "fit", "largest activations"),
    ):
        assert phase in phases
