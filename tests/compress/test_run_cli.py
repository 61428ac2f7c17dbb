"""The command `python -m compress.run`: exit codes, sentences, and what it prints."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.artifact.store import Artifact
from compress.calibration.streams import Runner
from compress.cli.entry import run_cli
from compress.forecast import lines
from compress.recipe import read_yaml
from compress.run import main
from tests import tiny
from tests.compress.helpers import TinyModel, text_file

ROOT = Path(__file__).resolve().parents[2]
Command = Callable[..., int]


@pytest.fixture
def command(tiny_model: TinyModel, tmp_path: Path) -> Command:
    """Runs the command in this process, small by default; later flags win. Returns the exit code."""
    defaults = [
        *("--model", str(tiny_model("tiny_llama")), "--out", str(tmp_path / "out")),
        *("--calibration-data", str(text_file(tmp_path)), "--calibration-samples", "8", "--sequence-length", "32"),
        *("--set", "rotation_iterations=4", "--set", "sensitivity_samples=4"),
    ]

    def run(*arguments: str) -> int:
        return run_cli(main, [*defaults, *arguments])

    return run


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that says what was wrong."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_compress(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--ratio", "0.8") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[-1] == f"OK {tmp_path / 'out' / 'checkpoint'}"
    shown = dict(line.split(": ", 1) for line in lines[:-1])
    facts = Artifact(tmp_path / "out").read_manifest()["stages"]["checkpoint"]
    assert float(shown["ratio"]) == facts["ratio"] <= 0.8
    assert (shown["structure"], shown["rotation"]) == ("kron", "shared")
    assert "Traceback" not in err
    assert ("note" in shown) == (facts["ratio"] < 0.99 * 0.8)


def test_a_result_below_the_request_says_why(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--structure", "jrk", "--ratio", "0.8", "--unit", "20", "--json") == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown["ratio"] < 0.99 * 0.8
    assert shown["note"] == (
        f"{shown['ratio']:.4f} is kept where 0.8000 was asked for: sizes come in steps of 20 features; a smaller "
        "--unit may come closer"
    )
    # Two figures, each with its name: the linears alone, and all that is stored in place of them.
    assert "21 linears, 3 left dense: their own parameters, with nothing that goes with them, are 0." in err
    assert "of the projection parameters, skips, head map and added biases counted (asked 0.8000), " in err


def test_json_is_one_object(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--json", "--structure", "lowrank") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["out"] == str(tmp_path / "out")
    assert result["structure"] == "lowrank"
    assert result["structured_linears"] + result["dense_linears"] == 21


def test_materialize_dense(command: Command, tmp_path: Path) -> None:
    assert command("--structure", "lowrank", "--materialize-dense") == 0
    assert json.loads((tmp_path / "out" / "dense" / "config.json").read_text())["model_type"] == "llama"


def test_dry_run_writes_nothing(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert command("--dry-run", "--ratio", "0.8") == 0
    shown = capsys.readouterr().out.splitlines()
    assert command("--dry-run", "--json", "--ratio", "0.8") == 0
    plan = json.loads(capsys.readouterr().out)
    assert shown == lines(plan)
    for key, value in plan.items():
        assert isinstance(value, dict) == (key in ("linears", "disk", "memory"))
        told = [line for line in shown if line == f"{key}: {value}" or line.startswith(f"{key}: {value} (")]
        assert len(told) == (key not in ("disk", "memory", "linears") and not key.endswith("_bytes_about"))
    assert "  mlp.down: 64 x 160" in shown
    assert not any("{" in line or "[" in line for line in shown)
    [ceiling] = [line for line in shown if line.startswith("decode_ceiling")]
    assert "times as fast as dense at the most" in ceiling
    assert sorted(tmp_path.rglob("*")) == before
    projections = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64)
    assert plan["dense_projection_parameters"] == projections
    assert plan["projection_budget"] == int(0.8 * projections)
    assert plan["decode_ceiling"] == round((projections + 320 * 64) / (0.8 * projections + 320 * 64), 4)


def test_dry_run_foretells_the_checkpoint(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--rotation", "block", "--ratio", "0.9"], ["--structure", "gs"]):
        assert command("--dry-run", "--json", *arguments) == 0
        plan = json.loads(capsys.readouterr().out)
        assert command("--json", *arguments) == 0
        done = json.loads(capsys.readouterr().out)
        assert done["model_ratio"] <= plan["model_ratio"] + 1e-4
        assert done["model_ratio"] > plan["model_ratio"] - 0.1
        size = sum(p.stat().st_size for p in (tmp_path / "out" / "checkpoint").glob("*.safetensors"))
        assert size == pytest.approx(plan["checkpoint_bytes_about"], rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "smolm2-135m"], 2, "the nearest names are"),
        (["--model", "./nothing"], 2, "./nothing"),
        (["--ratio", "0"], 2, "error: --ratio: a finite number above 0 and at most 1 is needed, not 0.0"),
        (["--ratio", "1.5"], 2, "error: --ratio: a finite number above 0 and at most 1 is needed, not 1.5"),
        (["--ratio", "nan"], 2, "ratio: "),
        (["--ratio", "0.15", "--rotation", "block"], 2, "rotation 'block' alone adds"),
        (["--rotation", "shared", "--skip", "dense"], 2, "rotation 'shared' with skip 'dense'"),
        (["--set", "ratio"], 2, "--set takes FIELD=VALUE"),
        (["--set", "ratio=["], 2, "not YAML"),
        (["--set", "calibraton.seed=1"], 2, "calibraton: there is no such field"),
        (["--recipe", "nothing.yaml"], 2, "nothing.yaml is missing"),
        (["--calibration-data", "nothing.txt"], 2, "'nothing.txt' is missing"),
        (["--calibration-data", "nothing"], 2, "there is no text called 'nothing'"),
        (["--calibration-samples", "1000"], 2, "lower --calibration-samples or --sequence-length"),
        (["--sequence-length", "1000"], 2, "the 128 positions of this model"),
        (["--unit", "48"], 2, "--unit 48 does not divide"),
        (["--device", "gpu"], 2, "--device 'gpu'"),
        (["--device", "cuda:99"], 4, "use --device cpu"),
        (["--calibration-batch", "0"], 2, "--calibration-batch 0"),
        (["--dry-run", "--unit", "48"], 2, "--unit 48 does not divide"),
    ],
)
def test_exit_codes(
    arguments: list[str], code: int, words: str, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments) == code
    assert words in sentence(capsys)
    assert not (tmp_path / "out" / "checkpoint").exists()


@pytest.mark.parametrize("arguments", [["--structure", "magic"], ["--ratio", "much"], ["--nonsense"]])
def test_argparse_refuses(arguments: list[str], command: Command) -> None:
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize("content", ["", "  \n\n \t\n"])
def test_empty_text(content: str, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text(content)
    assert command("--calibration-data", str(tmp_path / "empty.txt")) == 2
    assert "is empty" in sentence(capsys)


def test_text_that_is_none(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    assert command("--calibration-data", str(tmp_path / "image.txt")) == 5
    assert "not UTF-8" in sentence(capsys)


def test_bad_recipe_file(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("ratio: 0.5\nstructur: gs\n")
    assert command("--recipe", str(tmp_path / "r.yaml")) == 2
    assert "structur: there is no such field, did you mean structure?" in sentence(capsys)
    (tmp_path / "r.yaml").write_text("layers: {layers.7.attn.q: {structure: lowrank, rank: 3}}\n")
    assert command("--recipe", str(tmp_path / "r.yaml")) == 2
    assert "'layers.7.attn.q' is no linear of this model" in sentence(capsys)
    assert not (tmp_path / "out").exists()


def test_the_written_recipe_is_accepted(command: Command, tmp_path: Path) -> None:
    assert command("--ratio", "0.8") == 0
    out = tmp_path / "out"
    files = {p.name: p.read_bytes() for p in (out / "checkpoint").iterdir()}
    # Without any of the flags that made it.
    arguments = ["--model", str(Artifact(out).out), "--out", str(tmp_path / "again")]
    assert command(*arguments[2:], "--recipe", str(out / "recipe.yaml")) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "again" / "checkpoint").iterdir()} == files


def test_flags_that_a_finished_recipe_leaves_nothing_to_decide(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--ratio", "0.8") == 0
    recipe = str(tmp_path / "out" / "recipe.yaml")
    for flag, value in (("--ratio", "0.95"), ("--structure", "gs"), ("--unit", "8")):
        assert command("--recipe", recipe, flag, value) == 2
        assert f"{flag} would change nothing: {recipe} is the recipe of a finished run" in sentence(capsys)
    assert command("--recipe", recipe, "--ratio", "0.8") == 0  # what it says itself


def test_out_that_cannot_be_written(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert command("--out", str(tmp_path / "file")) == 2
    assert "is not, or is not in, a folder" in sentence(capsys)
    assert command("--out", str(tmp_path / "file" / "below")) == 2
    assert "is not, or is not in, a folder" in sentence(capsys)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_out_without_permission(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert command("--out", str(tmp_path / "closed" / "out")) == 5
    assert "choose a folder that you may read and write" in sentence(capsys)


def test_read_only_file_system(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--out", "/proc/out") in (2, 5)  # also for root
    sentence(capsys)


@pytest.mark.parametrize("size", [10_000, 200_000, 400_000])
def test_full_disk(size: int, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At every stage: one sentence with the file, exit 5, and the next run completes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        assert command() == 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "out") in sentence(capsys)
    assert not (tmp_path / "out" / "checkpoint").exists()
    assert command() == 0


def test_interrupt(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "block", stop)
        assert command() == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; run the same command again to resume"
    assert command() == 0
    assert "resuming the interrupted run" in capsys.readouterr().err


def test_help_is_quick() -> None:
    """Processor time, which a busy machine does not change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "compress.run", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert "examples:" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_as_a_process(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Exit code, streams and the last line of the real thing."""
    arguments = ["--model", str(tiny_model("tiny_opt")), "--out", str(tmp_path / "out"), "--structure", "dense"]
    done = subprocess.run(
        [sys.executable, "-m", "compress.run", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"OK {tmp_path / 'out' / 'checkpoint'}"


def test_texts_are_long_enough() -> None:
    assert len(tiny.tokenizer()(tiny.TEXT)["input_ids"]) > 8 * 32


def test_sequences_that_are_not_given_fit_the_model(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of 128 positions, whose user said nothing of lengths; one who says more is refused."""
    text = text_file(tmp_path)
    given = ["--model", str(tiny_model("tiny_llama")), "--structure", "lowrank", "--calibration-data", str(text)]
    given += ["--calibration-samples", "2", "--sensitivity", "none"]
    assert run_cli(main, [*given, "--out", str(tmp_path / "out")]) == 0
    told = "--sequence-length is 128 in place of 1024: the model has no more positions"
    assert told in capsys.readouterr().err.splitlines()
    assert read_yaml(tmp_path / "out" / "recipe.yaml")["calibration"]["sequence_length"] == 128
    assert run_cli(main, [*given, "--sequence-length", "1024", "--out", str(tmp_path / "other")]) == 2
    assert "give --sequence-length 128 or less" in capsys.readouterr().err
