"""Pooled allocation: the budget, its bounds, and the threshold against a scan of all thresholds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import UsageError
from compress.methods.compot import normalised_spectrum, pooled_allocation

Sizes = dict[str, tuple[int, int]]


def problem(seed: int) -> tuple[dict[str, Tensor], Sizes]:
    """Matrices from nearly low rank to flat."""
    g = torch.Generator().manual_seed(seed)
    sizes = {"flat": (24, 36), "steep": (40, 24), "square": (32, 32), "small": (8, 40)}
    spectra = {}
    for name, (m, n) in sizes.items():
        W = torch.randn(m, n, generator=g, dtype=torch.float64)
        decay = 0.8 if name == "steep" else 0.99
        spectra[name] = normalised_spectrum(W * decay ** torch.arange(n))
    return spectra, sizes


def spent(kept: dict[str, float], sizes: Sizes) -> float:
    return sum(kept[name] * m * n for name, (m, n) in sizes.items()) / sum(m * n for m, n in sizes.values())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 9), ratio=st.floats(0.4, 1.0), least=st.none() | st.floats(0.0, 0.4))
def test_is_the_best_of_all_thresholds_within_budget(seed: int, ratio: float, least: float | None) -> None:
    spectra, sizes = problem(seed)
    kept = pooled_allocation(spectra, sizes, ratio, least=least)
    floor = 1 - min(0.6, 2.5 * (1 - ratio)) if least is None else least

    def at(threshold: float) -> dict[str, float]:
        ranks = {name: sum(v > threshold for v in s.tolist()) for name, s in spectra.items()}
        return {x: min(max(ranks[x] * (m + n) / (m * n), floor), 1.0) for x, (m, n) in sizes.items()}

    candidates = [at(t) for t in (0.0, *(v for s in spectra.values() for v in s.tolist()))]
    best = max((c for c in candidates if spent(c, sizes) <= ratio * (1 + 1e-12)), key=lambda c: spent(c, sizes))
    assert kept == best
    assert spent(kept, sizes) <= ratio * (1 + 1e-9)
    # One singular value more would be too much.
    step = max((m + n) / (m * n) for m, n in sizes.values())
    assert spent(kept, sizes) > ratio - step or min(kept.values()) == 1


def test_more_budget_never_takes_away() -> None:
    spectra, sizes = problem(0)
    before = dict.fromkeys(sizes, 0.0)
    for ratio in (0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0):
        kept = pooled_allocation(spectra, sizes, ratio, least=0.1)
        assert all(kept[name] >= before[name] for name in sizes)
        before = kept
    assert before == dict.fromkeys(sizes, 1.0)


def test_flat_spectra_keep_more() -> None:
    spectra, sizes = problem(0)
    kept = pooled_allocation(spectra, sizes, 0.6)
    assert kept["steep"] < kept["square"]


def test_bounds_clip() -> None:
    spectra, sizes = problem(0)
    kept = pooled_allocation(spectra, sizes, 0.6, least=0.55, most=0.8)
    assert min(kept.values()) == 0.55
    assert max(kept.values()) == 0.8
    kept = pooled_allocation(spectra, sizes, 0.8)  # the default: at most 2.5 times the mean is taken away
    assert min(kept.values()) == pytest.approx(0.5)


def test_a_zero_matrix_keeps_the_least() -> None:
    spectra, sizes = problem(0)
    spectra["flat"] = normalised_spectrum(torch.zeros(24, 36))
    assert pooled_allocation(spectra, sizes, 0.6, least=0.2)["flat"] == 0.2


def test_spectra_are_normalised() -> None:
    W = torch.randn(12, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    spectrum = normalised_spectrum(1024 * W)  # exact in bfloat16
    assert spectrum.shape == (7,)
    assert float(spectrum.square().sum()) == pytest.approx(1)
    torch.testing.assert_close(spectrum, normalised_spectrum(W))


def test_refusals() -> None:
    spectra, sizes = problem(0)
    for ratio in (0.0, -0.5, 1.5):
        with pytest.raises(UsageError, match="ratio"):
            pooled_allocation(spectra, sizes, ratio)
    with pytest.raises(UsageError, match=r"at least 0\.4.* 0\.3"):
        pooled_allocation(spectra, sizes, 0.3, least=0.4)
    assert set(pooled_allocation(spectra, sizes, 0.3).values()) == {0.3}  # the default bound is below every ratio
    with pytest.raises(UsageError, match="bounds"):
        pooled_allocation(spectra, sizes, 0.5, least=0.5, most=0.4)
    with pytest.raises(UsageError, match="sizes of"):
        pooled_allocation(spectra, {"flat": (24, 36)}, 0.5)
    with pytest.raises(UsageError, match="sizes of"):
        pooled_allocation({}, {}, 0.5)
