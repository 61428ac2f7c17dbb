"""The interface of every structure, the registry, and reading a structure back from config.json.

Weights follow the convention of `torch.nn.Linear`: W is (out_features, in_features) and y = x W^T. A fit minimises

    error = tr(H E G E^T),   E = W - What

where G (`gram`) is the second moment E[x x^T] of the inputs and H (`metric`) that of the gradients at the outputs.
Half of this error is the second-order estimate of the loss increase (Kronecker-factored Fisher); with H = I it is
the squared output error, with both absent the squared Frobenius norm.
"""

from __future__ import annotations

import math
import types
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from typing_extensions import Self

from compress.artifact.reading import shown
from compress.errors import ArtifactError, UsageError

Side = Literal["in", "out"]  # which side of the matrix lies on the residual stream: "in" reads it, "out" writes it

_REGISTRY: dict[str, type[Structure]] = {}


@dataclass(frozen=True)
class Structure(ABC):
    """The dimensions of a structured out_features x in_features matrix; its factors are passed in by name."""

    name: ClassVar[str]
    predicts_loss: ClassVar[bool] = False
    """Whether `curve` gives the loss of every size, which global allocation (`--allocation global`) chooses by."""
    slow_fit: ClassVar[bool] = False
    """Whether a fit takes so long that it is held against the unweighted one only where it looks bad."""
    may_be_core: ClassVar[bool] = False
    """Whether it may lie between the features that a selection keeps in an allocation; `ranked` then gives its loss."""

    in_features: int
    out_features: int

    def __post_init__(self) -> None:
        for field in ("in_features", "out_features"):
            self._require_positive(field)

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Factor name -> shape, in the order in which the factors are stored."""

    @abstractmethod
    def fit(self, weight: Tensor, gram: Tensor | None = None, metric: Tensor | None = None) -> dict[str, Tensor]:
        """The factors that minimise tr(H E G E^T), E = weight - What.

        weight (out, in); gram G (in, in) and metric H (out, out), symmetric and positive semi-definite, None for the
        identity. All arithmetic is in float64 on the weight's device. The factors come back in float64 for a float64
        weight and in float32 otherwise; `storage_dtypes` says in which type to store them. A singular G or H is damped
        (`linalg.Moment.of`). Raises UsageError when a shape does not match or a value is not finite.
        """

    @abstractmethod
    def apply(self, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """x (..., in_features) -> x What^T (..., out_features), through the factors; What is never formed."""

    @abstractmethod
    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        """What (out_features, in_features), for tests and for writing a plain checkpoint."""

    @classmethod
    @abstractmethod
    def menu(cls, in_features: int, out_features: int, side: Side, *, unit: int) -> list[Self]:
        """The sizes that an allocator may choose from, each with fewer parameters than dense (dense excepted).

        `side` says on which side the residual stream lies; `unit` is the alignment in features (64 or 128 on GPUs).
        Empty when no aligned size saves parameters. Raises UsageError for a unit that the structure cannot use.
        """

    @classmethod
    def curve(cls, weight: Tensor, gram: Tensor, metric: Tensor, side: Side, *, unit: int) -> list[tuple[Self, float]]:
        """(size, its predicted tr(H E G E^T)) of every entry of the menu, from one decomposition; nothing is fitted.

        weight (out, in), gram G (in, in) and metric H (out, out) in float64, both moments positive definite. A
        structure that has a curve sets `predicts_loss`; one without it raises UsageError.
        """
        known = ", ".join(name for name, kind in registry().items() if kind.predicts_loss)
        raise UsageError(f"structure {cls.name!r} has no predicted loss to allocate by: choose {known}")

    @classmethod
    def ranked(
        cls, in_features: int, out_features: int, side: Side, squares: Tensor, *, unit: int
    ) -> list[tuple[Self, float]]:
        """`curve` of a matrix of which only the squared singular values of C_H^T W C_G are known, `squares` descending.

        A structure that has it sets `may_be_core`; one without it raises UsageError.
        """
        known = ", ".join(name for name, kind in registry().items() if kind.may_be_core)
        raise UsageError(f"structure {cls.name!r} cannot lie inside a selection that is allocated: choose {known}")

    @classmethod
    def for_ratio(cls, in_features: int, out_features: int, side: Side, ratio: float, unit: int) -> Self:
        """The entry of the menu with most parameters not above ratio * in_features * out_features.

        Of equally large entries the first in the menu. Raises UsageError when every entry is above.
        """
        return cls._largest(
            cls.menu(in_features, out_features, side, unit=unit), in_features, out_features, ratio, unit
        )

    @property
    def closed_form(self) -> bool:
        """Whether `fit` gives the optimum, and not the end of a search. Here: no."""
        return False

    @property
    def variant(self) -> str:
        """What decides how fast it runs beside its sizes, for tables of measured times: "gs 4x2", "lowrank"."""
        return self.name

    def parameter_count(self) -> int:
        """Numbers stored, the mixing matrix included."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def storage_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Factor name -> the type in which it is stored in a checkpoint of type `dtype`."""
        return dict.fromkeys(self.shapes(), dtype)

    def random_factors(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Factors that `check_factors` accepts, for tests and benchmarks; floating ones are of type `dtype`.

        Here: normal entries, scaled so that `apply` keeps the size of its input. A structure with integer factors (an
        order, a mask) draws those itself.
        """

        def normal(shape: tuple[int, ...]) -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            return (drawn / math.sqrt(shape[-1])).to(torch.float32).to(dtype)  # in every type the same numbers

        return {name: normal(shape) for name, shape in self.shapes().items()}

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the factors in a checkpoint of type `dtype`; what one decode step reads from memory."""
        stored = self.storage_dtypes(dtype)
        return sum(math.prod(shape) * stored[name].itemsize for name, shape in self.shapes().items())

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates of `apply` on so many tokens. Here: every parameter is used once per token."""
        return tokens * self.parameter_count()

    def to_config(self) -> dict[str, Any]:
        """A JSON object that `structure_from_config` reads back; fields that are None are left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        config = {k: v.to_config() if isinstance(v, Structure) else v for k, v in values.items() if v is not None}
        return {"structure": self.name, **config}

    def check_factors(self, factors: Mapping[str, Tensor]) -> None:
        """Raise ArtifactError when the factors are not those of this structure: names, shapes, and `check_values`."""
        found = {name: tuple(factor.shape) for name, factor in factors.items()}
        if found != self.shapes():
            raise ArtifactError(
                f"the factors have shapes {found} but {self} needs {self.shapes()}; compress the model again"
            )
        for name, factor in factors.items():
            self.check_values(name, factor)

    def check_values(self, name: str, factor: Tensor) -> None:  # noqa: B027 (most structures have nothing to check)
        """Raise ArtifactError where one factor, of the right shape, has values that none of this structure has: an
        order that is no permutation, a mask of another pattern. Here: any values will do."""

    def _require_positive(self, field: str) -> None:
        value = getattr(self, field)
        if value < 1:
            raise UsageError(f"{field} of a {self.name} structure must be at least 1, not {value}")

    def _require_divides(self, what: str, divisor: int, size: int) -> None:
        if size % divisor:
            raise UsageError(
                f"{self.name}: {what} = {divisor} does not divide {size} "
                f"(of a {self.out_features} x {self.in_features} matrix); choose a divisor of {size}"
            )

    @classmethod
    def _largest(cls, menu: list[Self], in_features: int, out_features: int, ratio: float, unit: int) -> Self:
        if not 0 < ratio <= 1:
            raise UsageError(f"the kept ratio must be above 0 and at most 1, not {ratio}")
        budget = ratio * in_features * out_features
        fitting = [s for s in menu if s.parameter_count() <= budget]
        if not fitting:
            raise UsageError(
                f"no {cls.name} structure in steps of {unit} keeps {ratio:g} or less of a {out_features} x "
                f"{in_features} matrix; use a larger ratio, a smaller unit or another structure"
            )
        return max(fitting, key=lambda s: s.parameter_count())


S = TypeVar("S", bound=Structure)


def register(cls: type[S]) -> type[S]:
    """Class decorator: make a structure known under its `name`."""
    if cls.name in _REGISTRY:
        raise ValueError(f"two structures are called {cls.name!r}: {_REGISTRY[cls.name]} and {cls}")
    _REGISTRY[cls.name] = cls
    return cls


def registry() -> dict[str, type[Structure]]:
    """Name -> class of every structure. Imports the modules of this package, so a new file is all it takes."""
    package = import_module("compress.structures")
    for module in iter_modules(package.__path__, package.__name__ + "."):
        import_module(module.name)
    return dict(sorted(_REGISTRY.items()))


def cores() -> tuple[str, ...]:
    """The structures that may lie between the features that a selection keeps; see `Structure.may_be_core`."""
    return tuple(name for name, kind in registry().items() if kind.may_be_core)


def cast(factors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The factors in another floating type; integers (an order, a mask) stay what they are."""
    return {name: f.to(dtype) if f.is_floating_point() else f for name, f in factors.items()}


def structure_from_config(config: Mapping[str, Any]) -> Structure:
    """Read back what `Structure.to_config` wrote. Raises ArtifactError, naming the field, for anything else."""
    if not isinstance(config, Mapping):
        raise ArtifactError(f"a structure must be a JSON object, not {shown(config)}; compress the model again")
    known = registry()
    name = config.get("structure")
    if not isinstance(name, str) or name not in known:
        raise ArtifactError(
            f"unknown structure {shown(name)} in a checkpoint's config; this version knows {', '.join(known)}"
        )
    cls = known[name]
    hints = get_type_hints(cls)
    given: dict[str, Any] = {
        key: structure_from_config(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != "structure"
    }
    required = {f.name for f in fields(cls) if f.default is MISSING}
    allowed = {f.name for f in fields(cls)}
    for problem, names in (("unknown", given.keys() - allowed), ("missing", required - given.keys())):
        if names:
            raise ArtifactError(
                f"{problem} field {shown(', '.join(sorted(map(str, names))))[1:-1]} in the {name} structure "
                f"{shown(dict(config), 300)}"
            )
    for key, value in given.items():
        if not _is_of_type(value, hints[key]):
            raise ArtifactError(
                f"field {key} of the {name} structure {shown(dict(config), 300)} has the wrong type: {shown(value)}"
            )
    try:
        return cls(**given)
    except UsageError as error:
        raise ArtifactError(f"the {name} structure {shown(dict(config), 300)} is not valid: {error}") from error


def _is_of_type(value: object, hint: Any) -> bool:
    """Whether a JSON value fits a field's annotation: int, str, Literal or a union of these. true is not an int."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_is_of_type(value, option) for option in get_args(hint))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, hint)
