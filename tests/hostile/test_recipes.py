"""Hostile recipes, flags and texts through `compress.run`: one sentence at once, before the model is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.hostile.conftest import assert_refused
from tests.hostile.sandbox import Sandbox

# As short as the tiny model's positions.
SHORT = ("--calibration-samples", 4, "--sequence-length", 32)


def billion() -> str:
    """Nine lines of aliases that stand for a billion values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    return "\n".join(lines)


RECIPES: dict[str, tuple[str, str]] = {
    "a date that does not exist": ("ratio: 2021-02-30", "ratio: .* not '2021-02-30'"),
    "an integer of letters": ("ratio: !!int abc", "is not YAML"),
    "a truth of numbers": ("joint: !!bool 7", "is not YAML"),
    "an empty float": ("ratio: !!float ''", "is not YAML"),
    "an object of Python": ("ratio: !!python/object/apply:os.getcwd []", "is not YAML"),
    "a seed of 2^70": (f"calibration: {{seed: {2**70}}}", "calibration.seed"),
    "a ratio of nan": ("ratio: .nan", "ratio"),
    "an infinite budget": ("latency_table: x\nbudget_latency: .inf", "budget_latency: .*finite number"),
    "a number of 10,000 digits": (f"budget_bytes: {'9' * 10_000}", "is no number"),
    "nested open": ("layers: " + "[" * 5_000, "nested more than 64 deep"),
    "nested closed": ("layers: " + "[" * 70 + "]" * 70, "nested more than 64 deep"),
    "nested by itself": ("layers: &a [*a]", "nested more than 64 deep"),
    "a billion by aliases": (billion(), "more than 1,048,576 values"),
    "a key twice": ("ratio: 0.5\nratio: 0.5", "the key 'ratio' twice"),
    "a list": ("- 1", "must be a mapping"),
    "nothing": ("", "must be a mapping"),
    "keys of lists": ("? [1]\n: 2", "is not YAML"),
    "half a pair": ('structure: "\\ud800"', "half a surrogate pair"),
    "a long name": (f"structure: {'x' * 100_000}", "structure: "),
    "two megabytes": ("#" * (2 << 20), "more than the 1,048,576 bytes"),
    "layers that are none": ("layers: {layers.9.attn.q: {structure: dense}}", "layers.9.attn.q"),
    "layers of numbers": ("layers: {layers.0.attn.q: {structure: lowrank, rank: 1.0e+400}}", "rank|number"),
    "a structure of no kind": ("layers: {layers.0.attn.q: {structure: [1]}}", "structure"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str, sandbox: Sandbox, sound: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    content, says = RECIPES[name]
    (tmp_path / "r.yaml").write_text(content)
    flags = ("--recipe", tmp_path / "r.yaml", "--calibration-data", text, "--out", tmp_path / "out")
    outcome = sandbox.run("compress.run", "--model", sound("tiny_llama"), *SHORT, *flags)
    assert_refused(outcome, 2, says)


def not_files(path: Path) -> dict[str, Callable[[], Any]]:
    """What stands in the place of a file and never ends, or never answers."""
    return {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "link": lambda: path.symlink_to("gone"),
    }


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link"])
@pytest.mark.parametrize(
    ("flag", "file"), [("--recipe", "r.yaml"), ("--calibration-data", "t.txt"), ("--calibration-data", "t.jsonl")]
)
def test_what_is_no_file(
    flag: str, file: str, kind: str, sandbox: Sandbox, sound: Callable[[str], Path], tmp_path: Path
) -> None:
    not_files(tmp_path / file)[kind]()
    outcome = sandbox.run(
        "compress.run", "--model", sound("tiny_llama"), *SHORT, flag, tmp_path / file, "--out", tmp_path / "out"
    )
    assert_refused(outcome, 2, f"{kind}")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link"])
def test_a_latency_table_that_is_no_file(
    kind: str, sandbox: Sandbox, sound: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    not_files(tmp_path / "table.json")[kind]()
    flags = ("--structure", "auto", "--budget-latency", "1", "--latency-table", tmp_path / "table.json")
    outcome = sandbox.run(
        *("compress.run", "--model", sound("tiny_llama"), *SHORT, *flags),
        *("--calibration-data", text, "--out", tmp_path / "out"),
    )
    assert_refused(outcome, 2, kind)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--seed", 2**70), "--seed: a whole number"),
        (("--set", "calibration.seed=!!int abc"), "is not YAML"),
        (("--set", "layers=" + "[" * 5000), "nested more than 64 deep"),
        (("--set", "x" * 100_000), "FIELD=VALUE"),
        (("--calibration-samples", 10**12), "are asked for"),
        (("--sequence-length", 10**12), "are asked for|positions"),
        (("--unit", 2**70), "unit|steps of"),
        (("--calibration-data", "x" * 100_000), "there is no text"),
        (("--calibration-data", "\0.txt"), "the text file|null"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_flags(
    flags: tuple[object, ...], says: str, sandbox: Sandbox, sound: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    flags = (*SHORT, "--calibration-data", text, "--out", tmp_path / "out", *flags)
    outcome = sandbox.run("compress.run", "--model", sound("tiny_llama"), *flags)
    assert_refused(outcome, 2, says)


def test_half_a_surrogate_pair_in_the_text(
    sandbox: Sandbox, sound: Callable[[str], Path], small: tuple[object, ...], tmp_path: Path
) -> None:
    rows = [{"text": line} for line in tiny.TEXT.splitlines()]
    rows[1]["text"] += "\ud83d"
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (*small, "--calibration-data", tmp_path / "t.jsonl", "--out", tmp_path / "out")
    outcome = sandbox.run("compress.run", "--model", sound("tiny_llama"), *flags)
    assert outcome.code == 0, outcome
    assert "warning: line 2 of" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "one-row.jsonl", "one-line.txt", "blank-lines.jsonl"])
def test_a_large_text_for_few_tokens(
    name: str, sandbox: Sandbox, sound: Callable[[str], Path], small: tuple[object, ...], tmp_path: Path
) -> None:
    """200 MB for 128 tokens, within the memory and the time of the sandbox."""
    path = tmp_path / name
    line = (json.dumps({"text": tiny.TEXT}) + "\n") if name == "t.jsonl" else tiny.TEXT
    line = tiny.TEXT.replace("\n", " ") if name == "one-line.txt" else line
    line = "\n" * 1000 if name == "blank-lines.jsonl" else line
    with path.open("w") as file:
        if name == "one-row.jsonl":
            file.write('{"text": "')
            line = json.dumps(line)[1:-1]
        for _ in range(200_000_000 // (1000 * len(line))):
            file.write(line * 1000)
        if name == "one-row.jsonl":
            file.write('"}\n')
        if name == "blank-lines.jsonl":
            file.write(json.dumps({"text": tiny.TEXT}))
    flags = (*small, "--calibration-data", path, "--structure", "lowrank", "--out", tmp_path / "out")
    outcome = sandbox.run("compress.run", "--model", sound("tiny_llama"), *flags)
    path.unlink()
    assert outcome.code == 0, outcome
