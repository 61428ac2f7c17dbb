"""What becomes of a linear whose fit fails, and which of two fits is kept.

A fit fails when a decomposition does not converge or a moment is not positive semi-definite, when a number comes out as
NaN or infinity, or when What = 0 would be better in the metric of the fit. The linear is then left as it is, and the
rest of the pipeline treats it as dense:

- linears that share one V are fitted by one decomposition, so they fall back together;
- of a selection (`SelectStructure`) what lies between the kept features is left as it is. That is exact, and touches
  none of the other linears (derived here): a dropped output is a zero that its reader does not read, so of W the kept
  rows are all that is used; a dropped input is an exact zero (0 after the activation, 0 mixed by attention), so
  W a = W_:S a_S for every a that occurs, and W_:S without refitting is W itself. What is lost is the share of the
  compensation that the refitting would have brought.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.linalg import NumericalError, all_finite, noted_damping, weighted_error
from compress.structures import (
    DenseStructure,
    LowRankStructure,
    SelectStructure,
    Structure,
    cast,
    core_of,
)
from compress.structures.joint import joint_fit

FAILURES = (torch.linalg.LinAlgError, NumericalError)  # type: ignore[attr-defined]
"""What a fit raises when its numbers do not allow it. Anything else is a bug or a wrong request."""

SUSPECT = 0.1  # share of the error of What = 0 from which a slow fit is held against its unweighted one
STATIONARY = 1e-4  # share by which the two sides of `_is_optimum` may differ; 2e-6 occurs
ROUNDING = 1e-6  # of the error of What = 0: factors come back in float32


@dataclass(frozen=True)
class Linear:
    """One linear to fit: its weight W and what is fitted, the target W*, both (out, in); the metric H of its output
    (out, out), None for the identity. Float64."""

    structure: Structure
    weight: Tensor
    target: Tensor
    metric: Tensor | None

    @property
    def fitted(self) -> Linear:
        """The part of it that is fitted. Dropped outputs are made up for by who reads the others: what is kept is
        fitted by itself."""
        if not isinstance(self.structure, SelectStructure) or self.structure.side == "in":
            return self
        stay = self.structure.features().to(self.weight.device)
        metric = None if self.metric is None else self.metric[stay][:, stay]
        return Linear(self.structure.reduced, self.weight[stay], self.target[stay], metric)

    def kept(self) -> tuple[Structure, dict[str, Tensor]]:
        """The structure and factors, float32, of this linear as it is; a selection stays one."""
        if not isinstance(self.structure, SelectStructure):
            n, m = self.weight.shape
            return DenseStructure(in_features=m, out_features=n), {"weight": self.weight.float()}
        stay = self.structure.features().to(self.weight.device)
        rest = self.weight[stay] if self.structure.side == "out" else self.weight[:, stay]
        return replace(self.structure, core=None), {"weight": rest.float().contiguous()}


@dataclass(frozen=True)
class Fit:
    """What one linear became: factors in float32. `note`: what was unusual, for people; None where nothing was.
    `failed`: it was left as it is."""

    structure: Structure
    factors: dict[str, Tensor]
    note: str | None = None
    failed: bool = False


def fit_linears(linears: Sequence[Linear], gram: Tensor) -> list[Fit]:
    """Fit one linear, or the low-rank linears that share the V of the first, in the metric of `gram` G (in, in).

    Of the weighted and the unweighted fit the better one is kept, by sum tr(H E G E^T), E = W* - What: an iterative
    solver may end above the Frobenius optimum, and so may a closed form in a moment that had to be damped. One that is
    in closed form, in moments as they are, is the optimum: no second fit is made, and it is enough to see that it
    is one at all (`_is_optimum`). (Dictionaries are fitted again only where the weighted fit loses more than
    `SUSPECT`: the second fit takes 3.6 s at 1536 x 576.) Raises UsageError for a weight that is not finite; never
    returns a value that is not.
    """
    for linear in linears:
        if not all_finite(linear.weight):
            raise UsageError("the weight contains NaN or infinity; check the source model")
    parts = [linear.fitted for linear in linears]
    if not all(all_finite(part.target) for part in parts):
        return _left(linears, "the correction of the error made so far is not finite")
    if all(isinstance(part.structure, DenseStructure) for part in parts):
        return [Fit(x.structure, {"weight": p.target.float()}) for x, p in zip(linears, parts, strict=True)]
    with noted_damping() as damped:
        found, reason = _attempt(lambda: _factors(parts, gram))
    if found is None:
        return _left(linears, reason)
    if not damped and all(core_of(part.structure).closed_form for part in parts) and _is_optimum(parts, found, gram):
        return [Fit(x.structure, factors) for x, factors in zip(linears, found, strict=True)]
    nothing, error, note = _error(parts, None, gram), _error(parts, found, gram), None
    if not parts[0].structure.slow_fit or error > SUSPECT * nothing:
        plain, _ = _attempt(lambda: _factors(parts, None))
        if plain is not None and (other := _error(parts, plain, gram)) < error * (1 - ROUNDING):
            found, note = plain, f"the unweighted fit is better: {other:.3g} against {error:.3g} of {nothing:.3g}"
            error = other
    if not (math.isfinite(error) and error <= nothing * (1 + ROUNDING)):
        return _left(linears, f"the error of the fit, {error:.3g}, is above the {nothing:.3g} of no matrix at all")
    return [Fit(x.structure, factors, note) for x, factors in zip(linears, found, strict=True)]


def _is_optimum(parts: Sequence[Linear], found: Sequence[Mapping[str, Tensor]], gram: Tensor) -> bool:
    """Check what every optimum over a class closed under scaling has: E is orthogonal to What in the metric of the fit,
    so that tr(H What G W*^T) = tr(H What G What^T), and the error is that of What = 0 less this.

    In float32, with weight and moments scaled to 1: a fit that went wrong misses this by far more than rounding.
    """
    across = along = largest = 0.0
    unit = (gram / gram.diagonal().mean()).float()
    for part, factors in zip(parts, found, strict=True):
        scale = float(part.target.abs().max())
        largest = max(largest, scale)
        if scale == 0:
            continue
        target, approximation = ((x.double() / scale).float() for x in (part.target, part.structure.dense(factors)))
        image, weight = approximation @ unit, scale**2
        if part.metric is not None:
            mean = part.metric.diagonal().mean()
            image, weight = (part.metric / mean).float() @ image, weight * float(mean)
        across += weight * float((image * target).sum(dtype=torch.float64))
        along += weight * float((image * approximation).sum(dtype=torch.float64))
    return largest == 0 or (math.isfinite(along) and along > 0 and abs(across - along) <= STATIONARY * along)


def _left(linears: Sequence[Linear], reason: str) -> list[Fit]:
    together = "" if len(linears) == 1 else " (with those that share its input factor)"
    fits = []
    for linear in linears:
        how = "dense between its kept features" if isinstance(linear.structure, SelectStructure) else "dense"
        fits.append(Fit(*linear.kept(), note=f"left {how}{together}: {reason}", failed=True))
    return fits


def _factors(parts: Sequence[Linear], gram: Tensor | None) -> list[dict[str, Tensor]]:
    """The fits; with no Gram matrix unweighted, the metrics left out as well."""
    metrics = [None if gram is None else part.metric for part in parts]
    if len(parts) == 1:
        return [parts[0].structure.fit(parts[0].target, gram, metrics[0])]
    leader = parts[0].structure
    assert isinstance(leader, LowRankStructure)  # `leader_of` ensures it
    v, us = joint_fit([part.target for part in parts], leader.rank, gram, metrics)
    return [{"V": v, "U": u} for u in us]


def _attempt(fit: Callable[[], list[dict[str, Tensor]]]) -> tuple[list[dict[str, Tensor]] | None, str]:
    """Factors in float32, or None and why there are none."""
    try:
        found = [cast(factors, torch.float32) for factors in fit()]
    except FAILURES as error:
        return None, str(error).partition("\n")[0]
    if not all(all_finite(f) for factors in found for f in factors.values()):
        return None, "the fit is not finite"
    return found, ""


def _error(parts: Sequence[Linear], found: Sequence[Mapping[str, Tensor]] | None, gram: Tensor) -> float:
    """sum tr(H E G E^T), E = W* - What; with What = 0 where nothing was found. NaN counts as infinite."""
    total = 0.0
    for i, part in enumerate(parts):
        approximation = part.target.new_zeros(()) if found is None else part.structure.dense(found[i]).double()
        total += max(weighted_error(part.target, approximation.expand_as(part.target), gram, part.metric), 0.0)
    return total if math.isfinite(total) else math.inf
