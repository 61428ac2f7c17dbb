"""Gates parse strictly and judge strictly."""

from __future__ import annotations

import math

import pytest

from compress.errors import UsageError
from validate.gates import Gate, failures, parse_batch_sizes, parse_ppl_increase, parse_speedup


@pytest.mark.parametrize(
    ("text", "limit"),
    [("5%", 0.05), ("0.05", 0.05), ("1.05x", 0.05), (".5%", 0.005), ("0%", 0.0), ("150%", 1.5), ("2x", 1.0)],
)
def test_increase(text: str, limit: float) -> None:
    assert parse_ppl_increase(text) == pytest.approx(limit, abs=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "1",
        "-5%",
        "+5%",
        "5 %",
        "5%%",
        "0.9x",
        "five",
        "nan",
        "inf",
        "1e-2",
        "0x10",
        "5%x",
        "0,05",
        "\u0665%",
    ],
)
def test_increase_refused(text: str) -> None:
    with pytest.raises(UsageError, match="max-ppl-increase"):
        parse_ppl_increase(text)


@pytest.mark.parametrize(("text", "limit"), [("1", 1.0), ("1.0", 1.0), ("1.2x", 1.2), (".5", 0.5)])
def test_speedup(text: str, limit: float) -> None:
    assert parse_speedup(text) == limit


@pytest.mark.parametrize("text", ["", "0", "0.0x", "-1", "120%", "nan", "inf", "1e3", "1.2.3", "x", "9" * 400])
def test_speedup_refused(text: str) -> None:
    with pytest.raises(UsageError, match="min-speedup"):
        parse_speedup(text)


def test_batch_sizes() -> None:
    assert parse_batch_sizes("1,8") == (1, 8)


@pytest.mark.parametrize("text", ["", "0", "1,", ",1", "1,1", "1 8", "-1", "1.0", "a"])
def test_batch_sizes_refused(text: str) -> None:
    with pytest.raises(UsageError, match="batch-sizes"):
        parse_batch_sizes(text)


def test_a_gate_holds_at_its_limit_and_not_past_it() -> None:
    assert Gate("max-ppl-increase", 0.05, 0.05, percent=True).passed
    assert not Gate("max-ppl-increase", 0.0501, 0.05, percent=True).passed
    assert Gate("min-speedup", 1.0, 1.0, at_least=True).passed
    assert not Gate("min-speedup", 0.999, 1.0, at_least=True).passed


@pytest.mark.parametrize("at_least", [True, False])
def test_nan_never_passes(at_least: bool) -> None:
    gate = Gate("g", math.nan, 1.0, at_least=at_least)
    assert not gate.passed
    assert gate.to_dict()["value"] == "nan"


def test_failure_sentences() -> None:
    gates = [
        Gate("max-ppl-increase", 0.0731, 0.05, percent=True),
        Gate("min-speedup", 0.97, 1.0, at_least=True),
        Gate("parity rung 1", 1e-6, 1e-4),
    ]
    assert failures(gates) == ["max-ppl-increase: 7.31% > 5%", "min-speedup: 0.97 < 1"]
