"""What is refused before any work, by a run and by --dry-run alike."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import compress.pipeline as pipeline
from compress.artifact.store import Artifact
from compress.cli.entry import run_cli
from compress.errors import ArtifactError
from compress.run import main as run
from compress.source import resolve as resolving
from compress.source.model import ModelSource
from export.build import main as build
from tests.compress import helpers
from tests.compress.helpers import TinyModel

Main = Callable[[Sequence[str]], int]
Command = Callable[..., int]


class Worked(BaseException):
    """Raised where the work would begin."""


@pytest.fixture(params=[run, build], ids=["run", "build"])
def command(
    request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """A command whose work is replaced by `Worked`; later flags win."""

    def work(*_: object, **__: object) -> None:
        raise Worked

    monkeypatch.setattr(pipeline, "request_digest", work)
    monkeypatch.chdir(tmp_path)
    text = helpers.text_file(tmp_path)
    given = ["--model", str(tiny_model("tiny_llama")), "--structure", "lowrank", "--calibration-data", str(text)]
    given += ["--calibration-samples", "2", "--sequence-length", "32", "--out", "out"]
    return lambda *flags: run_cli(request.param, [*given, *flags])


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--calibration-data nope.txt", 2, "nope.txt"),
        ("--calibration-data /dev/zero", 2, "/dev/zero"),
        ("--calibration-data wikitext:/dev/zero", 2, "/dev/zero"),
        ("--calibration-data nonsense", 2, "there is no text called"),
        ("--calibration-samples 100000", 2, "lower --calibration-samples"),
        ("--calibration-batch 0", 2, "--calibration-batch 0"),
        ("--device tpu", 2, "--device 'tpu'"),
        ("--out README.md", 2, "README.md is not, or is not in, a folder"),
        ("--out README.md/x", 2, "is not, or is not in, a folder"),
        ("--out /proc/x", 2, "/proc/x cannot be made there"),
        ("--out busy", 5, "busy is being written by"),
        ("--out somebody", 2, "somebody has 'notes.txt' in it, which was not written by this program"),
        ("--out .", 2, "was not written by this program"),
        ("--out MODEL", 2, "MODEL"),
        ("--out strange", 2, "was not written by this program"),
        ("--statistics README.md", 2, "choose another --statistics"),
        ("--structure auto --budget-latency 1 --latency-table none.json", 2, "none.json"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses(
    command: Command,
    flags: str,
    code: int,
    words: str,
    tiny_model: TinyModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "README.md").write_text("a file")
    for folder in ("busy", "somebody", "strange/state"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "somebody" / "notes.txt").write_text("mine")
    (tmp_path / "strange" / "state" / "notes.txt").write_text("mine")
    model = str(tiny_model("tiny_llama"))
    arguments = [word.replace("MODEL", model) for word in flags.split()]
    before = sorted(tmp_path.rglob("*"))
    said = []
    with open(tmp_path / "busy" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for more in ([], ["--dry-run"]):
            assert command(*arguments, *more) == code
            printed = capsys.readouterr()
            assert printed.out == ""
            said.append(printed.err.splitlines()[-1])
    assert said[0] == said[1]
    assert words.replace("MODEL", model) in said[0]
    (tmp_path / "busy" / ".lock").unlink()
    assert sorted(tmp_path.rglob("*")) == before
    assert not (Path(model) / ".lock").exists()


def test_a_device_that_only_this_machine_lacks_is_a_line_of_the_plan(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan may be made on another machine than the one that runs it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert command("--device", "cuda") == 4
    refused = capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")
    assert command("--device", "cuda", "--dry-run") == 0
    assert f"device: cuda, which this machine lacks ({refused})" in capsys.readouterr().out.splitlines()


def test_a_run_that_is_not_refused_works(command: Command, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert command("--dry-run") == 0
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(Worked):
        command()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_changes_nothing_in_an_artefact(command: Command, tmp_path: Path) -> None:
    """What a killed run left is left for the next real one."""
    out = tmp_path / "out"
    Artifact(out).write_text("recipe.yaml", "x: 1\n")
    (out / ".tmp-checkpoint").mkdir()
    os.utime(out, ns=(0, 0))
    before = sorted(out.rglob("*"))
    assert command("--dry-run") == 0
    assert sorted(out.rglob("*")) == before


def test_a_first_publication_that_was_killed_is_gone_on_from(command: Command, tmp_path: Path) -> None:
    """The kill came after the stage was renamed and before the first manifest was."""
    out = tmp_path / "out"
    Artifact(out).write_text("recipe.yaml", "x: 1\n")
    os.rename(out / "manifest.json", out / ".pending-recipe.yaml")
    assert command("--dry-run") == 0
    with pytest.raises(Worked):
        command()


@pytest.mark.parametrize(
    "flags", ["--device tpu", "--calibration-data nope.txt", "--calibration-batch 0", "--out x.md"]
)
def test_cheap_refusals_come_before_the_model_is_fetched(
    command: Command, flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.md").write_text("a file")

    def fetch(*_: object) -> None:
        raise Worked

    monkeypatch.setattr(resolving, "_from_path", fetch)
    assert command(*flags.split()) == 2
    with pytest.raises(Worked):
        command()


def changed(tiny_model: TinyModel, folder: Path, value: float, *names: str) -> ModelSource:
    """The tiny Llama with one value of each named weight, or where the value is 0 all of them, replaced."""

    def change(state: dict[str, torch.Tensor]) -> None:
        for name in state:
            if any(part in name for part in names):
                state[name].view(-1)[slice(None) if value == 0 else slice(7, 8)] = value

    return helpers.with_weights(helpers.tiny_source(tiny_model, "tiny_llama"), folder, change)


@pytest.fixture
def no_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Worked` where calibration would begin."""

    def work(*_: object, **__: object) -> None:
        raise Worked

    monkeypatch.setattr(pipeline, "method_of", work)


