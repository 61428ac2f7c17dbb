"""The skips of `--rotation block`: x -> x S, S = Q_p^T Q_{p+1}, from one basis of the residual stream to the next.

dense        S itself, d x d (ProcrustesGPT section 3)
cs           exact, for rotations in a common gauge (compress/rotation/gauge.py): only the dropped subspace turns
householder  exact, for rotations that differ by a chain of r reflections: S = I - V T V^T
slice        the leading coordinates alone, the others are lost (SliceGPT): the one form that approximates

Factors and configs are separate, as those of the structures are: a form holds sizes, its factors are passed in.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from compress.artifact.reading import shown
from compress.errors import ArtifactError, UsageError

EXACT = 1e-8
"""Largest entry by which a form may miss the skip of the rotations that it is made from: far above rounding."""


@dataclass(frozen=True)
class SkipForm(ABC):
    """A skip on a stream of `width` features."""

    name: ClassVar[str]
    exact: ClassVar[bool] = True  # whether it is the whole skip, so that nothing is lost

    width: int

    def __post_init__(self) -> None:
        self._require("width", self.width, 1, self.width)

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Factor name -> shape, in the order in which they are stored."""

    @abstractmethod
    def factors(self, q_in: Tensor, q_out: Tensor) -> dict[str, Tensor]:
        """The factors of the skip between two rotations (d, d); float64.

        Raises UsageError when the skip does not have this form.
        """

    @abstractmethod
    def apply(self, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """x (..., d) -> x S (..., d), through the factors."""

    @abstractmethod
    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        """S^T (d, d): what `torch.nn.Linear` calls the weight of this skip."""

    def parameter_count(self) -> int:
        """Numbers stored."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    @abstractmethod
    def macs(self, tokens: int) -> int:
        """Multiply-accumulates of the matrix products of `apply`; products with a vector are not counted."""

    def to_config(self) -> dict[str, Any]:
        """A JSON object that `skip_from_config` reads back."""
        return {"form": self.name, **asdict(self)}

    def _require(self, field: str, value: int, least: int, most: int) -> None:
        if not least <= value <= most:
            raise UsageError(
                f"{field} of a {self.name} skip on a stream of {self.width} must be in {least} ... {most}, not {value}"
            )

    def _checked(self, found: dict[str, Tensor], skip: Tensor) -> dict[str, Tensor]:
        """`found`, when it is `skip` = q_in^T q_out to within EXACT."""
        gap = float((self.dense(found).T - skip).abs().max())
        if not gap <= EXACT:
            raise UsageError(
                f"these rotations have no {self.name} skip of sizes {asdict(self)}: it misses the dense skip by "
                f"{gap:.1e}. Make the rotations with compress.rotation.gauge.with_skips"
            )
        return found


@dataclass(frozen=True)
class DenseSkip(SkipForm):
    """weight (d, d) = S^T."""

    name: ClassVar[str] = "dense"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.width, self.width)}

    def factors(self, q_in: Tensor, q_out: Tensor) -> dict[str, Tensor]:
        return {"weight": q_out.double().T @ q_in.double()}

    def apply(self, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return linear(x, factors["weight"])

    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        return factors["weight"]

    def macs(self, tokens: int) -> int:
        return tokens * self.parameter_count()


@dataclass(frozen=True)
class CSSkip(SkipForm):
    """The gauge-fixed form on x = [x_K, x_N], K the `kept` leading coordinates and N the p = d - kept others.

    With the cosines c and sines s of the angles between the dropped subspaces, and Y = S_KN (its columns have
    length s), V orthogonal (docs/method.md#cheap-skips; s is absorbed in Y, so that small angles divide nothing):

        z = x_K Y,  w = x_N V,   out_N = z + w c,   out_K = x_K - (z / (1 + c) + w) Y^T

    Only the first t = `turned` columns of N have an angle; for the others out_N = w. Y (kept, t), V (p, p), c (t,):
    (kept + 1) t + p^2 parameters and 2 kept t + p^2 multiply-accumulates, against d^2 of both.
    """

    name: ClassVar[str] = "cs"

    kept: int
    turned: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("kept", self.kept, 1, self.width - 1)
        self._require("turned", self.turned, 1, min(self.kept, self.width - self.kept))

    @classmethod
    def between(cls, q_in: Tensor, q_out: Tensor, kept: int, tolerance: float = 1e-12) -> CSSkip:
        """The sizes of the skip between two rotations in a common gauge; sines up to `tolerance` are dropped."""
        cls(len(q_in), kept, 1)  # checks the size before it cuts
        sines = (q_in[:, :kept].T @ q_out[:, kept:]).norm(dim=0)
        return cls(len(q_in), kept, max(1, int((sines > tolerance).sum())))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        p = self.width - self.kept
        return {"Y": (self.kept, self.turned), "V": (p, p), "c": (self.turned,)}

    def factors(self, q_in: Tensor, q_out: Tensor) -> dict[str, Tensor]:
        k, t = self.kept, self.turned
        skip = q_in.double().T @ q_out.double()
        y, inner = skip[:k, k : k + t], skip[k:, k:].clone()  # inner = V diag(c)
        c = inner[:, :t].norm(dim=0)
        # V c^2 + V s^2 = V: no division, though a right angle leaves nothing of V in `inner`.
        inner[:, :t] = inner[:, :t] * c - skip[k:, :k] @ y
        return self._checked({"Y": y.contiguous(), "V": inner, "c": c}, skip)

    def apply(self, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        Y, V, c = factors["Y"], factors["V"], factors["c"]
        x_k, x_n = x[..., : self.kept], x[..., self.kept :]
        z, w = x_k @ Y, x_n @ V  # (..., turned), (..., p)
        w_t, w_rest = w[..., : self.turned], w[..., self.turned :]
        back = (z / (1 + c) + w_t) @ Y.T
        return torch.cat((x_k - back, z + w_t * c, w_rest), dim=-1)

    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        Y, V, c = factors["Y"], factors["V"], factors["c"]
        k, t = self.kept, self.turned
        skip = V.new_zeros(self.width, self.width)
        skip[:k, :k] = torch.eye(k, dtype=V.dtype, device=V.device) - (Y / (1 + c)) @ Y.T
        skip[:k, k : k + t] = Y
        skip[k:, :k] = -V[:, :t] @ Y.T
        skip[k:, k:] = V
        skip[k:, k : k + t] *= c
        return skip.T

    def macs(self, tokens: int) -> int:
        return tokens * (2 * self.kept * self.turned + (self.width - self.kept) ** 2)


@dataclass(frozen=True)
class HouseholderSkip(SkipForm):
    """S = I - V T V^T, V (d, r) with orthonormal columns, T (r, r): r = `reflections` Householder reflections.

    Every orthogonal S that fixes d - r directions is a product of r reflections and the other way round (Cartan and
    Dieudonne, Scherk); with D = V^T S V orthogonal, T = I - D. It is the compact WY form in the basis of what turns.
    d r + r^2 parameters, 2 d r + r^2 multiply-accumulates: below the dense d^2 for r up to 0.61 d and 0.41 d.
    """

    name: ClassVar[str] = "householder"

    reflections: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("reflections", self.reflections, 1, self.width)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"V": (self.width, self.reflections), "T": (self.reflections, self.reflections)}

    def factors(self, q_in: Tensor, q_out: Tensor) -> dict[str, Tensor]:
        skip = q_in.double().T @ q_out.double()
        return self._checked(nearest_chain(skip, self.reflections), skip)

    def apply(self, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        V, T = factors["V"], factors["T"]
        return x - x @ V @ T @ V.T

    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        V, T = factors["V"], factors["T"]
        return torch.eye(self.width, dtype=V.dtype, device=V.device) - V @ T.T @ V.T

    def macs(self, tokens: int) -> int:
        return tokens * (2 * self.width * self.reflections + self.reflections**2)


def nearest_chain(skip: Tensor, reflections: int) -> dict[str, Tensor]:
    """The factors V, T of an orthogonal I - V T V^T of `reflections` reflections near the orthogonal `skip` (d, d).

    ||skip - P||^2 over orthogonal P = I + V (D - I) V^T: the best D for a given V is the polar factor of V^T S V, and
    tr(S^T P) is at most d - r + r - (the sum of the r smallest cosines of S), by Ky Fan. The right singular vectors of
    S - I, whose singular values are 2 sin(angle / 2), attain it when they split no plane of rotation: then P is the
    nearest. One that is split is left out, or reflected where its angle is above 90 degrees. With r = d, P = S.
    """
    HouseholderSkip(len(skip), reflections)  # refuses a wrong number
    skip = skip.double()
    basis = _turning_basis(skip, reflections)
    left, _, right = torch.linalg.svd(basis.T @ skip @ basis)
    identity = torch.eye(reflections, dtype=torch.float64, device=skip.device)
    return {"V": basis.contiguous(), "T": identity - left @ right}


def _turning_basis(skip: Tensor, count: int) -> Tensor:
    """(d, count): the directions that `skip` turns most, whole planes of rotation as far as `count` allows."""
    _, sizes, vt = torch.linalg.svd(skip - torch.eye(len(skip), dtype=skip.dtype, device=skip.device))
    tied = (sizes - sizes[count - 1]).abs() < 1e-9
    first = int((~tied & (sizes > sizes[count - 1])).sum())
    basis, cluster = vt[:first].T, vt[tied].T  # (d, first), (d, planes of one angle)
    turn = cluster.T @ skip @ cluster
    turn = (turn - turn.T) / 2
    if count - first < len(turn):  # the cut goes through planes of one angle: take whole ones first
        sines, vectors = torch.linalg.eigh(1j * turn)  # pairs +-sine; u of +sine spans the plane (Re u, Im u)
        upper = vectors[:, sines > 1e-9]
        planes = torch.stack((upper.real, upper.imag), dim=2).flatten(1)  # (cluster, 2 * planes)
        cluster = cluster @ torch.linalg.qr(planes, mode="complete").Q
    return torch.cat((basis, cluster[:, : count - first]), dim=1)


@dataclass(frozen=True)
class SliceSkip(SkipForm):
    """weight (kept_out, kept_in): the leading block of S^T. Reads x[:kept_in], leaves all past kept_out at zero."""

    name: ClassVar[str] = "slice"
    exact: ClassVar[bool] = False

    kept_in: int
    kept_out: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("kept_in", self.kept_in, 1, self.width)
        self._require("kept_out", self.kept_out, 1, self.width)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.kept_out, self.kept_in)}

    def factors(self, q_in: Tensor, q_out: Tensor) -> dict[str, Tensor]:
        return {"weight": q_out.double()[:, : self.kept_out].T @ q_in.double()[:, : self.kept_in]}

    def apply(self, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return pad(linear(x[..., : self.kept_in], factors["weight"]), (0, self.width - self.kept_out))

    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        return pad(factors["weight"], (0, self.width - self.kept_in, 0, self.width - self.kept_out))

    def macs(self, tokens: int) -> int:
        return tokens * self.parameter_count()


FORMS: dict[str, type[SkipForm]] = {form.name: form for form in (DenseSkip, CSSkip, HouseholderSkip, SliceSkip)}
"""Name, as in config.json and the recipe's `skip`, -> class."""


def skip_from_config(config: object) -> SkipForm:
    """Read back what `SkipForm.to_config` wrote. Raises ArtifactError, naming what is wrong, for anything else."""
    if not isinstance(config, Mapping) or config.get("form") not in list(FORMS):
        raise ArtifactError(f"config.json has the skip {shown(config)}, its form must be one of {', '.join(FORMS)}")
    cls, given = FORMS[config["form"]], {key: value for key, value in config.items() if key != "form"}
    wanted = {field.name for field in fields(cls) if field.default is MISSING}
    if given.keys() != wanted or not all(type(value) is int for value in given.values()):
        raise ArtifactError(
            f"config.json has the skip {shown(dict(config), 300)}, which needs the integers {sorted(wanted)}"
        )
    try:
        return cls(**given)
    except UsageError as error:
        raise ArtifactError(f"config.json has a skip of sizes that do not fit: {error}") from error


def skips_from_config(skip: object, config: object, width: int, layers: int) -> tuple[SkipForm, ...]:
    """The forms of all 2 * layers skips in order of position, none for skip "none".

    `skip` is a name, `config` a list of `to_config`s, or None for dense skips, as older checkpoints have it. Raises
    ArtifactError for skips that are not those of such a model.
    """
    if skip == "none" and config is None:
        return ()
    if config is None:
        config = [{"form": skip, "width": width}] * (2 * layers)
    if not isinstance(config, list) or len(config) != 2 * layers:
        raise ArtifactError(f"config.json must give the skip_config of {2 * layers} skips, it has {shown(config)}")
    forms = tuple(map(skip_from_config, config))
    for form in forms:
        if form.name != skip or form.width != width:
            raise ArtifactError(f"config.json has the skip {form} in a model of {shown(skip)} skips and width {width}")
    return forms


def parameters_of(
    name: str, width: int, layers: int, *, kept: int | None = None, reflections: int | None = None
) -> int:
    """What all 2 * layers skips of form `name` store at most, before their rotations are known; 0 for "none".

    cs and slice need `kept`, householder `reflections`. The last slice widens to all of the head's coordinates. Raises
    UsageError for a size that is missing or does not fit.
    """
    count = 2 * layers
    if name == "none":
        return 0
    if name == "dense":
        return count * DenseSkip(width).parameter_count()
    if name == "householder" and reflections is not None:
        return count * HouseholderSkip(width, reflections).parameter_count()
    if name == "cs" and kept is not None:
        return count * CSSkip(width, kept, min(kept, width - kept)).parameter_count()
    if name == "slice" and kept is not None:
        inner, last = SliceSkip(width, kept, kept), SliceSkip(width, kept, width)
        return (count - 1) * inner.parameter_count() + last.parameter_count()
    raise UsageError(
        f"skip {name!r} with kept={kept}, reflections={reflections}: give cs or slice with kept, householder with "
        f"reflections, dense or none"
    )
