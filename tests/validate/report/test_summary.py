"""The summary on stdout and the plots: every figure in its place, whatever parts were skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from validate.report.console import console
from validate.report.plots import plot_frontier, plot_layers, roles_of
from validate.report.summary import Report, _fit_text, with_shares

SIZE = {
    "ratio": 0.75,
    "model_ratio": 0.8,
    "dense_parameters": 2_000_000,
    "parameters": 1_600_000,
    "structured_linears": 3,
    "dense_linears": 1,
}
QUALITY = {
    "data": {"name": "text.txt"},
    "protocol": {"windows": 4, "window": 64},
    "dense": {"perplexity": 17.5},
    "compressed": {"perplexity": 21.25},
    "relative_increase": 0.2143,
    "warnings": [],
}


def record(name: str, parameters: int, error: float, structure: str = "pifa") -> dict[str, Any]:
    return {
        "name": name,
        "structure": structure,
        "parameters": parameters,
        "dense_parameters": 100,
        "relative_error": error,
    }


FIT = [
    record("layers.0.mlp.down", 50, 0.4),
    record("layers.0.attn.q", 25, 0.2),
    record("layers.1.mlp.down", 80, 0.1),
    record("layers.1.attn.q", 100, 0.0, "dense"),
]


def case(name: str, speedup: float) -> dict[str, Any]:
    return {
        "name": name,
        "speedup": speedup,
        "limit": 1.25,
        "limit_by": "bytes",
        "share_of_limit": speedup / 1.25,
        "tokens_per_second_dense": 50.0,
        "tokens_per_second_compressed": 50.0 * speedup,
    }


SPEED = {
    "runtime": "ONNX Runtime",
    "threads": 1,
    "cases": [case("decode, batch 1", 1.2), case("prefill of 512 tokens", 1.1)],
    "peak_memory": {"dense": {"peak": 2_000_000_000}, "compressed": {"peak": 1_700_000_000}},
}


def report(**parts: Any) -> Report:
    recipe = {"structure": "auto", "rotation": "none", "ratio": 0.75}
    return Report("a-model", {"family": "llama", "source": {}}, recipe, SIZE, FIT, [], {}, **parts)


def test_dense_and_compressed_stand_side_by_side() -> None:
    rung = {"number": 1, "title": "one vs other", "value": 1e-6, "tolerance": 1e-4, "passed": False}
    text = console(report(quality=QUALITY, speed=SPEED, parity=[rung]))
    lines = {line.partition("  ")[0]: line.split() for line in text.splitlines()}
    assert text.startswith("a-model (llama), compressed: auto, rotation none\n")
    assert lines["parameters"][1:5] == ["2.0", "M", "1.6", "M"]
    assert lines["perplexity"][1:4] == ["17.500", "21.250", "+21.43%"]
    assert lines["decode, batch 1"][3:8] == ["50.0", "tok/s", "60.0", "tok/s", "1.200x"]
    assert lines["peak memory"][2:] == ["2,000.0", "MB", "1,700.0", "MB", "85.0%"]
    assert lines["attn.q"][1:] == ["############........", "62%", "0.100", "0.200", "1", "of", "2"]
    assert lines["mlp.down"][1:] == ["#############.......", "65%", "0.250", "0.400", "0", "of", "2"]
    assert "1.00e-06 (tolerance 0.0001) FAILED: one vs other" in text
    assert text.isascii()


def test_what_was_skipped_has_no_line() -> None:
    text = console(report())
    assert "perplexity" not in text
    assert "decode" not in text
    assert "parity" not in text
    assert "mlp.down" in text


def test_a_failed_fit_is_named() -> None:
    failed = Report("m", {"family": "opt", "source": {}}, report().recipe, SIZE, [{**FIT[0], "failed": True}], [], {})
    assert "failed fits: layers.0.mlp.down" in console(failed)


def test_huge_perplexities_are_readable_and_warned_of() -> None:
    sides = {"dense": {"perplexity": 12_345_678_901.2}, "compressed": {"perplexity": 9.87e14}}
    quality = {**QUALITY, **sides, "relative_increase": 79_946.0, "warnings": ["it is worse than guessing"]}
    text = console(Report("m", {"family": "opt", "source": {}}, report().recipe, SIZE, FIT, [], {}, quality=quality))
    [line] = [line for line in text.splitlines() if line.startswith("perplexity")]
    assert line.split()[1:3] == ["1.235e+10", "9.870e+14"]
    assert "7.99e+04 times on" in line
    assert text.splitlines()[-1] == "warning: it is worse than guessing"


def test_linears_that_share_a_factor_have_one_share() -> None:
    """The leader stores V of both: 104 % and 41 % are 72.5 % of the two."""
    pair = [record("layers.0.attn.q", 104, 0.3), record("layers.0.attn.k", 41, 0.3), record("layers.1.attn.q", 60, 0.1)]
    fit = with_shares(pair, {"layers.0.attn.k": "layers.0.attn.q"})
    assert [r["kept"] for r in fit] == [0.725, 0.725, 0.6]
    assert [r["parameters"] for r in fit] == [104, 41, 60]
    shared = Report("m", {"family": "llama", "source": {}}, report().recipe, SIZE, fit, [], {})
    text = _fit_text(shared, plot=False)
    assert "| layers.0.attn.q | pifa | 72.5% | 0.3000 |" in text
    assert text.endswith("\n\nLinears that share a factor are told what all of them together keep.")
    assert "share" not in _fit_text(report(), plot=False)


def test_roles_come_in_the_order_of_a_block() -> None:
    roles = roles_of(FIT)
    assert list(roles) == ["attn.q", "mlp.down"]
    assert [(r["block"], r["kept"]) for r in roles["mlp.down"]] == [(0, 0.5), (1, 0.8)]


@pytest.mark.parametrize("speed", [None, SPEED], ids=["size alone", "size and speed"])
def test_plots_are_drawn(speed: dict[str, Any] | None, tmp_path: Path) -> None:
    plot_layers(FIT, tmp_path / "layers.png", "a-model")
    plot_layers(FIT[3:], tmp_path / "dense.png", "nothing approximated")
    plot_frontier(SIZE, QUALITY, speed, tmp_path / "frontier.png", "a-model")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
