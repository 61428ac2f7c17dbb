"""All kept sizes from one factorisation, held against each size computed by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.allocation.cuts import Nested
from compress.allocation.menus import Linear, reduced
from compress.architecture import Architecture
from compress.linalg import descending_eigenvalues, whitened_spectrum
from compress.rotation.nested import StreamTerm
from compress.rotation.stream import StreamRotations
from compress.structures import SelectStructure
from compress.structures.base import Side
from tests.compress.helpers import TinyModel, tiny_source

F64 = torch.float64


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def moment(size: int, seed: int) -> Tensor:
    """Positive definite, its largest eigenvalue 1,000 times the least, as damping by a tenth leaves real ones."""
    q = torch.linalg.qr(normal(size, size, seed=seed)).Q
    return (q * torch.logspace(0, -3, size, dtype=F64)) @ q.T


def linear(side: Side, inner: int, d: int, seed: int = 0) -> Linear:
    n, m = (inner, d) if side == "in" else (d, inner)
    return Linear("mlp.up", normal(n, m, seed=seed), moment(m, seed + 1), moment(n, seed + 2), side)


def cut_to(x: Linear, kept: int, groups: int) -> Linear:
    """By itself: a selection, its refit, its own decomposition."""
    n, m = x.weight.shape
    return reduced(x, SelectStructure(m, n, kept, groups, "out" if x.side == "in" else "in"))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize(("inner", "d"), [(24, 10), (12, 16)])
def test_gains_are_those_of_each_size(side: Side, groups: int, inner: int, d: int) -> None:
    x, z = linear(side, inner, d), normal(d, d, seed=9)
    kept = [1, 2, inner // groups - 1, inner // groups]
    found = Nested(x, groups).gains(z, kept)
    assert found.shape == (4, d)
    for row, k in zip(found, kept, strict=True):
        expected = (z @ cut_to(x, k, groups).term().m @ z.T).diagonal()
        torch.testing.assert_close(row, expected, rtol=1e-11, atol=1e-12 * float(expected.max()))
    torch.testing.assert_close(Nested(x, groups).total(z), found[-1], rtol=1e-11, atol=0)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize(("inner", "d"), [(24, 10), (12, 16)])
def test_spectra_are_those_of_each_size(side: Side, groups: int, inner: int, d: int) -> None:
    x = linear(side, inner, d)
    nested = Nested(x, groups)
    for k in (1, 2, inner // groups - 1, 3, inner // groups):  # 3: once not in rising order
        part = cut_to(x, k, groups)
        left, right = torch.linalg.cholesky(part.metric), torch.linalg.cholesky(part.gram)
        expected = torch.linalg.svdvals(left.T @ part.weight @ right).square()
        torch.testing.assert_close(nested.spectrum(k), expected, rtol=1e-11, atol=1e-12 * float(expected[0]))


@pytest.mark.parametrize(("n", "m"), [(9, 14), (14, 9), (9, 9)])
def test_a_whitened_spectrum_is_that_of_the_svd(n: int, m: int) -> None:
    weight, gram, metric = normal(n, m, seed=1), moment(m, 2), moment(n, 3)
    whole = torch.linalg.cholesky(metric).T @ weight @ torch.linalg.cholesky(gram)
    expected = torch.linalg.svdvals(whole).square()
    found = whitened_spectrum(weight, gram, metric)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 * float(expected[0]))


def test_eigenvalues_that_are_rounding_are_none() -> None:
    column = normal(6, 1, seed=1)
    found = descending_eigenvalues(column @ column.T)
    assert bool((found >= 0).all())
    assert float(found[0]) == pytest.approx(float(column.square().sum()), rel=1e-12)
    assert float(found[1:].max()) < 1e-12


def arch_of(name: str, tiny_model: TinyModel) -> Architecture:
    return tiny_source(tiny_model, name).architecture()


@pytest.mark.parametrize("kind", ["shared", "block"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_opt"])
def test_curves_of_a_rotation_are_those_of_its_terms(
    name: str, kind: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """RMSNorm: all d directions. LayerNorm: d - 1, and the mean costs nothing."""
    arch = arch_of(name, tiny_model)
    d, rotations = arch.hidden_size, StreamRotations(arch, kind)
    free = d if rotations.basis is None else d - 1
    assert (free == d) == (name == "tiny_llama")
    rotations.matrices = [torch.linalg.qr(normal(free, free, seed=i)).Q for i in range(rotations.count)]
    for side in ("in", "out"):
        x: Any = linear(side, 24, d)  # type: ignore[arg-type]
        nested, position = Nested(x, 2), 3
        z = rotations.columns(position, nested.stream_moment)
        found = rotations.curves(nested.gains(z, [4, 12]))
        assert found.shape == (2, d + 1)
        for curve, k in zip(found, [4, 12], strict=True):
            term: StreamTerm = rotations.term(cut_to(x, k, 2).term())
            expected = term.curve(rotations.matrices[rotations.index(position)])
            torch.testing.assert_close(curve[: free + 1], expected, rtol=1e-10, atol=1e-12 * float(expected[0]))
            assert float(curve[-1]) == 0
