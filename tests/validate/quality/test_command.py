"""The quality command: what is run once and kept, what a failure does, what it costs, what is written where."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.cli.entry import run_cli
from tests import tiny
from tests.validate.perplexity.windows import windows_of
from validate import measure
from validate.quality import __main__ as quality
from validate.quality import methods as quality_methods
from validate.quality import plots as quality_plots
from validate.quality import run as quality_run
from validate.quality import table as quality_table
from validate.quality.methods import METHODS, Bar, Method
from validate.report.markdown import marks

FAST = {"sensitivity": "none", "correction": 0.0, "unit": 4, "rotation": "none"}
TINY_METHODS = (
    METHODS[0],
    Method("lowrank", "low rank", {"structure": "lowrank", **FAST}, (0.75, 0.9)),
    Method("refused", "not a recipe", {"structure": "lowrank", "rotation": "block", "skip": "none"}),
    Method("textless", "no such text", {"structure": "lowrank", **FAST, "calibration": {"data": "nowhere.txt"}}),
)


# --- The command ---


@dataclass(frozen=True)
class Table:
    out: Path
    arguments: tuple[str, ...]
    code: int

    def run(self, *flags: str) -> int:
        return run_cli(quality.main, [*self.arguments, *flags])

    def result(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.out / "quality.json").read_text())
        return value


def run_here(command: list[str], printed: list[str]) -> int:
    """The command in this process: importing torch anew takes longer than all that the tiny models do."""
    with contextlib.redirect_stderr(io.StringIO()) as stream, contextlib.redirect_stdout(io.StringIO()):
        code = measure.main(command[command.index("validate.measure") + 1 :])
    printed += [text for text in stream.getvalue().splitlines() if text]
    return code


@pytest.fixture(scope="module")
def methods() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_run, "_run", run_here)
        patch.setattr(quality_methods, "METHODS", TINY_METHODS)
        patch.setattr(quality_table, "BARS", (Bar("low", "lowrank-0.75", "x_dense", 1e9),))
        yield patch


@pytest.fixture(scope="module")
def table(methods: Any, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Table:
    """All tiny methods run once; two of them fail."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("quality")
    text, out = root / "text.txt", root / "out"
    text.write_text(tiny.TEXT, encoding="utf-8")
    arguments = (
        *("--model", str(tiny_model("tiny_llama_tied")), "--out", str(out), "--data", str(text)),
        *("--calibration-data", str(text), "--calibration-samples", "4", "--sequence-length", "64", "--window", "64"),
    )
    return Table(out, arguments, run_cli(quality.main, arguments))


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("this was to be kept")

    for name in names:
        monkeypatch.setattr(quality_run, name, refuse)


def test_a_method_that_fails_is_a_row(table: Table) -> None:
    assert table.code == 1
    rows = {row["key"]: row for row in table.result()["rows"]}
    assert list(rows) == ["dense", "lowrank-0.75", "lowrank-0.9", "refused-0.75", "textless-0.75"]
    assert "is not a valid recipe" in rows["refused-0.75"]["error"]
    assert rows["textless-0.75"]["error"].startswith("compress.run exit 2: the text file 'nowhere.txt'")
    assert all(rows[key]["error"] is None for key in ("dense", "lowrank-0.75", "lowrank-0.9"))
    text = (table.out / "quality.md").read_text()
    assert "| not a recipe | 0.75 | **failed**: " in text


def test_figures_of_the_rows(table: Table) -> None:
    rows = {row["key"]: row for row in table.result()["rows"]}
    dense, small, large = rows["dense"], rows["lowrank-0.75"], rows["lowrank-0.9"]
    assert (dense["x_dense"], dense["top1"], dense["kept"]) == (1, 1, 1)
    assert dense["kl"] == pytest.approx(0, abs=1e-6)
    assert small["x_dense"] == pytest.approx(small["perplexity"] / dense["perplexity"])
    assert small["kept"] <= 0.75 < large["kept"] <= 0.9
    assert small["kl"] > large["kl"] > 0
    for name in ("projection_bytes", "model_bytes", "bytes_per_token", "macs_per_token"):
        assert small[name] < large[name] < dense[name]
    assert small["projection_bytes"] / dense["projection_bytes"] == pytest.approx(small["kept"], abs=1e-3)
    config = json.loads((table.out / "dense" / "checkpoint" / "config.json").read_text())
    assert dense["model_bytes"] - dense["projection_bytes"] >= 2 * config["vocab_size"] * config["hidden_size"]
    assert small["cost"]["complete"]
    assert small["cost"]["seconds"] > 0
    assert small["cost"]["peak_bytes"] > 50e6  # torch alone takes more


