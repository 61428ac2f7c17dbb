"""Kept pieces: a kill or a loss of power at any moment, and folders that are not as they were left."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.artifact.ledger import LEDGER, KeptFolder, clear, request_of
from compress.errors import ArtifactError, UsageError
from tests.crashing import deaths, died

REQUEST = {"model": "m", "ratio": 0.75}
STEPS = 4
POWER = pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])


def compute(folder: Path, request: object = REQUEST, made: list[int] | None = None) -> list[int]:
    """A computation like a fit: each step reads the stream of the one before, and leaves a piece and a stream."""
    kept = KeptFolder.open(folder, request)  # type: ignore[arg-type]
    for step in range(STEPS):
        if f"block-{step}.json" in kept:
            continue
        if made is not None:
            made.append(step)
        before = kept.path(f"fit-{step}.f32").read_bytes() if step else b"\1" * 4
        kept.path(f"fit-{step + 1}.f32").write_bytes(bytes(3 * b % 251 for b in before) * 2)
        kept.write_value(f"block-{step}", sum(before))
        kept.keep(f"block-{step}.json", f"fit-{step + 1}.f32", drop=[f"fit-{step}.f32"])
    return [kept.read_value(f"block-{step}") for step in range(STEPS)]


EXPECTED = [4, 24, 144, 864]


def state_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pieces_are_made_once(tmp_path: Path) -> None:
    first, second = list[int](), list[int]()
    assert compute(tmp_path / "state", made=first) == EXPECTED
    assert compute(tmp_path / "state", made=second) == EXPECTED
    assert (first, second) == ([0, 1, 2, 3], [])
    assert set(state_of(tmp_path / "state")) == {LEDGER, "fit-4.f32", *(f"block-{i}.json" for i in range(4))}


@POWER
def test_a_death_at_any_moment_is_gone_on_from(tmp_path: Path, power: bool) -> None:
    compute(tmp_path / "whole")
    left = []
    for root in deaths(lambda root: compute(root / "state"), tmp_path, power=power):
        made = list[int]()
        assert compute(root / "state", made=made) == EXPECTED
        assert state_of(root / "state") == state_of(tmp_path / "whole")
        assert [path.name for path in root.iterdir()] == ["state"]
        left.append(len(made))
    assert left == sorted(left, reverse=True)  # the later the death, the less is to do
    assert set(left) == {0, 1, 2, 3, 4}


@POWER
def test_a_death_while_another_request_takes_over(tmp_path: Path, power: bool) -> None:
    """The pieces of the one, of the other, or none: never some of each."""
    alive, moment = False, 0
    while not alive:
        moment += 1
        root = tmp_path / str(moment)
        root.mkdir()
        compute(root / "state")
        alive = not died(
            lambda root=root: KeptFolder.open(root / "state", {"model": "other"}),  # type: ignore[misc]
            root,
            moment,
            power=power,
        )
        made = list[int]()
        assert compute(root / "state", made=made) == EXPECTED
        assert made in ([], [0, 1, 2, 3])
    assert made == [0, 1, 2, 3]
    assert moment > 5


@POWER
def test_a_death_while_clearing_leaves_all_or_nothing(tmp_path: Path, power: bool) -> None:
    compute(tmp_path / "whole")
    moment, alive = 0, False
    while not alive:
        moment += 1
        root = tmp_path / str(moment)
        root.mkdir()
        compute(root / "state")
        alive = not died(lambda root=root: clear(root / "state"), root, moment, power=power)  # type: ignore[misc]
        if (root / "state").exists():
            assert state_of(root / "state") == state_of(tmp_path / "whole")
        made = list[int]()
        assert compute(root / "state", made=made) == EXPECTED
        assert made in ([], [0, 1, 2, 3])
        assert [path.name for path in root.iterdir()] == ["state"]
    assert moment > 5


def lost(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def zeroed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(bytes((folder / name).stat().st_size))


def linked(folder: Path) -> None:
    (folder / "fit-2.f32").rename(folder.parent / "elsewhere")
    (folder / "fit-2.f32").symlink_to(folder.parent / "elsewhere")


def edited(folder: Path) -> None:
    ledger = json.loads((folder / LEDGER).read_text())
    ledger["files"]["../outside.json"] = [1, "0" * 64]
    (folder / LEDGER).write_text(json.dumps(ledger))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lost("fit-2.f32"), r"fit-2\.f32 is missing: starting anew"),
        (lost("block-0.json"), r"block-0\.json is missing: starting anew"),
        (lost(LEDGER), "it has no ledger of what is in it: starting anew"),
        (zeroed("fit-2.f32"), r"fit-2\.f32 is not as it was left: starting anew"),
        (lambda folder: os.truncate(folder / "fit-2.f32", 3), r"fit-2\.f32 is not as it was left"),
        (lambda folder: (folder / LEDGER).write_text("{"), "its ledger is damaged"),
        (zeroed(LEDGER), "its ledger is damaged"),
        (lambda folder: (folder / LEDGER).write_text('{"schema": 7, "request": {}, "files": {}}'), "another version"),
        (linked, r"fit-2\.f32 is a symbolic link"),
        (edited, "its ledger is damaged"),
    ],
)
def test_what_does_not_fit_is_made_anew_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], said: str
) -> None:
    folder, made = tmp_path / "state", list[int]()
    compute_two(folder)
    damage(folder)
    capsys.readouterr()
    assert compute(folder, made=made) == EXPECTED
    assert made == [0, 1, 2, 3]
    assert re.search(said, capsys.readouterr().err)


def compute_two(folder: Path) -> None:
    """Two of the steps, as an interrupted run leaves them."""
    kept = KeptFolder.open(folder, REQUEST)
    for step, stream in enumerate([b"\3" * 8, b"\x09" * 16]):
        kept.path(f"fit-{step + 1}.f32").write_bytes(stream)
        kept.write_value(f"block-{step}", EXPECTED[step])
        kept.keep(f"block-{step}.json", f"fit-{step + 1}.f32", drop=[f"fit-{step}.f32"])


def test_what_two_steps_leave_is_gone_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = list[int]()
    compute_two(tmp_path / "state")
    (tmp_path / "state" / "block-2.partial").write_text("half")
    assert compute(tmp_path / "state", made=made) == EXPECTED
    assert made == [2, 3]
    assert "resuming the interrupted run" in capsys.readouterr().err


def test_another_request_starts_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = list[int]()
    compute_two(tmp_path / "state")
    compute(tmp_path / "state", {**REQUEST, "ratio": 0.5}, made)
    assert made == [0, 1, 2, 3]
    assert "it is of another model, recipe or version: starting anew" in capsys.readouterr().err


@pytest.mark.parametrize("make", [os.mkfifo, lambda p: p.symlink_to(p.parent), lambda p: p.write_text("x")])
def test_something_else_in_its_place_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "state")
    for use in (lambda: compute(tmp_path / "state"), lambda: clear(tmp_path / "state")):
        with pytest.raises(ArtifactError, match="where this program keeps a folder of its own: remove it"):
            use()
    assert request_of(tmp_path / "state") is None


def test_a_folder_of_the_user_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"'thesis\.txt' in it was not written by this program"):
        compute(tmp_path / "state")
    assert (tmp_path / "state" / "thesis.txt").exists()
