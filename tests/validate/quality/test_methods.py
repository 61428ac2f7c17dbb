"""The methods of the quality table: recipes, and which of them a command asks for."""

from __future__ import annotations

from typing import Any

import pytest

from compress.errors import UsageError
from compress.recipe import Recipe, parse_recipe
from validate.quality import methods as registered
from validate.quality.methods import BARS, METHODS, Method, calibration_lines, lines

CALIBRATION = {"data": "boolq", "samples": 128, "sequence_length": 1024}


def test_every_method_is_a_recipe_or_says_why_not() -> None:
    """Fields are those of the recipe: a misspelt one would otherwise fail hours into a run."""
    fields = set(Recipe.model_fields)
    for method in METHODS:
        assert set(method.recipe) <= fields, method.name
        assert all(0 < ratio <= 1 for ratio in method.ratios)
    assert len({method.name for method in METHODS}) == len(METHODS)
    found = lines(CALIBRATION, ablation=True)
    for line in found:
        parse_recipe(line.recipe, line.key)
    keys = {line.key for line in found}
    assert {bar.key for bar in BARS} | {bar.against for bar in BARS if bar.against} <= keys


def keys_of(names: list[str], **options: Any) -> list[str]:
    return [line.key for line in lines(CALIBRATION, names=names, **options)]


def test_lines() -> None:
    keys = [line.key for line in lines(CALIBRATION)]
    assert keys[:4] == ["dense", "auto-0.75", "auto-0.85", "auto-0.9375"]
    assert not any(line.group == "ablation" for line in lines(CALIBRATION))
    assert keys_of(["kron", "auto-0.85"]) == ["dense", "auto-0.85", "kron-0.75"]
    assert keys_of(["kron", "gs-0.9"], ratios=[0.5, 0.6]) == ["dense", "kron-0.5", "kron-0.6", "gs-0.9"]
    assert keys_of(["auto-0.678", "auto", "auto-.75"])[1:] == ["auto-0.678", "auto-0.75", "auto-0.85", "auto-0.9375"]
    assert keys_of(["kron-paper-0.96", "dense"]) == ["dense", "kron-paper-0.96"]
    ablation = [line.key for line in lines(CALIBRATION, names=["no-inner-0.5", "auto-0.678"], ablation=True)]
    assert ablation[:2] == ["dense", "auto-0.678"]
    assert "no-inner-0.5" in ablation
    assert "no-inner-0.75" not in ablation
    assert "no-metric-0.75" in ablation
    [_, line] = lines(CALIBRATION, names=["svd-llm"])
    assert line.recipe["calibration"] == CALIBRATION
    assert (line.recipe["ratio"], line.recipe["allocation"]) == (0.75, "uniform")
    assert lines(CALIBRATION, names=["kron-0.6"])[1].recipe["ratio"] == 0.6


@pytest.mark.parametrize("name", ["svd", "svd-0.7", "kron-", "kron-0", "kron-1.5", "kron-x", "dense-0.5", ""])
def test_what_is_no_method(name: str) -> None:
    with pytest.raises(UsageError, match=f"no method '{name}'"):
        lines(CALIBRATION, names=[name])


def test_an_ablation_that_changes_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"structure": "kron", "correction": 0.0}
    methods = (
        METHODS[0],
        Method("no-correction", "", {**best, "correction": 0.0}, group="ablation"),
        Method("no-ties", "", {**best, "ties": False}, group="ablation"),
    )
    monkeypatch.setattr(registered, "BEST", best)
    monkeypatch.setattr(registered, "METHODS", methods)
    assert [line.key for line in lines(CALIBRATION, ablation=True)] == ["dense", "no-ties-0.75"]
    assert [line.key for line in lines(CALIBRATION, names=["no-correction"])] == ["dense", "no-correction-0.75"]


def test_calibration_lines() -> None:
    found = calibration_lines(CALIBRATION, "kron", ["boolq", "a/b.txt"], [4, 8])
    assert [line.key for line in found] == [f"calibration-{s}-{n}" for s in ("boolq", "a-b-txt") for n in (4, 8)]
    assert found[-1].recipe["calibration"] == {"data": "a/b.txt", "samples": 8, "sequence_length": 1024}
    assert {line.group for line in found} == {"calibration"}
