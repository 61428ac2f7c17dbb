"""Going on after a kill: what is left of OUT/state, of a shared folder of statistics, and of OUT itself."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.artifact import state
from compress.artifact.store import Artifact
from compress.calibration.streams import Runner
from compress.errors import ArtifactError, UsageError
from compress.pipeline import compress_model
from compress.recipe import Recipe
from compress.requests import has_checkpoint
from compress.source.model import ModelSource
from tests.compress import helpers
from tests.compress.helpers import TinyModel, interrupted_at, same_files, text_file, tiny_source


@pytest.fixture
def source(tiny_model: TinyModel) -> ModelSource:
    return tiny_source(tiny_model, "tiny_llama_tied")


@pytest.fixture
def wanted(tmp_path: Path) -> Recipe:
    return helpers.recipe(text_file(tmp_path), structure="lowrank", ratio=0.7)


def interrupted(source: ModelSource, recipe: Recipe, out: Path, call: int = 11, **more: Any) -> None:
    """Stop a run at that block; 11 is the dense one of the last layer, to be fitted."""
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(patch, Runner, "block", call)
        with pytest.raises(KeyboardInterrupt):
            compress_model(source, recipe, out, **more)


def some_removed(state: Path) -> None:
    """As a kill inside of rmtree leaves it: the streams are gone, the rest is not."""
    for file in state.glob("fit-*.f32"):
        file.unlink()


def one_zeroed(state: Path) -> None:
    """As a loss of power leaves it: the name and the length are there, the content is not."""
    file = max(state.glob("fit-compressed-*.f32"))
    file.write_bytes(bytes(file.stat().st_size))


def plan_removed(state: Path) -> None:
    (state / "plan.safetensors").unlink()


@pytest.mark.parametrize("damage", [some_removed, one_zeroed, plan_removed])
def test_a_state_that_is_not_whole_is_not_taken_for_one(
    damage: Callable[[Path], None],
    source: ModelSource,
    wanted: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupted(source, wanted, tmp_path / "out")
    damage(tmp_path / "out" / "state")
    artifact = compress_model(source, wanted, tmp_path / "out")
    assert "starting anew" in capsys.readouterr().err
    same_files(artifact, compress_model(source, wanted, tmp_path / "fresh"))
    assert not artifact.path("state").exists()


@pytest.mark.parametrize("structure", ["kron", "auto"])
def test_a_plan_is_resumed_layer_by_layer(
    structure: str, source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed again and again, at each further menu or rotation, it still comes to an end, and to the same bytes."""
    from compress.allocation import groups

    recipe = helpers.recipe(text_file(tmp_path), structure=structure, ratio=0.7)
    with monkeypatch.context() as patch:
        whole_calls = interrupted_at(patch, groups.LayerMenus, "of", 0)
        whole = compress_model(source, recipe, tmp_path / "whole")
    done = 0
    for _ in range(2 * whole_calls[0]):  # each run gets one layer further
        with monkeypatch.context() as patch:
            calls = interrupted_at(patch, groups.LayerMenus, "of", 2)
            try:
                artifact = compress_model(source, recipe, tmp_path / "out")
            except KeyboardInterrupt:
                done += calls[0] - 1
                continue
        done += calls[0]
        break
    else:
        pytest.fail("it never came to an end")
    assert done == whole_calls[0] > 2
    same_files(artifact, whole)