@pytest.mark.usefixtures("no_fit")
@pytest.mark.parametrize("name", ["layers.2.mlp.down_proj.weight", "norm.weight", "lm_head", "embed_tokens"])
def test_a_value_that_is_not_finite_is_found_before_calibration(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = changed(tiny_model, tmp_path / "model", float("nan"), name)
    with pytest.raises(ArtifactError, match="NaN or infinite"):
        pipeline.compress_model(source, helpers.recipe(helpers.text_file(tmp_path)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_fit")
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("_proj",), "warning: 21 of the 21 linears of this model are zero throughout (layers.0.attn.q, "),
        (
            ("layers.1.mlp.up_proj",),
            "warning: 1 of the 21 linears of this model are zero throughout (layers.1.mlp.up)",
        ),
        ((), None),
    ],
)
def test_linears_that_are_zero_are_warned_of(
    names: tuple[str, ...],
    words: str | None,
    tiny_model: TinyModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = changed(tiny_model, tmp_path / "model", 0.0, *names)
    with pytest.raises(Worked):
        pipeline.compress_model(source, helpers.recipe(helpers.text_file(tmp_path)), tmp_path / "out")
    printed = capsys.readouterr().err
    assert words in printed if words is not None else "zero throughout" not in printed


@pytest.mark.parametrize("there", [True, False])
def test_a_run_that_ends_before_its_first_piece_leaves_nothing(
    there: bool, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where OUT was there before; a piece that was being written is not one yet."""
    out = tmp_path / "out"
    if there:
        out.mkdir()

    def work(*_: object) -> None:
        (out / "state" / "dense-0.f32").write_bytes(b"begun")
        raise Worked

    monkeypatch.setattr(pipeline, "method_of", work)
    source = helpers.tiny_source(tiny_model, "tiny_llama")
    with pytest.raises(Worked):
        pipeline.compress_model(source, helpers.recipe(helpers.text_file(tmp_path)), out)
    assert out.exists() == there
    assert not there or list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"), [([], True), (["--structure", "kron"], False), (["--set", "structure=gs"], False)]
)
def test_a_structure_that_was_not_chosen_is_told(
    flags: list[str], said: bool, tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "--model",
        str(tiny_model("tiny_llama")),
        "--calibration-data",
        str(helpers.text_file(tmp_path)),
        "--dry-run",
    ]
    given += ["--calibration-samples", "2", "--sequence-length", "32", "--out", str(tmp_path / "out")]
    assert run_cli(run, [*given, *flags]) == 0
    assert ("structure kron, the default; --structure auto" in capsys.readouterr().err) == said
