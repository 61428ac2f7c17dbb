"""The tests that every structure goes through.

A test class inherits `StructureBattery` and says which structures to draw (`specs`), whether its fit is a global
optimum (`exact`), and what its fit must not be worse than (`reference_error`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from compress.errors import ArtifactError, UsageError
from compress.linalg import weighted_error
from compress.structures import Structure, cast, structure_from_config

bounded = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)

LEADING = [(), (3,), (2, 3)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_factors(spec: Structure, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Those of the structure, from a seed."""
    return spec.random_factors(generator(seed), dtype)


def floating(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors but for masks and orders: those that can be cast and have gradients."""
    return {name: f for name, f in factors.items() if f.is_floating_point()}


def random_weight(spec: Structure, seed: int = 0) -> Tensor:
    return torch.randn(spec.out_features, spec.in_features, generator=generator(seed), dtype=torch.float64)


def second_moment(size: int, seed: int, rank: int | None = None) -> Tensor:
    """A correlated second moment with eigenvalues 1, 1/2, 1/3, ...; the given rank or full."""
    Q = torch.linalg.qr(torch.randn(size, size, generator=generator(seed), dtype=torch.float64)).Q
    spectrum = 1 / torch.arange(1, size + 1, dtype=torch.float64)
    spectrum[size if rank is None else rank :] = 0
    return (Q * spectrum) @ Q.T


def weightings(spec: Structure, seed: int = 0) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """(gram, metric): neither, one, the other, both."""
    gram = second_moment(spec.in_features, seed + 1)
    metric = second_moment(spec.out_features, seed + 2)
    yield from [(None, None), (gram, None), (None, metric), (gram, metric)]


def fit_error(spec: Structure, W: Tensor, gram: Tensor | None, metric: Tensor | None) -> float:
    return weighted_error(W, spec.dense(spec.fit(W, gram, metric)), gram, metric)


def descend(
    spec: Structure, factors: dict[str, Tensor], W: Tensor, gram: Tensor | None, metric: Tensor | None
) -> float:
    """The error that L-BFGS on all factors at once reaches from `factors`."""
    free = {name: f.clone().requires_grad_() for name, f in floating(factors).items()}
    left = torch.eye(len(W), dtype=W.dtype) if metric is None else metric
    right = torch.eye(W.shape[1], dtype=W.dtype) if gram is None else gram
    optimizer = torch.optim.LBFGS(
        free.values(), max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def error() -> Tensor:
        E = W - spec.dense({**factors, **free})
        return ((left @ E @ right) * E).sum()

    def closure() -> float:
        optimizer.zero_grad()
        value = error()
        value.backward()
        return float(value.detach())

    optimizer.step(closure)
    return float(error().detach())


class StructureBattery:
    structure: ClassVar[type[Structure]]
    exact: ClassVar[bool] = False  # the fit is a global optimum
    slack: ClassVar[float] = 1e-2  # by how much, relatively, a descent from an inexact fit may still lower the error

    def specs(self) -> st.SearchStrategy[Structure]:
        """Small structures of many shapes, rectangular ones among them."""
        raise NotImplementedError

    def comparable_specs(self) -> st.SearchStrategy[Structure]:
        """Those of `specs` for which one fit can be held against another: where fits choose supports, large ones."""
        return self.specs()

    def menu_sizes(self) -> tuple[int, int, int]:
        """(in_features, out_features, unit) for which the menu is not empty."""
        return 192, 128, 16

    def reference_error(self, spec: Structure, W: Tensor, gram: Tensor | None, metric: Tensor | None) -> float:
        """The error of the best simple competitor, computed another way than `fit` does it."""
        raise NotImplementedError

    # --- the product -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("leading", LEADING, ids=str)
    @bounded
    @given(data=st.data())
    def test_apply_is_the_dense_product(self, leading: tuple[int, ...], data: st.DataObject) -> None:
        spec = data.draw(self.specs())
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
            factors = random_factors(spec, 1, dtype)
            x = torch.randn(*leading, spec.in_features, generator=generator(), dtype=dtype)
            y = spec.apply(factors, x)
            assert y.dtype == dtype
            assert y.shape == (*leading, spec.out_features)
            torch.testing.assert_close(y, x @ spec.dense(factors).T, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @bounded
    @given(data=st.data())
    def test_half_precision_with_factors_as_stored(self, dtype: torch.dtype, data: st.DataObject) -> None:
        spec = data.draw(self.specs())
        stored = spec.storage_dtypes(dtype)
        factors = {name: f.to(stored[name]) for name, f in random_factors(spec, 1).items()}
        x = torch.randn(5, spec.in_features, generator=generator(), dtype=torch.float64).to(dtype)
        y = spec.apply(factors, x)
        assert y.dtype == dtype
        exact = x.double() @ spec.dense(cast(factors, torch.float64)).T
        assert (y.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * max(float(exact.norm()), 1.0)

    @bounded
    @given(data=st.data())
    def test_cast_factors_are_still_factors(self, data: st.DataObject) -> None:
        """In another floating type the factors pass their check and give the same matrix; integers are the same."""
        spec = data.draw(self.specs())
        factors = random_factors(spec, 1)
        found = cast(factors, torch.float32)
        spec.check_factors(found)
        torch.testing.assert_close(spec.dense(found).double(), spec.dense(factors), rtol=1e-4, atol=1e-5)
        for name in factors.keys() - floating(factors).keys():
            assert found[name].dtype == factors[name].dtype
            assert torch.equal(found[name], factors[name])
        assert {f.dtype for f in floating(found).values()} == {torch.float32}

    @bounded
    @given(data=st.data())
    def test_gradients_are_those_of_the_dense_product(self, data: st.DataObject) -> None:
        spec = data.draw(self.specs())
        x = torch.randn(4, spec.in_features, generator=generator(), dtype=torch.float64)
        target = torch.randn(4, spec.out_features, generator=generator(1), dtype=torch.float64)
        gradients = []
        for product in (spec.apply, lambda factors, x: x @ spec.dense(factors).T):
            factors = random_factors(spec, 1)
            leaves = {name: f.requires_grad_() for name, f in floating(factors).items()}
            leaf = x.clone().requires_grad_()
            (product({**factors, **leaves}, leaf) * target).sum().backward()
            gradients.append([leaf.grad, *(f.grad for f in leaves.values())])
        for factored, dense in zip(*gradients, strict=True):
            assert factored is not None
            torch.testing.assert_close(factored, dense, rtol=1e-10, atol=1e-10)
        assert all(float(g.abs().max()) > 0 for g in gradients[0])

    @bounded
    @given(data=st.data())
    def test_counted_cost_is_the_stated_cost(self, data: st.DataObject) -> None:
        """On the meta device: a product through the dense matrix would show as extra work."""
        spec = data.draw(self.specs())
        stored = spec.storage_dtypes(torch.float32)
        factors = {n: torch.empty(shape, device="meta", dtype=stored[n]) for n, shape in spec.shapes().items()}
        for tokens in (1, 7):
            with FlopCounterMode(display=False) as counter:
                spec.apply(factors, torch.empty(tokens, spec.in_features, device="meta"))
            assert counter.get_total_flops() == 2 * spec.macs(tokens)
        integers = sum(f.nbytes for f in factors.values() if not f.is_floating_point())
        assert spec.parameter_count() == sum(f.numel() for f in floating(factors).values()) + math.ceil(integers / 2)
        for dtype in (torch.float32, torch.bfloat16):
            stored = spec.storage_dtypes(dtype)
            assert spec.bytes(dtype) == sum(f.to(stored[name]).nbytes for name, f in factors.items())

    @bounded
    @given(data=st.data())
    def test_safetensors_and_config_round_trip(self, data: st.DataObject) -> None:
        spec = data.draw(self.specs())
        factors = spec.fit(random_weight(spec))
        read = structure_from_config(json.loads(json.dumps(spec.to_config())))
        assert read == spec
        assert type(read) is type(spec)
        loaded = safetensors.torch.load(safetensors.torch.save(factors))
        read.check_factors({name: loaded[name] for name in read.shapes()})
        assert torch.equal(read.dense(loaded), spec.dense(factors))

    # --- the fit -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    @bounded
    @given(data=st.data())
    def test_fit_returns_what_shapes_announces(self, dtype: torch.dtype, data: st.DataObject) -> None:
        spec = data.draw(self.specs())
        W = random_weight(spec).to(dtype)
        gram, metric = second_moment(spec.in_features, 1).float(), second_moment(spec.out_features, 2).float()
        before = W.clone()
        factors = spec.fit(W, gram, metric)
        assert {name: tuple(f.shape) for name, f in factors.items()} == spec.shapes()
        assert {f.dtype for f in floating(factors).values()} == {
            torch.float64 if dtype == torch.float64 else torch.float32
        }
        assert all(f.is_contiguous() and bool(torch.isfinite(f).all()) for f in factors.values())
        assert torch.equal(W, before)
        with torch.inference_mode():
            again = spec.fit(W, gram, metric)
        assert all(torch.equal(again[name], f) for name, f in factors.items())

    @bounded
    @given(data=st.data())
    def test_fit_recovers_a_matrix_of_the_structure(self, data: st.DataObject) -> None:
        spec = data.draw(self.specs())
        W = spec.dense(random_factors(spec, 3))
        for gram, metric in weightings(spec):
            total = weighted_error(W, torch.zeros_like(W), gram, metric)
            assert fit_error(spec, W, gram, metric) <= 1e-14 * total

    @bounded
    @given(data=st.data())
    def test_identity_moments_are_the_frobenius_fit(self, data: st.DataObject) -> None:
        spec = data.draw(self.specs())
        W = random_weight(spec)
        eye_in, eye_out = (torch.eye(k, dtype=W.dtype) for k in (spec.in_features, spec.out_features))
        plain = fit_error(spec, W, None, None)
        for gram, metric in ((eye_in, None), (None, eye_out), (eye_in, eye_out)):
            assert fit_error(spec, W, gram, metric) == pytest.approx(plain, rel=1e-6, abs=1e-12)

    @bounded
    @given(data=st.data())
    def test_weighted_fit_is_not_worse_than_the_frobenius_fit(self, data: st.DataObject) -> None:
        spec = data.draw(self.comparable_specs())
        W = random_weight(spec)
        plain = spec.dense(spec.fit(W))
        for gram, metric in weightings(spec):
            assert fit_error(spec, W, gram, metric) <= weighted_error(W, plain, gram, metric) * (1 + 1e-9) + 1e-12

    @bounded
    @given(data=st.data())
    def test_fit_is_not_worse_than_its_reference(self, data: st.DataObject) -> None:
        spec = data.draw(self.specs())
        W = random_weight(spec)
        for gram, metric in weightings(spec):
            reference = self.reference_error(spec, W, gram, metric)
            assert fit_error(spec, W, gram, metric) <= reference * (1 + 1e-6) + 1e-10

    @bounded
    @given(data=st.data())
    def test_descent_from_the_fit_gains_nothing(self, data: st.DataObject) -> None:
        """An exact fit also stands against descents from random factors."""
        spec = data.draw(self.comparable_specs())
        W = random_weight(spec)
        for gram, metric in weightings(spec):
            factors = spec.fit(W, gram, metric)
            error = weighted_error(W, spec.dense(factors), gram, metric)
            slack = 1e-6 if self.exact else self.slack
            starts = [factors] + ([random_factors(spec, 5)] if self.exact else [])
            for start in starts:
                assert descend(spec, start, W, gram, metric) >= error * (1 - slack) - 1e-10

    @bounded
    @given(data=st.data())
    def test_singular_moments_and_zero_weights_stay_finite(self, data: st.DataObject) -> None:
        spec = data.draw(self.comparable_specs())
        n, m = spec.out_features, spec.in_features
        W = random_weight(spec)
        plain = spec.dense(spec.fit(W))
        for gram in (second_moment(m, 1, rank=m // 2), torch.zeros(m, m), None):
            for metric in (None, second_moment(n, 2, rank=1), torch.zeros(n, n)):
                factors = spec.fit(W, gram, metric)
                assert all(bool(torch.isfinite(f).all()) for f in factors.values())
                error = weighted_error(W, spec.dense(factors), gram, metric)
                assert error <= weighted_error(W, plain, gram, metric) + 1e-4 * float(W.square().sum())
                zero = spec.fit(torch.zeros_like(W), gram, metric)
                assert float(spec.dense(zero).abs().max()) == 0

    # --- refusals ----------------------------------------------------------------------------------------------------

    @bounded
    @given(data=st.data())
    def test_fit_refuses_what_does_not_match(self, data: st.DataObject) -> None:
        spec = data.draw(self.specs())
        W = random_weight(spec)
        eye = torch.eye(spec.in_features)
        with pytest.raises(UsageError, match="weight is"):
            spec.fit(torch.zeros(spec.out_features + 1, spec.in_features))
        with pytest.raises(UsageError, match="Gram matrix is"):
            spec.fit(W, torch.eye(spec.in_features + 1))
        with pytest.raises(UsageError, match="metric is"):
            spec.fit(W, None, torch.eye(spec.out_features + 1))
        with pytest.raises(UsageError, match="NaN"):
            spec.fit(W * float("nan"))
        with pytest.raises(UsageError, match="NaN"):
            spec.fit(W, eye * float("inf"))
        with pytest.raises(UsageError, match="not positive semi-definite"):
            spec.fit(W, -eye)

    @bounded
    @given(data=st.data())
    def test_bad_configs_are_refused(self, data: st.DataObject) -> None:
        spec = data.draw(self.specs())
        config: dict[str, Any] = spec.to_config()
        bad: list[dict[str, Any]] = [{**config, "surprise": 1}, {**config, "structure": "surprise"}]
        bad += [{**config, "structure": value} for value in (None, 1, ["kron"])]
        for field in ("in_features", "out_features"):
            bad.append({k: v for k, v in config.items() if k != field})
            bad += [{**config, field: value} for value in ("8", 8.0, True, None, [8], 0, -8)]
        for field in set(config) - {"structure"}:
            bad += [{**config, field: value} for value in (1.5, {}, [1], "surprise")]
        for case in bad:
            with pytest.raises(ArtifactError):
                structure_from_config(case)

    # --- sizes to choose from ----------------------------------------------------------------------------------------

    @pytest.mark.parametrize("side", ["in", "out"])
    def test_menu_and_ratio(self, side: Any) -> None:
        m, n, unit = self.menu_sizes()
        cls = self.structure
        menu = cls.menu(m, n, side, unit=unit)
        assert menu
        assert len(set(menu)) == len(menu)
        for spec in menu:
            assert (spec.in_features, spec.out_features) == (m, n)
            assert spec.parameter_count() < m * n or spec.name == "dense"
        sizes = sorted(spec.parameter_count() for spec in menu)
        for ratio in (0.4, 0.75, 1.0):
            within = [s for s in sizes if s <= ratio * m * n]
            if within:
                assert cls.for_ratio(m, n, side, ratio, unit).parameter_count() == within[-1]
        with pytest.raises(UsageError, match="keeps"):
            cls.for_ratio(m, n, side, 1e-6, unit)
        for ratio in (0.0, -1.0, 1.5):
            with pytest.raises(UsageError, match="ratio"):
                cls.for_ratio(m, n, side, ratio, unit)
