"""Without --out: a folder named after its contents, printed first, and nothing of another request replaced in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from compress.artifact.store import Artifact
from compress.cli.entry import run_cli
from compress.default_out import default_out, refuse_anothers
from compress.errors import UsageError
from compress.recipe import parse_recipe, read_yaml
from compress.run import main
from compress.source.resolve import resolve
from export.build import main as build
from tests import tiny
from tests.compress import helpers
from tests.compress.helpers import TinyModel


@pytest.mark.parametrize(
    ("model", "changes", "name"),
    [
        ("opt-13b", {}, "opt-13b-kron-0.75"),
        ("facebook/opt-1.3b", {"structure": "gs", "ratio": 0.8}, "opt-1.3b-gs-0.8"),
        ("hf:facebook/opt-1.3b", {"structure": "auto"}, "opt-1.3b-auto-0.75"),
        ("./my model/", {"ratio": 0.5}, "my-model-kron-0.5"),
        ("~/models/Llama.Q4_K_M.gguf", {"structure": "pifa"}, "Llama.Q4_K_M-pifa-0.75"),
        ("C:\\models\\mine", {"structure": "dense"}, "mine-dense"),
        ("mine", {"structure": "kron", "fit": "paper"}, "mine-kron-paper-0.75"),
        ("mine", {"structure": "auto", "budget_bytes": 1 << 28}, "mine-auto-268435456B"),
        ("mine", {"structure": "auto", "budget_latency": 0.0125}, "mine-auto-0.0125s"),
        ("/", {}, "kron-0.75"),
    ],
)
def test_names(model: str, changes: dict[str, Any], name: str) -> None:
    assert default_out(model, parse_recipe(changes, "a test")) == Path("out") / name


def test_the_present_folder_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert default_out(".", parse_recipe({}, "a test")).name == "mine-kron-0.75"


@pytest.fixture
def command(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`compress.run` in a fresh folder, without --out."""
    monkeypatch.chdir(tmp_path)
    text = helpers.text_file(tmp_path)
    given = ["--model", str(tiny_model("tiny_llama")), "--structure", "lowrank", "--ratio", "0.5"]
    given += ["--calibration-data", str(text), "--calibration-samples", "4", "--sequence-length", "32"]
    return lambda *flags: run_cli(main, [*given, "--set", "sensitivity_samples=2", *flags])


def test_another_request_is_refused_and_the_same_is_not(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], tiny_model: TinyModel
) -> None:
    out = Path("out/tiny_llama-lowrank-0.5")
    assert command() == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines()[0] == f"OUT is {out}"
    assert printed.out.splitlines()[-1] == f"OK {out / 'checkpoint'}"
    before = (out / "manifest.json").read_bytes()

    assert command("--seed", "3") == 2  # another text order: the folder's name is the same
    assert f"{out}, the folder that would be used, was made with another recipe" in capsys.readouterr().err
    assert command("--dry-run", "--seed", "3") == 2
    assert f"{out}, the folder that would be used, was made with another recipe" in capsys.readouterr().err
    other = resolve(str(tiny_model("tiny_llama_tied")))
    wanted = parse_recipe(read_yaml(out / "recipe.yaml"), "a test")
    with pytest.raises(UsageError, match=f"another model; name another folder with --out, or say --out {out} to"):
        refuse_anothers(Artifact(out), other, wanted)
    assert (out / "manifest.json").read_bytes() == before

    # What OUT/recipe.yaml says is what OUT holds, though every choice is written out in it.
    refuse_anothers(Artifact(out), resolve(str(tiny_model("tiny_llama"))), wanted)
    assert command("--seed", "3", "--out", str(out)) == 0  # named, it is replaced as ever


def test_what_is_no_artefact_is_left_alone(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("out/tiny_llama-lowrank-0.5")
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    assert command() == 2
    assert "has 'notes.txt' in it, which was not written by this program" in capsys.readouterr().err


def test_the_command_of_the_mission(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--model", str(tiny_model("tiny_opt")), "--structure", "kron", "--engine", "trt"]
    Path("text.txt").write_text(tiny.TEXT)  # the default text is in a package of the demo's
    given += ["--dry-run", "--json", "--sequence-length", "64", "--calibration-samples", "2"]  # of few positions
    given += ["--calibration-data", "text.txt"]
    assert run_cli(build, given) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["out"] == "out/tiny_opt-kron-0.75"
    assert not Path("out").exists()


def test_resume_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(build, ["--resume", "--engine", "trt"]) == 2
    assert "say with --out which folder" in capsys.readouterr().err


@pytest.mark.parametrize("main", [main, build])
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--model", "MODEL/config.json"), False),
        (("--model", "no-such-model"), False),
        (("--calibration-data", "none.txt"), True),
        (("--sequence-length", "100000"), True),
        (("--structure", "auto", "--budget-bytes", "10"), True),
    ],
)
def test_what_is_refused_leaves_nothing(
    main: Callable[[Sequence[str]], int],
    flags: tuple[str, ...],
    told: bool,
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No OUT, nor the folder that it would have been in; and a name that is no model is told before OUT is."""
    text = helpers.text_file(tmp_path)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    model = str(tiny_model("tiny_llama"))
    given = ["--model", model, "--structure", "lowrank", "--calibration-data", str(text), "--calibration-samples", "4"]
    arguments = [*given, "--sequence-length", "32", *(flag.replace("MODEL", model) for flag in flags)]
    assert run_cli(main, arguments) == 2
    assert ("OUT is" in capsys.readouterr().err) == told
    assert list((tmp_path / "work").iterdir()) == []
