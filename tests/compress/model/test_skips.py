"""The cheap skips against the dense one in float64: exact, counted, refused where they do not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from compress.errors import ArtifactError, UsageError
from compress.model.skips import (
    CSSkip,
    DenseSkip,
    HouseholderSkip,
    SkipForm,
    SliceSkip,
    nearest_chain,
    parameters_of,
    skip_from_config,
    skips_from_config,
)
from compress.rewrites.rotations import Rotations, orthogonality_error
from compress.rotation.gauge import chain_rotations, gauge_fix, transport, with_skips

D = 12


def orthogonal(seed: int, width: int = D) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q


def reflection(seed: int, width: int = D) -> Tensor:
    v = torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.eye(width, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v)


def plane_rotation(angles: list[float], flips: int, seed: int, width: int = D) -> Tensor:
    """Planes that turn by `angles`, `flips` directions that change sign, all else fixed, in a random basis."""
    blocks = [
        torch.tensor([[c, -s], [s, c]]) for c, s in ((torch.tensor(a).cos(), torch.tensor(a).sin()) for a in angles)
    ]
    blocks += [-torch.ones(1, 1)] * flips + [torch.ones(1, 1)] * (width - 2 * len(angles) - flips)
    basis = orthogonal(seed, width)
    turned: Tensor = basis @ polar(torch.block_diag(*blocks).double()) @ basis.T
    return turned


def polar(matrix: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(matrix)
    product: Tensor = u @ vt
    return product


def spans(q: Tensor, kept: int) -> Tensor:
    """The projector on the kept subspace."""
    return q[:, :kept] @ q[:, :kept].T


CHAIN = [orthogonal(seed) for seed in range(5)]


def made(name: str, kept: int) -> Rotations:
    """Five rotations with skips of this form."""
    sizes = {"cs": {"kept": kept}, "householder": {"reflections": 4}, "dense": {}}
    if name != "slice":
        return with_skips(Rotations("block", tuple(CHAIN)), name, **sizes[name])
    return Rotations("block", tuple(CHAIN), (SliceSkip(D, kept, kept),) * 3 + (SliceSkip(D, kept, D),))


# ---- every form: apply, dense and the rotations agree; counted work; configs


@pytest.mark.parametrize("kept", [1, 3, 6, 9, 11])
@pytest.mark.parametrize("name", ["dense", "cs", "householder", "slice"])
def test_a_skip_is_what_its_rotations_ask_for(name: str, kept: int) -> None:
    rotations = made(name, kept)
    assert orthogonality_error(rotations.matrices) < 1e-13
    x = torch.randn(3, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for form, a, b in zip(rotations.forms(), rotations.matrices[:-1], rotations.matrices[1:], strict=True):
        factors = form.factors(a, b)
        assert {n: tuple(f.shape) for n, f in factors.items()} == form.shapes()
        assert sum(f.numel() for f in factors.values()) == form.parameter_count()
        expected = a.T @ b
        if isinstance(form, SliceSkip):
            expected[form.kept_in :], expected[:, form.kept_out :] = 0, 0
        torch.testing.assert_close(form.dense(factors).T, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(form.apply(factors, x), x @ expected, rtol=0, atol=1e-12)
        assert form.apply({n: f.float() for n, f in factors.items()}, x.float()).dtype == torch.float32
        assert skip_from_config(form.to_config()) == form


@pytest.mark.parametrize(
    "form", [DenseSkip(D), CSSkip(D, 9, 3), CSSkip(D, 9, 2), CSSkip(D, 4, 4), HouseholderSkip(D, 5), SliceSkip(D, 8, D)]
)
def test_macs_are_the_counted_ones(form: SkipForm) -> None:
    factors = {name: torch.randn(shape) for name, shape in form.shapes().items()}
    with FlopCounterMode(display=False) as counter:
        form.apply(factors, torch.randn(7, D))
    assert counter.get_total_flops() == 2 * form.macs(7)


def test_sizes_are_those_of_the_derivation() -> None:
    """k = 3/4 d: 0.25 d^2 parameters and 0.4375 d^2 multiply-accumulates, but for one vector."""
    form = CSSkip(64, 48, 16)
    assert form.parameter_count() == 0.25 * 64**2 + 16
    assert form.macs(1) == 0.4375 * 64**2
    assert parameters_of("cs", 64, 3, kept=48) == 6 * form.parameter_count()
    assert parameters_of("householder", 64, 3, reflections=8) == 6 * (64 * 8 + 64)
    assert parameters_of("slice", 64, 3, kept=48) == 5 * 48**2 + 48 * 64
    assert parameters_of("dense", 64, 3) == 6 * 64**2
    assert parameters_of("none", 64, 3) == 0
    for wrong in ({"name": "cs"}, {"name": "householder"}, {"name": "slice"}, {"name": "thin", "kept": 3}):
        with pytest.raises(UsageError, match="give cs or slice with kept"):
            parameters_of(width=64, layers=3, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: CSSkip(D, 0, 1),
        lambda: CSSkip(D, D, 1),
        lambda: CSSkip(D, 9, 4),
        lambda: CSSkip(D, 2, 3),
        lambda: HouseholderSkip(D, 0),
        lambda: HouseholderSkip(D, D + 1),
        lambda: SliceSkip(D, D + 1, 4),
        lambda: SliceSkip(D, 4, 0),
        lambda: DenseSkip(0),
    ],
)
def test_wrong_sizes_are_refused(make: object) -> None:
    with pytest.raises(UsageError, match=r"must be in 1 \.\.\. "):
        make()  # type: ignore[operator]


# ---- the gauge


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("kept", [1, 4, 6, 9, 11])
def test_transport_keeps_the_subspaces(kept: int, near: bool) -> None:
    q = CHAIN[0]
    for target in CHAIN[1:]:
        before, q = q, transport(q, target, kept, near=near)
        torch.testing.assert_close(spans(q, kept), spans(target, kept), rtol=0, atol=1e-12)
        assert orthogonality_error([q]) < 1e-13
        rank = int((torch.linalg.svdvals(before.T @ q - torch.eye(D)) > 1e-10).sum())
        if near:
            assert rank <= 2 * min(kept, D - kept)
    torch.testing.assert_close(gauge_fix(CHAIN, kept)[0], CHAIN[0], rtol=0, atol=0)


def test_a_long_chain_stays_exact() -> None:
    rotations = with_skips(Rotations("block", tuple(orthogonal(s, 20) for s in range(120))), "cs", kept=15)
    a, b = rotations.matrices[-2:]
    form = rotations.skips[-1]
    torch.testing.assert_close(form.dense(form.factors(a, b)).T, a.T @ b, rtol=0, atol=1e-12)
    assert orthogonality_error(rotations.matrices) < 1e-12


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 0.5, torch.pi / 2])
def test_small_and_right_angles(angle: float) -> None:
    """One dropped direction turns by `angle` into the kept ones, another by a tenth of it, one not at all."""
    kept, turn = 9, torch.eye(D, dtype=torch.float64)
    for i, a in ((9, angle), (10, angle / 10)):
        c, s = torch.tensor(a, dtype=torch.float64).cos(), torch.tensor(a, dtype=torch.float64).sin()
        plane = torch.eye(D, dtype=torch.float64)
        plane[i, i], plane[i - 9, i - 9], plane[i, i - 9], plane[i - 9, i] = c, c, s, -s
        turn = turn @ plane
    own = torch.block_diag(orthogonal(1, kept), orthogonal(2, D - kept))  # an arbitrary gauge at the second position
    rotations = with_skips(Rotations("block", (CHAIN[0], CHAIN[0] @ turn @ own)), "cs", kept=kept)
    form = rotations.skips[0]
    assert isinstance(form, CSSkip)
    assert form.turned == (1 if angle == 0 else 2)  # not three: what does not turn costs nothing
    a, b = rotations.matrices
    torch.testing.assert_close(form.dense(form.factors(a, b)).T, a.T @ b, rtol=0, atol=1e-12)


def test_other_gauges_are_refused() -> None:
    fixed = with_skips(Rotations("block", tuple(CHAIN)), "cs", kept=9)
    with pytest.raises(UsageError, match=r"no cs skip .* misses the dense skip by"):
        fixed.skips[0].factors(CHAIN[0], CHAIN[1])
    few = replace(fixed.skips[0], turned=2)  # type: ignore[type-var]
    with pytest.raises(UsageError, match="no cs skip"):
        few.factors(*fixed.matrices[:2])
    with pytest.raises(UsageError, match="no householder skip"):
        HouseholderSkip(D, 3).factors(CHAIN[0], CHAIN[1])


def test_kept_dimensions_must_be_one() -> None:
    for same in (9, [9] * 5):
        assert torch.equal(gauge_fix(CHAIN, same)[-1], gauge_fix(CHAIN, 9)[-1])
    with pytest.raises(UsageError, match=r"kept dimensions \[6, 9\] differ"):
        gauge_fix(CHAIN, [9, 9, 6, 9, 9])
    for wrong in (0, D, D + 1):
        with pytest.raises(UsageError, match=f"{wrong} kept coordinates of {D}"):
            gauge_fix(CHAIN, wrong)


@pytest.mark.parametrize(
    ("kind", "skip", "sizes"),
    [("shared", "cs", {"kept": 9}), ("block", "cs", {}), ("block", "householder", {}), ("block", "slice", {"kept": 9})],
)
def test_skips_that_cannot_be_made(kind: str, skip: str, sizes: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"skip '{skip}' with"):
        with_skips(Rotations(kind, tuple(CHAIN[:1] if kind == "shared" else CHAIN)), skip, **sizes)


# ---- Householder chains


def as_matrix(factors: dict[str, Tensor]) -> Tensor:
    v, t = factors["V"], factors["T"]
    return torch.eye(len(v), dtype=torch.float64) - v @ t @ v.T


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_products_of_reflections_are_found(count: int) -> None:
    skip = torch.eye(D, dtype=torch.float64)
    for seed in range(count):
        skip = skip @ reflection(seed)
    torch.testing.assert_close(as_matrix(nearest_chain(skip, count)), skip, rtol=0, atol=1e-12)
    if count > 1:
        assert (as_matrix(nearest_chain(skip, count - 1)) - skip).norm() > 0.01


@pytest.mark.parametrize("reflections", range(1, D + 1))
@pytest.mark.parametrize("skip", [CHAIN[0], -torch.eye(D).double(), plane_rotation([1.0] * 4, 1, 3)])
def test_a_chain_is_orthogonal_and_no_longer_than_asked(skip: Tensor, reflections: int) -> None:
    factors = nearest_chain(skip, reflections)
    chain = as_matrix(factors)
    assert orthogonality_error([chain]) < 1e-13
    assert factors["V"].shape == (D, reflections)
    assert int((torch.linalg.svdvals(chain - torch.eye(D)) > 1e-10).sum()) <= reflections
    if reflections == D:
        torch.testing.assert_close(chain, skip, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("angles", "flips", "reflections", "error"),
    [
        ([2.0, 1.0, 0.5], 0, 2, [1.0, 0.5]),
        ([2.0, 1.0, 0.5], 1, 3, [1.0, 0.5]),
        ([1.0, 1.0, 1.0, 0.5], 0, 4, [1.0, 0.5]),  # equal angles: whole planes all the same
        ([1.0, 0.5], 0, 3, [0.5]),  # half a plane below 90 degrees is no help
        ([2.0, 1.0], 2, 2, [2.0, 1.0]),
    ],
)
def test_the_largest_angles_go_first(angles: list[float], flips: int, reflections: int, error: list[float]) -> None:
    """What is left out of a plane that turns by a costs ||R - I||^2 = 4 (1 - cos a)."""
    skip = plane_rotation(angles, flips, 3)
    left = (as_matrix(nearest_chain(skip, reflections)) - skip).square().sum()
    assert float(left) == pytest.approx(sum(4 - 4 * float(torch.tensor(a).cos()) for a in error), abs=1e-5)


@pytest.mark.parametrize("reflections", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_no_search_finds_a_nearer_chain(seed: int, reflections: int) -> None:
    """Descent over the reflections themselves, from many starts."""
    skip = orthogonal(seed, 4)
    ours = float((as_matrix(nearest_chain(skip, reflections)) - skip).square().sum())
    v = torch.randn(64, reflections, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    v.requires_grad_(True)
    optimizer = torch.optim.Adam([v], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        product = torch.eye(4, dtype=torch.float64).expand(64, 4, 4)
        for i in range(reflections):
            u = v[:, i] / v[:, i].norm(dim=1, keepdim=True)
            product = product - 2 * product @ u[:, :, None] @ u[:, None, :]
        losses = (product - skip).square().sum((1, 2))
        losses.sum().backward()
        optimizer.step()
    found = float(losses.detach().min())
    assert ours <= found + 1e-9
    assert found < ours + 1e-3  # the search itself gets there


def test_a_chain_of_rotations_is_exact_and_near() -> None:
    rotations, chain = chain_rotations(CHAIN, D)
    for q, wanted in zip(rotations, CHAIN, strict=True):
        torch.testing.assert_close(q, wanted, rtol=0, atol=1e-12)
    for kept in (9, 4):
        rotations, chain = chain_rotations(CHAIN, 2 * min(kept, D - kept), kept)
        for q, wanted in zip(rotations, CHAIN, strict=True):  # enough reflections: the subspaces are those asked for
            torch.testing.assert_close(spans(q, kept), spans(wanted, kept), rtol=0, atol=1e-12)
    rotations, chain = chain_rotations(CHAIN, 3)
    for a, b, factors in zip(rotations[:-1], rotations[1:], chain, strict=True):
        torch.testing.assert_close(a @ as_matrix(factors), b, rtol=0, atol=1e-13)
    assert (rotations[1] - CHAIN[1]).norm() > 0.1
    with pytest.raises(UsageError, match="reflections of a householder skip"):
        chain_rotations(CHAIN, D + 1)


def test_a_shared_rotation_needs_no_reflection() -> None:
    """Equal rotations: the chain of one reflection does nothing, or next to it."""
    rotations, chain = chain_rotations([CHAIN[0]] * 3, 1)
    assert all(float((q - CHAIN[0]).abs().max()) < 1e-12 for q in rotations)
    assert all(float(factors["T"].abs().max()) < 1e-12 for factors in chain)


# ---- config.json


def test_configs_of_all_skips() -> None:
    forms = (CSSkip(D, 9, 3), CSSkip(D, 9, 2))
    assert skips_from_config("cs", [f.to_config() for f in forms], D, 1) == forms
    assert skips_from_config("dense", None, D, 1) == (DenseSkip(D),) * 2  # as checkpoints had it before
    assert skips_from_config("none", None, D, 1) == ()


@pytest.mark.parametrize(
    ("skip", "config", "says"),
    [
        ("cs", None, "needs the integers"),
        ("thin", None, "must be one of dense, cs"),
        ("none", [{"form": "dense", "width": D}] * 2, "'none' skips"),
        ("dense", [{"form": "dense", "width": D}], "skip_config of 2 skips"),
        ("dense", {"form": "dense", "width": D}, "skip_config of 2 skips"),
        ("dense", [{"form": "dense", "width": 8}] * 2, "width 12"),
        ("cs", [{"form": "dense", "width": D}] * 2, "'cs' skips"),
        ("cs", [{"form": "cs", "width": D, "kept": 9, "turned": 9}] * 2, "sizes that do not fit"),
        ("cs", [{"form": "cs", "width": D, "kept": 9, "turned": True}] * 2, "needs the integers"),
        ("cs", [{"form": "cs", "width": D, "kept": 9, "turned": 3, "more": 1}] * 2, "needs the integers"),
        ("cs", [3, 4], "must be one of"),
        ("cs", [{"form": ["cs"]}] * 2, "must be one of"),
    ],
)
def test_wrong_configs_are_refused(skip: str, config: object, says: str) -> None:
    with pytest.raises(ArtifactError, match=says):
        skips_from_config(skip, config, D, 1)
