"""The command: what it prints, writes and exits with."""

from __future__ import annotations

import dataclasses
import json
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.artifact.store import Artifact
from compress.cli.entry import run_cli
from compress.errors import UsageError
from export.build import main as build
from tests.validate.damaging import damage
from validate import run


@pytest.fixture(scope="module")
def validated(built: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A copy that has been validated in full, once for this module."""
    copy = built.copy(tmp_path_factory.mktemp("validated") / "out")
    assert copy.run("--data", str(built.text)) == 0
    return copy


def test_reports_are_complete_and_vouched_for(validated: Any) -> None:
    names = {path.name for path in (validated.out / "reports").iterdir()}
    assert names == {"summary.md", "parity.json", "quality.json", "speed.json", "layers.png", "frontier.png"}
    artifact = Artifact(validated.out)
    artifact.verify()
    gates = artifact.read_manifest()["gates"]
    assert set(gates) == {"parity-rung-1", "parity-rung-2", "parity-rung-3", "parity-rung-3-choices"}
    assert all(gate["passed"] for gate in gates.values())
    assert not (validated.out / "state").exists()


def test_summary_has_the_figures_of_the_json(validated: Any) -> None:
    reports = validated.out / "reports"
    text = (reports / "summary.md").read_text()
    quality, speed, parity = (json.loads((reports / f"{n}.json").read_text()) for n in ("quality", "speed", "parity"))
    assert f"{quality['dense']['perplexity']:.3f}" in text
    assert f"{quality['compressed']['perplexity']:.3f}" in text
    for case in speed["cases"]:
        assert f"| {case['name']} | **{case['speedup']:.3f}x** |" in text
        assert case["share_of_limit"] == pytest.approx(case["speedup"] / case["limit"])
    assert [rung["number"] for rung in parity] == [1, 2, 3]
    assert "None" not in text
    assert "nan" not in text


def test_reports_name_no_folder_of_this_machine(validated: Any) -> None:
    for path in (validated.out / "reports").glob("*[!g]"):
        text = path.read_text()
        assert str(validated.out.parent) not in text, path
        assert str(validated.source.parent) not in text, path
        assert str(validated.text.parent) not in text, path


def test_what_the_report_says_reproduces_it(validated: Any, built: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """With folders below the present one, as README has them, the two commands run as they are printed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(built.source, tmp_path / "models" / "a model")
    shutil.copy(built.text, tmp_path / "text.txt")
    shutil.copy(validated.out / "recipe.yaml", tmp_path / "recipe.yaml")
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["calibration"]["data"] = "text.txt"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    first = ["--model", "models/a model", "--recipe", "recipe.yaml", "--out", "outs/first"]
    assert run_cli(build, first) == 0
    flags = ["--skip", "speed", "--skip", "parity", "--no-plot", "--data", "text.txt", "--max-windows", "1"]
    flags += ["--sequence-length", "64"]
    assert run_cli(run.main, ["outs/first", *flags]) == 0
    text = (tmp_path / "outs" / "first" / "reports" / "summary.md").read_text()
    commands = text.partition("How to reproduce\n\n```sh\n")[2].partition("```")[0].splitlines()
    for entry, line in zip((build, run.main), commands, strict=True):
        assert run_cli(entry, shlex.split(line)[3:]) == 0, line


def test_quality_states_its_protocol(validated: Any) -> None:
    quality = json.loads((validated.out / "reports" / "quality.json").read_text())
    assert quality["data"]["name"] == "text.txt"
    protocol = quality["protocol"]
    assert (protocol["window"], protocol["stride"], protocol["windows"]) == (64, 64, 4)
    assert protocol["predicted_tokens"] == 4 * 63
    assert protocol["begins_with_bos"] is False
    assert protocol["compressed_runtime"] == "PyTorch"
    assert quality["calibrated_on_this_text"] is True


def test_both_runtimes_give_the_same_perplexity(validated: Any, built: Any, tmp_path: Path) -> None:
    copy = built.copy(tmp_path / "out")
    flags = ("--skip", "parity", "--skip", "speed", "--perplexity-runtime", "onnxruntime", "--no-plot")
    assert copy.run("--data", str(built.text), *flags) == 0
    one, other = (json.loads((b.out / "reports" / "quality.json").read_text()) for b in (validated, copy))
    assert other["protocol"]["compressed_runtime"] == "ONNX Runtime"
    assert other["compressed"]["perplexity"] == pytest.approx(one["compressed"]["perplexity"], rel=1e-5)
    assert sorted(p.name for p in (copy.out / "reports").iterdir()) == ["quality.json", "summary.md"]


def test_last_line_ok(built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = built.copy(tmp_path / "out")
    assert copy.run("--skip", "speed", "--skip", "perplexity", "--no-plot") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"OK {copy.out / 'reports'}"
    assert any(line.startswith("parity rung 3") and "passed" in line for line in lines)


def test_failed_speed_gate(built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = built.copy(tmp_path / "out")
    assert copy.run("--skip", "parity", "--skip", "perplexity", "--min-speedup", "50", "--no-plot") == 3
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("FAILED min-speedup: ")
    assert last.endswith(" < 50")
    gates = Artifact(copy.out).read_manifest()["gates"]
    assert gates["min-speedup"]["passed"] is False
    assert "**FAILED**: min-speedup" in (copy.out / "reports" / "summary.md").read_text()


def test_failed_perplexity_gate(
    built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a random model compression can lower the perplexity: the measured figure is raised here."""
    measure = run._quality
    monkeypatch.setattr(run, "_quality", lambda *args: measure(*args) | {"relative_increase": 0.0731})
    copy = built.copy(tmp_path / "out")
    flags = ("--skip", "parity", "--skip", "speed", "--data", str(built.text), "--no-plot")
    assert copy.run(*flags, "--max-ppl-increase", "5%") == 3
    assert capsys.readouterr().out.splitlines()[-1] == "FAILED max-ppl-increase: 7.31% > 5%"
    assert copy.run(*flags, "--max-ppl-increase", "8%") == 0


def test_a_defect_in_the_export_fails_the_ladder(
    built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The damaged graph is published as a sound stage: hashes agree, the model does not."""
    copy = built.copy(tmp_path / "out")
    artifact = Artifact(copy.out)
    files = {path.name: path.read_bytes() for path in (copy.out / "onnx").iterdir()}
    with artifact.stage("onnx", inputs=["checkpoint"]) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        damage(folder)
    assert copy.run("--skip", "speed", "--skip", "perplexity", "--no-plot") == 3
    assert "FAILED parity-rung-3: " in capsys.readouterr().out
    assert json.loads((copy.out / "reports" / "parity.json").read_text())[2]["passed"] is False


def test_gates_of_an_earlier_run_are_not_kept(built: Any, tmp_path: Path) -> None:
    copy = built.copy(tmp_path / "out")
    parity_only = ("--skip", "speed", "--skip", "perplexity", "--no-plot")
    assert copy.run(*parity_only) == 0
    assert copy.run("--skip", "speed", "--skip", "parity", "--data", str(built.text), "--no-plot") == 0
    assert Artifact(copy.out).read_manifest()["gates"]["parity-rung-1"] is None


def test_json_is_one_object(built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = built.copy(tmp_path / "out")
    assert copy.run("--skip", "speed", "--skip", "perplexity", "--no-plot", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] is True
    assert result["speed"] is None
    assert len(result["parity"]) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-ppl-increase", "5"), "not a limit"),
        (("--min-speedup", "fast"), "not a limit"),
        (("--batch-sizes", "1,1"), "--batch-sizes"),
        (("--prefill", "0"), "--prefill must be at least 1"),
        (("--stride", "-1"), "--stride"),
        (("--seconds", "nan"), "--seconds"),
        (("--skip", "speed", "--min-speedup", "1"), "needs the speed part"),
        (("--skip", "parity", "--skip", "speed", "--skip", "perplexity"), "nothing to validate"),
        (("--skip", "parity", "--skip", "speed", "--sequence-length", "4096"), "128 positions"),
        (("--skip", "parity", "--skip", "speed", "--data", "nothing"), "no text called"),
        (("--skip", "parity", "--skip", "perplexity", "--dense", "nowhere"), "is not there"),
    ],
)
def test_usage_errors(built: Any, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str) -> None:
    assert built.run(*flags, "--no-plot") == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_too_short_text(built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    assert built.run("--skip", "parity", "--skip", "speed", "--data", str(text)) == 2
    assert "too short" in capsys.readouterr().err


def test_no_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.run_cli(run.main, [str(tmp_path)]) == 5
    assert "no build has been completed there (manifest.json is missing)" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert run.run_cli(run.main, [str(tmp_path)]) == 5
    assert "is no output folder of this program: it is a model" in capsys.readouterr().err


def test_changed_file(built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = built.copy(tmp_path / "out")
    with (copy.out / "checkpoint" / "config.json").open("a") as file:
        file.write(" ")
    assert copy.run() == 5
    assert "config.json is changed" in capsys.readouterr().err


def test_another_source(built: Any, tiny_model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert built.run("--model", str(tiny_model("tiny_llama"))) == 5
    assert "not the model that" in capsys.readouterr().err


def test_the_source_is_found_by_the_manifest(
    built: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the README has it: no --model for a local folder, wherever the command is run."""
    mine = built.copy(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    skipped = ("--skip", "speed", "--skip", "perplexity", "--no-plot")
    assert run.run_cli(run.main, [str(mine.out), *skipped]) == 0
    assert "parity rung 1" in capsys.readouterr().out


def test_a_source_that_has_gone(built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = built.copy(tmp_path / "out")
    manifest = json.loads((mine.out / "manifest.json").read_text())
    manifest["source"]["location"] = {"given": "gone", "path": str(tmp_path / "gone")}
    (mine.out / "manifest.json").write_text(json.dumps(manifest))
    assert run.run_cli(run.main, [str(mine.out), "--skip", "speed", "--no-plot"]) == 2
    assert f"no longer at {tmp_path / 'gone'}" in capsys.readouterr().err


def test_without_an_export(built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from compress.pipeline import compress_model
    from compress.recipe import Calibration, Recipe
    from compress.source.resolve import resolve

    compress_model(
        resolve(str(built.source)),
        Recipe(structure="dense", calibration=Calibration(sequence_length=64)),
        tmp_path / "out",
    )
    code = run.run_cli(run.main, [str(tmp_path / "out"), "--model", str(built.source), "--skip", "perplexity"])
    assert code == 5
    printed = capsys.readouterr().err
    assert "no complete onnx, which parity and speed need: run python -m export.build" in printed
    assert "parity rung" not in printed  # at once


def test_what_cannot_work_is_said_before_any_work(
    built: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def worked(*_: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(run, "_parity", worked)
    for flags, said in (
        (
            ("--sequence-length", "129"),
            "--sequence-length 129 is more than the 128 positions of the model: give 128 or less",
        ),
        (("--prefill", "129"), "--prefill 129 is more than the 128 positions of the model: give 128 or less"),
        (("--past", "126"), "--past 126 is more than half of the 128 positions of the model: give 64 or less"),
        (
            ("--sequence-length", "200", "--prefill", "300", "--past", "400"),
            "error: --sequence-length 200 is more than the 128 positions of the model: give 128 or less; "
            "--prefill 300 is more than the 128 positions of the model: give 128 or less; --past 400 is more than half",
        ),
        (("--dense", str(tmp_path / "nowhere")), "is not there: name an export"),
        (("--dense", str(tmp_path)), "has no model.onnx"),
        (("--data", str(tmp_path / "nowhere.txt")), "nowhere.txt"),
    ):
        assert built.run("--no-plot", *flags) == 2
        assert said in capsys.readouterr().err


def test_lengths_that_are_not_given_fit_the_model(
    built: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told in one line; those that are given are taken as they are."""
    seen: list[tuple[int, int, int]] = []

    def stop(baseline: object, args: Any, *_: object) -> None:
        seen.append((args.sequence_length, args.prefill, args.past))
        raise UsageError("far enough")

    monkeypatch.setattr(run, "_parity", stop)
    arguments = [str(built.out), "--model", str(built.source), "--no-plot", "--data", str(built.text)]
    assert run.run_cli(run.main, arguments) == 2
    told = "--sequence-length 128, --prefill 128, --past 64 in place of the defaults: the model has 128 positions"
    assert told in capsys.readouterr().err.splitlines()
    assert run.run_cli(run.main, [*arguments, "--prefill", "16", "--past", "8", "--sequence-length", "32"]) == 2
    assert "in place of" not in capsys.readouterr().err
    assert seen == [(128, 128, 64), (32, 16, 8)]


@pytest.mark.parametrize(("side", "lines"), [("dense", 1), ("compressed", 1), (None, 0)])
def test_a_model_that_is_worse_than_guessing_is_warned_of(
    side: str | None, lines: int, built: Any, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the console, in summary.md and in both forms of json: above the vocabulary, a figure compares nothing."""
    from validate.perplexity import scores

    compare = scores.compare

    def other(*args: Any) -> Any:
        found = compare(*args)
        sides = {name: dataclasses.replace(getattr(found, name), perplexity=100.0) for name in ("dense", "compressed")}
        if side is not None:
            sides[side] = dataclasses.replace(sides[side], perplexity=12_345_678.0)
        return dataclasses.replace(found, **sides)

    monkeypatch.setattr(scores, "compare", other)
    copy = built.copy(tmp_path / "out")
    flags = ("--skip", "parity", "--skip", "speed", "--no-plot", "--data", str(built.text))
    assert copy.run(*flags, "--json") == 0
    printed = capsys.readouterr()
    warned = [
        warning for warning in json.loads(printed.out)["quality"]["warnings"] if f"of the {side} model" in warning
    ]
    assert len(warned) == lines
    assert printed.err.count("is above the size of its vocabulary") == lines
    assert (copy.out / "reports" / "summary.md").read_text().count("**Warning**: the perplexity of") == lines
    assert len(json.loads((copy.out / "reports" / "quality.json").read_text())["warnings"]) == lines
    assert copy.run(*flags) == 0
    assert capsys.readouterr().out.count("warning: the perplexity of") == lines


def test_a_bfloat16_graph_is_for_a_gpu(
    built: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What TensorRT gets by default where float16 would overflow: no damage to report, and said at once."""
    import validate.graphfacts

    monkeypatch.setattr(validate.graphfacts, "graph_dtype", lambda path: "bfloat16")
    assert built.run("--no-plot") == 2
    assert "is in bfloat16, which ONNX Runtime does not run on the CPU: give --gpu" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["validate.run", "validate.speed.__main__"])
def test_help_imports_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, {module} as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m" in done.stdout


@pytest.mark.parametrize("flags", [("--skip", "speed"), ("--skip", "parity", "--skip", "perplexity", "--dense")])
def test_a_disk_that_is_full_while_validating(
    flags: tuple[str, ...], built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the folded source or the plots are written: one sentence with the place in OUT, which is left as it was."""
    copy = built.copy(tmp_path / "out")
    if flags[-1] == "--dense":
        flags = (*flags, str(copy.out / "onnx"))
    before = sorted(copy.out.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        assert copy.run(*([] if "perplexity" in flags else ["--data", str(copy.text)]), *flags) == 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: File too large: '{copy.out}/.")
    assert [path for path in sorted(copy.out.rglob("*")) if path.name != ".lock"] == before
