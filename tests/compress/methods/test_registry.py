"""Methods by name: each that the catalogue names is there, and one more is one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress import catalog
from compress.checkpoint.reader import CheckpointReader
from compress.errors import UsageError
from compress.methods import registry
from compress.methods.planned import Planned
from compress.recipe import read_written
from compress.run import main, parser
from tests.compress.helpers import TinyModel, text_file
from tests.data import toy_method


def test_every_method_of_the_catalogue_is_there_and_no_other() -> None:
    named = {variant.method for entry in catalog.entries() for variant in entry.variants}
    assert named == set(registry.names())


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="there is a method 'planned' already"):
        registry.register(Planned())


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy method, for one test."""
    monkeypatch.setattr(catalog, "_ENTRIES", list(catalog.entries()))
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    toy_method.add()


def test_a_method_is_added_in_one_file(
    toy: None, tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """tests/data/toy_method.py, through the command: choices and help, forecast, refusals, checkpoint, recipe."""
    assert "mlp-rank: low rank in the MLPs alone" in " ".join(parser().format_help().split())
    words = ["--model", str(tiny_model("tiny_llama")), "--structure", "mlp-rank", "--out", str(tmp_path / "out")]
    words += ["--calibration-data", str(text_file(tmp_path)), "--calibration-samples", "4", "--sequence-length", "32"]
    assert main([*words, "--dry-run", "--json"]) == 0
    forecast = json.loads(capsys.readouterr().out)
    assert forecast["structure"] == "mlp-rank"
    for wrong, says in (
        (["--ratio", "0.1"], "--ratio 0.1 is too low: attention, which stays dense"),
        (["--rotation", "shared"], "structure 'mlp-rank' with rotation 'shared': low rank is the same"),
        (["--budget-latency", "1"], "budget_latency with structure 'mlp-rank'"),
    ):
        with pytest.raises(UsageError, match=says):
            main([*words, *wrong])
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["structured_linears"], result["dense_linears"]) == (9, 12)
    assert 0.6 < result["ratio"] <= 0.75
    reader = CheckpointReader(tmp_path / "out" / "checkpoint")
    kinds = {linear.split(".", 2)[2]: reader.structure(linear).name for linear in reader.linears()}
    assert {role for role, kind in kinds.items() if kind == "lowrank"} == {"mlp.gate", "mlp.up", "mlp.down"}
    assert read_written(tmp_path / "out" / "recipe.yaml").structure == "mlp-rank"


def test_it_is_gone_again() -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--model", "m", "--structure", "mlp-rank"])
