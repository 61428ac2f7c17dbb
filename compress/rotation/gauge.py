"""Rotations whose skips are cheap: the bases that a compression leaves free, chosen along the stream.

Where every linear at a position keeps the same leading coordinates, only the kept subspace K and the dropped one N
matter; the bases inside them are free (a gauge). Parallel transport picks those of position p + 1 from those of p so
that the skip Q_p^T Q_{p+1} does no more than turn N (docs/method.md#cheap-skips). Rotations are (d, d) float64,
Q = [K, N].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.model.skips import CSSkip, HouseholderSkip, SkipForm, nearest_chain
from compress.rewrites.rotations import Rotations


def transport(q: Tensor, target: Tensor, kept: int, *, near: bool = False) -> Tensor:
    """`target` with new bases of its first `kept` columns and of the others, as parallel as can be to those of `q`.

    N^T N' = V C Z^T (angles in descending order) gives the principal bases N V and N' Z. Then, with Y = K^T N' Z,

        N' <- N' Z,   K' <- K - (K Y (I + C)^-1 + N V) Y^T,   or, `near`,   N' <- N' Z V^T

    The first makes the skip cheapest (`CSSkip`), the second nearest to the identity: it then turns two planes' worth of
    directions, one in K and one in N, for each angle. (d, d) float64 in and out.
    """
    k, n = q[:, :kept], q[:, kept:]
    v, cosines, z = _principal(k.T @ target[:, kept:], n.T @ target[:, kept:])
    moved = target[:, kept:] @ z  # (d, p)
    y = k.T @ moved  # (kept, p), columns of length sine
    carried = k - (k @ (y / (1 + cosines)) + n @ v) @ y.T
    return torch.cat((carried, moved @ v.T if near else moved), dim=1)


def _principal(sines: Tensor, cosines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V (p, p), c (p,) and Z (p, p) with `cosines` = V diag(c) Z^T, angles in descending order.

    `sines` K^T N' (kept, p) and `cosines` N^T N' (p, p) have the same right singular vectors. Those of `sines` tell
    small angles apart, those of `cosines` large ones; neither does both (Golub and Van Loan, 2.5.4).
    """
    _, lengths, zt = torch.linalg.svd(sines, full_matrices=True)
    z, large = zt.T, int((lengths > 0.7).sum())  # (p, p)
    image = cosines @ z  # (p, p), V diag(c)
    small = image[:, large:]
    q, r = torch.linalg.qr(small, mode="complete")  # orthogonal columns, so that r is diagonal
    count = small.shape[1]
    u, c, wt = torch.linalg.svd(q[:, count:].T @ image[:, :large])
    u, c, w = u.flip(1), c.flip(0), wt.flip(0).T  # angles in descending order
    v = torch.cat((q[:, count:] @ u, q[:, :count] * r.diagonal().sign()), dim=1)
    return v, torch.cat((c, small.norm(dim=0))).clamp(max=1), torch.cat((z[:, :large] @ w, z[:, large:]), dim=1)


def gauge_fix(rotations: Sequence[Tensor], kept: int | Sequence[int]) -> list[Tensor]:
    """The same kept and dropped subspaces in the gauge of `CSSkip`; the first rotation stays as it is. Exact.

    `kept` is the dimension of K, at every position the same. Raises UsageError for different ones: from k to a larger
    k' the gauge of K' and N' is too small to absorb the turn of N, and no skip of this form exists.
    """
    return _along(rotations, _one_kept(kept, len(rotations[0])), near=False)


def chain_rotations(
    rotations: Sequence[Tensor], reflections: int, kept: int | None = None
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Rotations that differ by `reflections` reflections each, near the given ones; and the factors of the skips.

    Q_{p+1} := Q_p P_p with P_p = I - V T V^T near Q_p^T (the given Q_{p+1}), so that what is rewritten with them stays
    exact. With `kept`, the given one is first moved to the gauge nearest to Q_p: then the largest angles between kept
    subspaces are followed first, two reflections each, and 2 min(kept, d - kept) reflections lose nothing. Without it,
    arbitrary signs and orders of columns count as turns. Raises UsageError for sizes that do not fit.
    """
    made, chain = [rotations[0].double()], []
    for target in rotations[1:]:
        q, target = made[-1], target.double()
        if kept is not None:
            target = transport(q, target, _one_kept(kept, len(q)), near=True)
        factors = nearest_chain(q.T @ target, reflections)
        made.append(q - q @ factors["V"] @ factors["T"] @ factors["V"].T)
        chain.append(factors)
    return made, chain


def with_skips(
    rotations: Rotations, skip: str, *, kept: int | Sequence[int] | None = None, reflections: int | None = None
) -> Rotations:
    """Per-block rotations remade for skips of form "dense", "cs" (needs `kept`) or "householder" (`reflections`).

    The kept subspaces do not change under "cs". "householder" is nearest to them when `kept` is given. Raises
    UsageError for other rotations, forms and sizes.
    """
    if rotations.kind != "block":
        raise UsageError(f"skip {skip!r} with rotation {rotations.kind!r}: only rotation 'block' has skips")
    matrices: Sequence[Tensor] = rotations.matrices
    forms: list[SkipForm] = []
    if skip == "cs" and kept is not None:
        matrices = gauge_fix(matrices, kept)
        k = _one_kept(kept, len(matrices[0]))
        forms = [CSSkip.between(a, b, k) for a, b in pairwise(matrices)]
    elif skip == "householder" and reflections is not None:
        one = None if kept is None else _one_kept(kept, len(matrices[0]))
        matrices, _ = chain_rotations(matrices, reflections, one)
        forms = [HouseholderSkip(len(matrices[0]), reflections)] * (len(matrices) - 1)
    elif skip != "dense":
        raise UsageError(
            f"skip {skip!r} with kept={kept}, reflections={reflections}: give dense, cs with kept, or householder "
            f"with reflections"
        )
    return Rotations("block", tuple(matrices), tuple(forms))


def _along(rotations: Sequence[Tensor], kept: int, *, near: bool) -> list[Tensor]:
    made = [rotations[0].double()]
    for target in rotations[1:]:
        made.append(transport(made[-1], target.double(), kept, near=near))
    return made


def _one_kept(kept: int | Sequence[int], width: int) -> int:
    """The kept dimension that all positions share."""
    different = {kept} if isinstance(kept, int) else set(kept)
    if len(different) != 1:
        raise UsageError(
            f"kept dimensions {sorted(different)} differ from position to position: skip 'cs' needs one for all; "
            f"choose it, or --skip dense"
        )
    one = different.pop()
    if not 1 <= one < width:
        raise UsageError(f"{one} kept coordinates of {width}: skip 'cs' needs 1 ... {width - 1}")
    return one
