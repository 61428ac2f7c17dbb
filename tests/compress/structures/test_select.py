"""Selections of inner features, with and without a structure of their own between the features that stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import ArtifactError, UsageError
from compress.linalg import weighted_error
from compress.structures import (
    KroneckerStructure,
    LowRankStructure,
    PivotedStructure,
    SelectStructure,
    Structure,
    structure_from_config,
)
from compress.structures.select import with_core
from tests.compress.structures.battery import StructureBattery, random_factors, random_weight, second_moment

Draw = Callable[[st.SearchStrategy[Any]], Any]


@st.composite
def selections(draw: Draw) -> Structure:
    groups, size, other = draw(st.integers(1, 3)), draw(st.integers(2, 4)), draw(st.integers(2, 6))
    kept, side = draw(st.integers(1, size)), draw(st.sampled_from(["in", "out"]))
    m, n = (groups * size, other) if side == "in" else (other, groups * size)
    return SelectStructure(m, n, kept, groups, side)


@st.composite
def structured_selections(draw: Draw) -> Structure:
    """Around a low rank, or around leading coordinates of the stream: both have exact fits."""
    plain = draw(selections())
    reduced = plain.reduced
    n, m = reduced.out_features, reduced.in_features
    kind = draw(st.sampled_from(["lowrank", "pifa", "kron"]))
    if kind == "pifa" and n > 1:
        return with_core(plain, PivotedStructure(m, n, draw(st.integers(1, min(n - 1, m)))))
    if kind != "kron":
        return with_core(plain, LowRankStructure(m, n, draw(st.integers(1, min(n, m)))))
    side = "out" if plain.side == "in" else "in"
    stream = n if side == "out" else m
    kept = draw(st.integers(1, min(n, m)))
    return with_core(plain, KroneckerStructure(m, n, stream, kept, side, "leading"))


def least_squares(spec: SelectStructure, W: Tensor, gram: Tensor | None, metric: Tensor | None) -> float:
    """The error of the best dense core, by `lstsq` on square roots of the moments."""

    def root(moment: Tensor | None, size: int) -> Tensor:
        return torch.eye(size, dtype=W.dtype) if moment is None else torch.linalg.cholesky(moment)

    inner, outer = root(gram, W.shape[1]), root(metric, W.shape[0])
    whole = outer.T @ W @ inner
    stay = spec.features()
    if spec.side == "in":
        basis, target = inner[stay].T, whole.T
    else:
        basis, target = outer.T[:, stay], whole
    rest = target - basis @ torch.linalg.lstsq(basis, target, driver="gelsd").solution
    return float(rest.square().sum())


class TestSelect(StructureBattery):
    structure = SelectStructure
    exact = True

    def specs(self) -> st.SearchStrategy[Structure]:
        return selections()

    def reference_error(self, spec: Structure, W: Tensor, gram: Tensor | None, metric: Tensor | None) -> float:
        assert isinstance(spec, SelectStructure)
        return least_squares(spec, W, gram, metric)


class TestSelectAroundACore(StructureBattery):
    structure = SelectStructure
    exact = True

    def specs(self) -> st.SearchStrategy[Structure]:
        return structured_selections()

    def reference_error(self, spec: Structure, W: Tensor, gram: Tensor | None, metric: Tensor | None) -> float:
        """The core fitted to the features that stay, with nothing made up for those that were dropped."""
        assert isinstance(spec, SelectStructure)
        stay = spec.features()
        if spec.side == "in":
            part, gram_part, metric_part = W[:, stay], None if gram is None else gram[stay][:, stay], metric
        else:
            part, gram_part, metric_part = W[stay], gram, None if metric is None else metric[stay][:, stay]
        return weighted_error(W, spec.dense(spec.reduced.fit(part, gram_part, metric_part)), gram, metric)


def test_dropped_features_are_zeros_and_are_not_read() -> None:
    out = SelectStructure(4, 6, kept=2, groups=2, side="out")
    assert out.features().tolist() == [0, 1, 3, 4]
    y = out.apply(random_factors(out), torch.ones(3, 4, dtype=torch.float64))
    assert bool((y[:, [2, 5]] == 0).all())
    assert bool((y[:, [0, 1, 3, 4]] != 0).all())
    x = torch.zeros(1, 6)
    x[:, [2, 5]] = torch.inf
    inside = SelectStructure(6, 4, kept=2, groups=2, side="in")
    assert bool((inside.apply({"weight": torch.ones(4, 4)}, x) == 0).all())


def test_bias_of_dropped_features_is_dropped() -> None:
    bias = torch.arange(1.0, 7.0)
    assert SelectStructure(4, 6, kept=2, groups=2, side="out").kept_bias(bias).tolist() == [1, 2, 0, 4, 5, 0]
    assert torch.equal(SelectStructure(4, 6, kept=2, groups=2, side="in").kept_bias(bias), bias)


def test_what_dropping_costs_does_not_depend_on_the_core() -> None:
    """The split that makes the fit exact: total error = error of the core in G_SS + what dropping costs."""
    plain = SelectStructure(9, 5, kept=2, groups=3, side="in")
    W, gram, metric = random_weight(plain), second_moment(9, 1), second_moment(5, 2)
    whole = weighted_error(W, plain.dense(plain.fit(W, gram, metric)), gram, metric)
    stay = plain.features()
    ideal = plain.fit(W, gram, metric)["weight"]
    for rank in (1, 2, 4):
        spec = with_core(plain, LowRankStructure(6, 5, rank))
        factors = spec.fit(W, gram, metric)
        core = weighted_error(ideal, spec.reduced.dense(factors), gram[stay][:, stay], metric)
        assert weighted_error(W, spec.dense(factors), gram, metric) == pytest.approx(whole + core, rel=1e-10)


def test_costs_are_those_of_the_kept_features() -> None:
    spec = SelectStructure(64, 12, kept=3, groups=4, side="in")
    assert spec.parameter_count() == 12 * 12
    assert spec.macs(5) == 5 * 12 * 12
    assert spec.bytes(torch.float16) == 2 * 12 * 12
    assert with_core(spec, LowRankStructure(12, 12, 2)).parameter_count() == 2 * 24


def test_a_core_is_part_of_the_config() -> None:
    spec = with_core(SelectStructure(6, 8, 2, 2, "in"), KroneckerStructure(4, 8, 4, 3, side="out"))
    config = spec.to_config()
    assert config["core"] == {
        "structure": "kron", "in_features": 4, "out_features": 8, "blocks": 4, "terms": 3, "side": "out",
        "mix": "explicit",
    }  # fmt: skip
    assert structure_from_config(config) == spec
    assert "core" not in SelectStructure(6, 8, 2, 2, "in").to_config()
    for wrong in ({"structure": "kron"}, "dense", {}, {**config["core"], "in_features": 6}):
        with pytest.raises(ArtifactError):
            structure_from_config({**config, "core": wrong})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": 5}, "above the 4"),
        ({"kept": 0}, "at least 1"),
        ({"groups": 5}, "does not divide 12"),
        ({"side": "both"}, "in or out"),
        ({"core": LowRankStructure(12, 8, 2)}, "must be 8 x 6"),
    ],
    ids=str,
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SelectStructure(12, 8, kept=2, groups=3), **changes)


def test_menu_by_head() -> None:
    menu = SelectStructure.menu(64, 48, "out", unit=4, groups=4)  # o: writes the stream, reads 4 heads of 16
    assert [(s.kept, s.groups, s.side) for s in menu] == [(4, 4, "in"), (8, 4, "in"), (12, 4, "in")]