def test_the_second_run_computes_nothing(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    before = table.result()
    forbid(monkeypatch, "_run", "compare", "fill_hidden", "load_model")
    assert table.run("--methods", "lowrank") == 0
    after = table.result()
    assert after["rows"] == before["rows"][:3]


def test_what_failed_is_tried_again(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[list[str]] = []
    monkeypatch.setattr(quality_run, "_run", lambda command, printed: tried.append(command) or 1)
    assert table.run("--methods", "textless,lowrank") == 1
    assert len(tried) == 1
    assert table.result()["rows"][-1]["error"] == "compress.run exit 1: it printed nothing"


def test_another_protocol_is_measured_with_the_same_checkpoints(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, "_run")
    first = table.result()["rows"][1]
    assert table.run("--methods", "lowrank-0.75", "--max-windows", "2") == 0
    second = table.result()["rows"][1]
    assert second["perplexity"] != first["perplexity"]
    assert second["cost"] == first["cost"]
    assert len(list((table.out / "lowrank-0.75" / "reports").glob("quality-*.json"))) >= 2
    forbid(monkeypatch, "compare")
    assert table.run("--methods", "lowrank-0.75") == 0  # and the first figures are still there
    assert table.result()["rows"][1] == first


def test_bfloat16_says_how_far_it_is_from_float32(table: Table) -> None:
    assert table.run("--methods", "lowrank-0.75", "--eval-dtype", "bfloat16", "--max-windows", "3") == 0
    both = table.result()["rows"][0]["float32"]
    assert both["dense"]["windows"] == 3
    assert 0 < abs(both["relative_increase"]) < 0.02
    text = (table.out / "quality.md").read_text()
    assert f"on the first 3 windows the dense model's perplexity is {both['compressed']['perplexity']:.4f}" in text


def test_check(table: Table, methods: Any, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--methods", "lowrank-0.75", "--check")
    assert table.run(*flags) == 0
    methods.setattr(
        quality_table, "BARS", (Bar("low", "lowrank-0.75", "x_dense", 0.01), Bar("other", "auto-0.75", "x_dense", 2))
    )
    assert table.run(*flags) == 3
    printed = capsys.readouterr()
    assert "FAILED low: " in printed.err
    assert "FAILED other: not run" in printed.err
    assert "| other |  | 2 | not run |" in printed.out
    assert table.run("--methods", "lowrank-0.75") == 0  # nobody asked
    methods.setattr(quality_table, "BARS", (Bar("low", "lowrank-0.75", "x_dense", 1e9),))


def test_no_folder_of_this_machine_in_the_results(table: Table) -> None:
    for name in ("quality.md", "quality.json"):
        assert str(table.out.parent) not in (table.out / name).read_text()


def test_json(table: Table, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.run("--methods", "lowrank-0.75", "--json") == 0
    assert json.loads(capsys.readouterr().out) == table.result()


def test_the_tables_go_into_a_document(table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Between its marks alone, with the figures beside it; a document without marks is refused before any work."""
    begin, end = marks(quality.MARK)
    file = tmp_path / "quality.md"
    file.write_text("no marks\n")
    assert table.run("--methods", "lowrank-0.75", "--write-docs", str(file)) == 2
    assert "no single pair" in capsys.readouterr().err
    file.write_text(f"# Quality\n\nby hand\n\n{begin}\nold\n{end}\n\nafter\n")
    assert table.run("--methods", "lowrank-0.75", "--write-docs", str(file)) == 0
    text = file.read_text()
    assert text.startswith(f"# Quality\n\nby hand\n\n{begin}\n")
    assert text.endswith(f"{end}\n\nafter\n")
    assert "### Methods" in text
    assert "old" not in text
    assert "--write-docs" not in text
    assert json.loads(file.with_suffix(".json").read_text()) == table.result()


def test_known_lines_are_taken_as_they_are(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same recipe and evaluation; they say where they were measured. Others are refused, or measured."""
    assert table.run("--methods", "lowrank-0.75") == 0
    before = table.result()
    for row in before["rows"]:
        row["processor"] = "Another CPU"
    file = tmp_path / "known.json"
    file.write_text(json.dumps(before))
    with monkeypatch.context() as patch:
        forbid(patch, "_run", "compare", "fill_hidden", "load_model")
        assert table.run("--methods", "lowrank-0.75", "--known", str(file), "--out", str(tmp_path / "empty")) == 0
    found = json.loads((tmp_path / "empty" / "quality.json").read_text())
    assert found["rows"] == before["rows"]
    assert "Measured on another machine (Another CPU): " in (tmp_path / "empty" / "quality.md").read_text()
    recipe, before["rows"][1]["recipe"] = before["rows"][1]["recipe"], {"structure": "another"}
    file.write_text(json.dumps(before))
    assert table.run("--methods", "lowrank-0.75", "--known", str(file)) == 0
    assert [row["processor"] == "Another CPU" for row in table.result()["rows"]] == [False, False]
    assert table.run("--methods", "lowrank", "--known", str(file)) == 0
    assert not any(row["processor"] == "Another CPU" for row in table.result()["rows"])
    before["rows"][1]["recipe"] = recipe
    file.write_text(json.dumps(before))
    assert table.run("--methods", "lowrank", "--known", str(file)) == 0
    assert [row["processor"] == "Another CPU" for row in table.result()["rows"]] == [False, True, False]
    capsys.readouterr()
    assert table.run("--methods", "lowrank-0.75", "--known", str(file), "--max-windows", "2") == 2
    assert "of another model, text or evaluation" in capsys.readouterr().err
    file.write_text("{}")
    assert table.run("--methods", "lowrank-0.75", "--known", str(file)) == 2
    assert "is no quality.json" in capsys.readouterr().err


def test_extra_arguments_reach_every_compression(table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], printed: list[str]) -> int:
        commands.append(command)
        printed.append("error: not today")
        return 4

    monkeypatch.setattr(quality_run, "_run", run)
    arguments = [*table.arguments, "--out", str(tmp_path / "other"), "--compress-arg=--calibration-batch=3"]
    assert run_cli(quality.main, arguments) == 2  # dense itself fails
    assert [command[-1] for command in commands] == ["--calibration-batch=3"]


def test_extra_arguments_that_change_the_recipe_are_refused(table: Table, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--methods", "lowrank", "--ratios", "0.8", "--compress-arg=--seed=7")
    assert table.run(*flags) == 1
    assert "change the recipe" in table.result()["rows"][1]["error"]


def test_tasks_are_scored_once(table: Table, methods: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from validate.tasks.data import Example, Task

    questions = [Example((("The mill", " stands"), ("The mill", " is loud")), 0, (6, 7))] * 3
    monkeypatch.setattr(Task, "load", lambda self, limit=None: questions[:limit])
    monkeypatch.setattr(quality, "BEST_KEY", "lowrank-0.75")
    flags = ("--methods", "lowrank-0.75", "--tasks", "piqa", "--task-limit", "2")
    assert table.run(*flags) == 0
    first = table.result()["tasks"]
    assert set(first) == {"dense", "lowrank-0.75"}
    assert first["dense"]["piqa"]["questions"] == 2
    assert "Dense and `lowrank-0.75`" in (table.out / "quality.md").read_text()
    forbid(monkeypatch, "load_model")
    assert table.run(*flags) == 0
    assert table.result()["tasks"] == first


def test_sensitivity_plot(table: Table, tmp_path: Path) -> None:
    flags = ("--sensitivity-method", "lowrank", "--sensitivity-sizes", "2,4", "--methods", "dense")
    text = table.arguments[table.arguments.index("--data") + 1]
    path = tmp_path / "plot.png"
    assert table.run(*flags, "--sensitivity-sources", text, "--sensitivity-plot", str(path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    series = quality_plots.calibration_series(table.result()["rows"])
    assert [size for size, _, _ in series["text.txt"]] == [2, 4]
    text = (table.out / "quality.md").read_text()
    assert "## Calibration text and its size" in text
    assert "## Bars" not in text  # none of their lines ran


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing"),
        (["--model", "x", "--methods", "nope"], "no method 'nope'"),
        (["--model", "x", "--ratios", "0.7,x"], "not a list of numbers"),
        (["--model", "x", "--ratios", "1.5"], "at most 1"),
        (["--model", "x", "--max-windows", "0"], "--max-windows"),
        (["--model", "x", "--tasks", "nope"], "no task 'nope'"),
    ],
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(quality.main, arguments) == 2
    assert message in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(quality.main, ["--list"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("dense ")
    assert run_cli(quality.main, ["--list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["key"] == "dense"


# --- Costs ---


def bench(out: Path) -> quality_run.Bench:
    return quality_run.Bench("m", None, out, {}, windows_of(64, 16))  # type: ignore[arg-type]


def attempt(seconds: float | None, resumed: bool) -> dict[str, Any]:
    return {"seconds": seconds, "peak_bytes": None if seconds is None else int(seconds), "resumed": resumed}


@pytest.mark.parametrize(
    ("attempts", "seconds", "complete"),
    [
        ([], None, False),
        ([attempt(5, False)], 5, True),
        ([attempt(9, False), attempt(5, False), attempt(2, True)], 7, True),
        ([attempt(None, False), attempt(2, True)], 2, False),  # the first part was killed
        ([attempt(2, True)], 2, False),
    ],
)
def test_cost_is_that_of_all_attempts(
    tmp_path: Path, attempts: list[Any], seconds: float | None, complete: bool
) -> None:
    (tmp_path / "costs").mkdir()
    (tmp_path / "costs" / "x.json").write_text(json.dumps(attempts))
    cost = bench(tmp_path).cost("x")
    assert (cost["seconds"], cost["complete"]) == (seconds, complete)


def test_measured_command(tmp_path: Path) -> None:
    """In a process of its own, whose stderr is passed on and kept."""
    facts, printed = tmp_path / "facts.json", []
    command = [sys.executable, "-m", "validate.measure", str(facts), "compress.run"]
    assert quality_run._run([*command, "--model", "nowhere", "--out", str(tmp_path / "x")], printed) == 2
    assert "nowhere" in printed[-1]
    found = json.loads(facts.read_text())
    assert found["exit_code"] == 2
    assert 0 < found["seconds"] < 600
    assert found["peak_bytes"] > 10e6
