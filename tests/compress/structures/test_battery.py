"""The dense structure through the battery, the registry, and proof that the battery catches broken structures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import ArtifactError
from compress.structures import DenseStructure, LowRankStructure, Structure, register, registry, structure_from_config
from tests.compress.structures.battery import StructureBattery, random_factors
from tests.compress.structures.lowrank_battery import LowRankBattery


class TestDense(StructureBattery):
    structure = DenseStructure
    exact = True

    def specs(self) -> st.SearchStrategy[Structure]:
        return st.builds(DenseStructure, st.integers(1, 12), st.integers(1, 12))

    def reference_error(self, spec: Structure, W: Tensor, gram: Tensor | None, metric: Tensor | None) -> float:
        return 0.0


def test_registry_knows_every_structure() -> None:
    assert list(registry()) == ["compot", "compot24", "dense", "gs", "kron", "lowrank", "pifa", "select"]
    for name, cls in registry().items():
        assert cls.name == name
    with pytest.raises(ValueError, match="two structures"):
        register(LowRankStructure)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, compress.structures; print('torch' in sys.modules); compress.structures.Structure"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("config", [None, "lowrank", ["structure"], {}, {"structure": "lowrank"}], ids=str)
def test_what_is_no_structure_is_refused(config: Any) -> None:
    with pytest.raises(ArtifactError):
        structure_from_config(config)


def test_refusals_name_the_field() -> None:
    config = LowRankStructure(8, 6, 2).to_config()
    with pytest.raises(ArtifactError, match="unknown field colour"):
        structure_from_config({**config, "colour": 1})
    with pytest.raises(ArtifactError, match="missing field rank"):
        structure_from_config({k: v for k, v in config.items() if k != "rank"})
    with pytest.raises(ArtifactError, match=r"field rank .* '2'"):
        structure_from_config({**config, "rank": "2"})
    with pytest.raises(ArtifactError, match="not valid: rank 7"):
        structure_from_config({**config, "rank": 7})
    with pytest.raises(ArtifactError, match="dense, gs, kron, lowrank, pifa, select"):
        structure_from_config({**config, "structure": "lowrnk"})


def test_factors_of_another_structure_are_refused() -> None:
    spec = LowRankStructure(8, 6, 2)
    factors = random_factors(spec)
    spec.check_factors(factors)
    for wrong in ({"U": factors["U"]}, {**factors, "A": factors["U"]}, {**factors, "U": factors["U"].T}):
        with pytest.raises(ArtifactError, match="shapes"):
            spec.check_factors(wrong)


# --- broken structures, each of which one test of the battery must catch ---------------------------------------------


@dataclass(frozen=True)
class ScaledProduct(LowRankStructure):
    def apply(self, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return super().apply(factors, x) * (1 + 1e-3)


@dataclass(frozen=True)
class DenseProduct(LowRankStructure):
    def apply(self, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return x @ self.dense(factors).T


@dataclass(frozen=True)
class UpcastProduct(LowRankStructure):
    def apply(self, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return super().apply({name: f.float() for name, f in factors.items()}, x.float())


@dataclass(frozen=True)
class DetachedProduct(LowRankStructure):
    def apply(self, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return super().apply({**factors, "U": factors["U"].detach()}, x)


@dataclass(frozen=True)
class CheapClaim(LowRankStructure):
    def bytes(self, dtype: torch.dtype) -> int:
        return super().bytes(dtype) // 2


@dataclass(frozen=True)
class ForgetfulConfig(LowRankStructure):
    def to_config(self) -> dict[str, Any]:
        return {**super().to_config(), "rank": 1}


@dataclass(frozen=True)
class DeafToTheGram(LowRankStructure):
    def fit(self, weight: Tensor, gram: Tensor | None = None, metric: Tensor | None = None) -> dict[str, Tensor]:
        return super().fit(weight, None, metric)


@dataclass(frozen=True)
class NearlyOptimal(LowRankStructure):
    def fit(self, weight: Tensor, gram: Tensor | None = None, metric: Tensor | None = None) -> dict[str, Tensor]:
        factors = super().fit(weight, gram, metric)
        return {**factors, "U": factors["U"] * 1.01}


@dataclass(frozen=True)
class Undamped(LowRankStructure):
    def fit(self, weight: Tensor, gram: Tensor | None = None, metric: Tensor | None = None) -> dict[str, Tensor]:
        """Normalises the Gram matrix by its trace, which is 0 / 0 for a zero one."""
        factors = super().fit(weight, gram, metric)
        return factors if gram is None else {k: f * (gram.trace() / gram.trace()) for k, f in factors.items()}


@dataclass(frozen=True)
class Transposed(LowRankStructure):
    def fit(self, weight: Tensor, gram: Tensor | None = None, metric: Tensor | None = None) -> dict[str, Tensor]:
        return {name: f.T.contiguous() for name, f in super().fit(weight, gram, metric).items()}


@dataclass(frozen=True)
class Greedy(LowRankStructure):
    @classmethod
    def menu(cls, in_features: int, out_features: int, side: Any, *, unit: int) -> list[Any]:
        return [cls(in_features, out_features, rank) for rank in range(unit, min(in_features, out_features) + 1, unit)]


def run(structure: type[LowRankStructure], test: str, *arguments: Any) -> None:
    """One test of the low-rank battery on a structure."""

    class Battery(LowRankBattery):
        __test__: ClassVar[bool] = False

        def specs(self) -> st.SearchStrategy[Structure]:
            sizes = st.tuples(st.integers(4, 8), st.integers(4, 8), st.integers(2, 3))
            return sizes.map(lambda size: structure(*size))

    Battery.structure = structure
    getattr(Battery(), test)(*arguments)


@pytest.mark.parametrize(
    ("structure", "test", "arguments"),
    [
        (ScaledProduct, "test_apply_is_the_dense_product", ((3,),)),
        (DenseProduct, "test_counted_cost_is_the_stated_cost", ()),
        (UpcastProduct, "test_half_precision_with_factors_as_stored", (torch.float16,)),
        (DetachedProduct, "test_gradients_are_those_of_the_dense_product", ()),
        (CheapClaim, "test_counted_cost_is_the_stated_cost", ()),
        (ForgetfulConfig, "test_safetensors_and_config_round_trip", ()),
        (DeafToTheGram, "test_fit_is_not_worse_than_its_reference", ()),
        (DeafToTheGram, "test_fit_refuses_what_does_not_match", ()),
        (NearlyOptimal, "test_fit_is_not_worse_than_its_reference", ()),
        (NearlyOptimal, "test_descent_from_the_fit_gains_nothing", ()),
        (NearlyOptimal, "test_fit_recovers_a_matrix_of_the_structure", ()),
        (Undamped, "test_singular_moments_and_zero_weights_stay_finite", ()),
        (Transposed, "test_fit_returns_what_shapes_announces", (torch.float64,)),
        (Greedy, "test_menu_and_ratio", ("in",)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_battery_catches(structure: type[LowRankStructure], test: str, arguments: tuple[Any, ...]) -> None:
    run(LowRankStructure, test, *arguments)  # the sound structure passes the same test
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run(structure, test, *arguments)