def test_damaged_shared_statistics_are_found_out(
    source: ModelSource, wanted: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "statistics"
    whole = compress_model(source, wanted, tmp_path / "whole", statistics=shared)
    file = next(shared.rglob("forward-1.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-400] + bytes(400))
    capsys.readouterr()
    same_files(compress_model(source, wanted, tmp_path / "out", statistics=shared), whole)
    assert "forward-1.safetensors is not as it was left: starting anew" in capsys.readouterr().err
    assert next(shared.rglob("forward-1.safetensors")).read_bytes() == content


def started(work: Callable[[], object], log: Path) -> int:
    """The id of a child that does it; what it says goes to `log`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 2)
                sys.stderr = file
                work()
            code = 0
        finally:
            os._exit(code)
    return child


def until(condition: Callable[[], bool]) -> None:
    """Wait for it, at most five minutes."""
    for _ in range(30_000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not come to that")


def test_two_processes_share_statistics_one_after_the_other(
    source: ModelSource, wanted: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, save, logs = tmp_path / "statistics", state.save_file, {n: tmp_path / f"{n}.log" for n in "ab"}
    go_on = tmp_path / "go-on"

    def paused(*arguments: Any) -> None:
        until(go_on.exists)
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", paused)  # the first has begun, and has kept no moments yet
        first = started(lambda: compress_model(source, wanted, tmp_path / "a", statistics=shared), logs["a"])
        until(lambda: any(shared.rglob("dense-1.f32")))
    second = started(lambda: compress_model(source, wanted, tmp_path / "b", statistics=shared), logs["b"])
    until(lambda: logs["b"].exists() and f"waiting for process {first}" in logs["b"].read_text())
    go_on.touch()
    assert [os.waitpid(child, 0)[1] for child in (first, second)] == [0, 0], logs["b"].read_text()
    assert "calibrate" not in logs["b"].read_text()  # they were there
    alone = compress_model(source, wanted, tmp_path / "alone")
    for name in "ab":
        same_files(Artifact(tmp_path / name), alone)
    assert len(list(shared.iterdir())) == 1


def test_every_file_honours_the_umask(source: ModelSource, wanted: Recipe, tmp_path: Path) -> None:
    for mask, of_files, of_folders in ((0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0o077, 0o600, 0o700)):
        before = os.umask(mask)
        try:
            out = compress_model(source, wanted, tmp_path / f"{mask:o}", materialize_dense=True).out
        finally:
            os.umask(before)
        paths = list(out.rglob("*"))
        assert {path.name for path in paths} >= {"checkpoint", "dense", "manifest.json", "recipe.yaml"}
        for path in paths:
            assert stat.S_IMODE(path.stat().st_mode) == (of_folders if path.is_dir() else of_files), path


@pytest.mark.parametrize(("mask", "plain", "program"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_copies_honour_the_umask_and_not_their_originals(mask: int, plain: int, program: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with Artifact(tmp_path / "out").stage("triton") as folder:
            for name, mode in (("text", 0o644), ("own", 0o600), ("launch.sh", 0o755)):
                (folder / name).write_text("x")
                (folder / name).chmod(mode)
    finally:
        os.umask(before)
    made = tmp_path / "out" / "triton"
    assert [stat.S_IMODE((made / name).stat().st_mode) for name in ("text", "own", "launch.sh")] == [
        plain,
        plain,
        program,
    ]
    assert stat.S_IMODE(made.stat().st_mode) == program


@pytest.mark.parametrize("name", ["checkpoint", "recipe.yaml", "dense"])
def test_what_cannot_be_replaced_is_seen_before_any_work(
    name: str, source: ModelSource, wanted: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("years of work")
    calls = interrupted_at(monkeypatch, Runner, "block", 0)
    with pytest.raises(UsageError, match="was not written by this program"):
        compress_model(source, wanted, tmp_path / "out", materialize_dense=True)
    assert calls[0] == 0
    assert (tmp_path / "out" / name).read_text() == "years of work"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_a_finished_state_is_cleared(source: ModelSource, wanted: Recipe, tmp_path: Path) -> None:
    """A kill came between the last rename and the clearing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Artifact, "clear_state", lambda self: None)
        artifact = compress_model(source, wanted, tmp_path / "out")
    assert artifact.path("state").is_dir()
    assert has_checkpoint(artifact, source, wanted)
    artifact.clear_finished_state()
    assert not artifact.path("state").exists()
    interrupted(source, wanted.model_copy(update={"ratio": 0.6}), tmp_path / "out")
    artifact.clear_finished_state()
    assert artifact.path("state").exists()  # another recipe's, to be resumed


@pytest.mark.parametrize("content", ["structure: [", "", "ratio: 7\n", None], ids=["yaml", "empty", "value", "fifo"])
def test_a_damaged_recipe_does_not_stop_a_rebuild(
    content: str | None, source: ModelSource, wanted: Recipe, tmp_path: Path
) -> None:
    artifact = compress_model(source, wanted, tmp_path / "out")
    good = artifact.path("recipe.yaml").read_bytes()
    artifact.path("recipe.yaml").unlink()
    if content is None:
        os.mkfifo(artifact.path("recipe.yaml"))
    else:
        artifact.path("recipe.yaml").write_text(content)
    assert not has_checkpoint(artifact, source, wanted)
    assert compress_model(source, wanted, tmp_path / "out").path("recipe.yaml").read_bytes() == good
    artifact.verify()


ODD: dict[str, Callable[[Path], object]] = {
    "link": lambda path: path.symlink_to(path.parent / "elsewhere"),
    "link to a folder": lambda path: path.symlink_to(path.parent),
    "folder": lambda path: (path.mkdir(), (path / "thesis.txt").write_text("years of work")),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("name", [".lock", "state", "manifest.json", "checkpoint"])
@pytest.mark.parametrize("odd", ODD)
def test_odd_things_in_the_place_of_ours_are_refused(
    odd: str, name: str, source: ModelSource, wanted: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    ODD[odd](tmp_path / "out" / name)
    with pytest.raises((ArtifactError, UsageError), match=name) as seen:
        compress_model(source, wanted, tmp_path / "out")
    assert any(advice in str(seen.value) for advice in ("remove it", "move", "choose another --out"))
    assert os.path.lexists(tmp_path / "out" / name)
    if odd == "folder":
        assert (tmp_path / "out" / name / "thesis.txt").exists()
    remains = tmp_path / "out" / name
    shutil.rmtree(remains) if remains.is_dir() and not remains.is_symlink() else remains.unlink()
    assert compress_model(source, wanted, tmp_path / "out").has_stage("checkpoint")  # nothing stays locked


def test_what_scratch_folders_leave_goes_with_the_next_lock(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path / "out")
    with artifact.scratch("engines") as folder:
        (folder / "plan").write_text("x")
        assert folder.parent == artifact.out
    assert list(artifact.out.iterdir()) == []
    (artifact.out / ".scratch-engines").mkdir()
    (artifact.out / ".scratch-engines" / "plan").write_text("x")
    with artifact.lock():
        pass
    assert list(artifact.out.iterdir()) == []
