"""Menus: every predicted loss against the fit that it predicts, every hull against all combinations."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from compress.allocation.choose import Choice, convex_hull
from compress.allocation.menus import (
    Linear,
    dense_choice,
    joint_menu,
    leading_menu,
    linear_menu,
    merged,
    reduced,
    selected_menu,
)
from compress.allocation.selection import neuron_order, value_output_basis
from compress.errors import UsageError
from compress.linalg import weighted_error
from compress.rewrites.inner import permute_neurons
from compress.structures import (
    DenseStructure,
    GroupShuffleStructure,
    KroneckerStructure,
    LowRankStructure,
    PivotedStructure,
    SelectStructure,
    Structure,
)
from compress.structures.base import Side
from compress.structures.gs_fit import cut
from compress.structures.joint import joint_fit
from tests.compress.helpers import F64, normal


def moment(size: int, seed: int, blocks: int = 1) -> Tensor:
    """Positive definite with a falling spectrum, zero outside of `blocks` diagonal blocks."""
    step, parts = size // blocks, []
    for i in range(blocks):
        q = torch.linalg.qr(normal(step, step, seed=100 * seed + i)).Q
        parts.append((q / torch.arange(1, step + 1, dtype=F64)) @ q.T)
    return torch.block_diag(*parts)


def linear(
    n: int, m: int, seed: int, side: Side = "in", role: str = "mlp.up", blocks: tuple[int, int] = (1, 1)
) -> Linear:
    """blocks: of the Gram matrix and of the metric."""
    weight = normal(n, m, seed=seed)
    return Linear(role, weight, moment(m, seed + 1, blocks[0]), moment(n, seed + 2, blocks[1]), side)


def parameters(structure: Structure) -> float:
    return float(structure.parameter_count())


def error(x: Linear, approximation: Tensor) -> float:
    return float(weighted_error(x.weight, approximation, x.gram, x.metric))


def fitted_error(x: Linear, structure: Structure) -> float:
    """tr(H E G E^T) of the actual fit."""
    return error(x, structure.dense(structure.fit(x.weight, x.gram, x.metric)))


def only(choice: Choice) -> tuple[Structure, float]:
    """The structure and loss of a choice for one linear."""
    [(structure, loss)] = choice.label.values()
    assert (choice.cost, choice.loss) == (parameters(structure), loss)
    return structure, loss


def is_hull(menu: Sequence[Choice]) -> bool:
    """In order of cost, the loss falling ever more slowly."""
    slopes = [(b.loss - a.loss) / (b.cost - a.cost) for a, b in itertools.pairwise(menu)]
    steps = [b.cost - a.cost for a, b in itertools.pairwise(menu)]
    return all(s > 0 for s in steps) and all(s < 0 for s in slopes) and slopes == sorted(slopes)


# ---- one linear


@pytest.mark.parametrize(("n", "m"), [(24, 16), (16, 24), (16, 16)])
@pytest.mark.parametrize("kind", [LowRankStructure, PivotedStructure], ids=lambda kind: kind.name)
def test_a_rank_is_as_good_as_its_fit(kind: type[Structure], n: int, m: int) -> None:
    x = linear(n, m, seed=n)
    menu = linear_menu(x, (kind.name,), 2, parameters)
    assert is_hull(menu)
    assert menu[-1].label == {"mlp.up": (DenseStructure(m, n), 0.0)}
    ranks = []
    for choice in menu[:-1]:
        structure, loss = only(choice)
        assert isinstance(structure, kind)
        assert loss == pytest.approx(fitted_error(x, structure), rel=1e-9)
        ranks.append(structure.rank)  # type: ignore[attr-defined]
    assert ranks == list(range(2, ranks[-1] + 1, 2))
    assert len(ranks) >= 3 + (kind is PivotedStructure)


@pytest.mark.parametrize("side", ["in", "out"])
def test_leading_coordinates_are_as_good_as_their_fit(side: Side) -> None:
    """In rotated coordinates: readers W Q and Q^T G Q, writers Q^T W and Q^T H Q."""
    x = linear(12, 16, seed=1) if side == "in" else linear(16, 12, seed=1, side="out")
    q = torch.linalg.qr(normal(16, 16, seed=5)).Q
    curve = x.term().curve(q)
    rotated = (
        Linear(x.role, x.weight @ q, q.T @ x.gram @ q, x.metric, side)
        if side == "in"
        else Linear(x.role, q.T @ x.weight, x.gram, q.T @ x.metric @ q, side)
    )
    n, m = x.weight.shape
    menu = leading_menu(x.role, (m, n), side, curve, 2, parameters)
    assert [only(choice)[0].kept for choice in menu] == list(range(2, 16, 2))  # type: ignore[attr-defined]
    for choice in menu:
        structure, loss = only(choice)
        assert isinstance(structure, KroneckerStructure)
        assert structure.mix == "leading"
        assert loss == pytest.approx(fitted_error(rotated, structure), rel=1e-9)


def test_leading_coordinates_in_the_best_basis_lose_as_little_as_low_rank() -> None:
    """One linear alone: the rotation that its own whitened spectrum asks for makes kron the low rank of that width."""
    x = linear(20, 16, seed=2)
    left, right = torch.linalg.cholesky(x.metric), torch.linalg.cholesky(x.gram)
    v = torch.linalg.svd(left.T @ x.weight @ right).Vh.T
    q = torch.linalg.qr(torch.linalg.solve_triangular(right.T, v, upper=True)).Q
    curve = x.term().curve(q)
    for rank in (3, 8, 12):
        assert float(curve[rank]) == pytest.approx(fitted_error(x, LowRankStructure(16, 20, rank)), rel=1e-8)


def test_group_and_shuffle_is_exact_where_nothing_couples_the_parts() -> None:
    x = linear(96, 64, seed=3, blocks=(2, 3))  # left blocks cut the inputs, right blocks the outputs
    structure = GroupShuffleStructure(64, 96, 2, 3, 8)
    menu = linear_menu(x, ("gs",), 16, parameters)
    found = {only(choice)[0]: only(choice)[1] for choice in menu}
    assert structure in found
    assert found[structure] == pytest.approx(fitted_error(x, structure), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_group_and_shuffle_brackets_what_couples_the_parts(seed: int) -> None:
    """With the diagonal blocks D of H (x) G, and s the eigenvalues of H (x) G relative to D:

    min s <= optimum / curve, and the factors that are best part by part are within max s of the curve.
    """
    x = linear(96, 64, seed=10 + seed)
    menu = linear_menu(x, ("gs",), 16, parameters)
    found = {s: loss for s, loss in map(only, menu) if isinstance(s, GroupShuffleStructure)}
    assert found
    for structure, loss in found.items():
        low = high = 1.0
        for whole, count in ((x.gram, structure.left_blocks), (x.metric, structure.right_blocks)):
            size = len(whole) // count
            blocks = [whole[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)]
            factor = torch.linalg.cholesky(torch.block_diag(*blocks))
            half = torch.linalg.solve_triangular(factor, whole, upper=False)
            values = torch.linalg.eigvalsh(torch.linalg.solve_triangular(factor, half.T, upper=False))
            low, high = low * float(values[0]), high * float(values[-1])
        assert low * loss <= fitted_error(x, structure)
        parts = cut(x.weight, structure.right_blocks, structure.left_blocks)
        rows, columns = structure.part
        total, approximation = 0.0, torch.zeros_like(x.weight)
        for r, left in itertools.product(range(structure.right_blocks), range(structure.left_blocks)):
            at = slice(r * rows, (r + 1) * rows), slice(left * columns, (left + 1) * columns)
            part = Linear("", parts[r, left], x.gram[at[1], at[1]], x.metric[at[0], at[0]], "in")
            best = LowRankStructure(columns, rows, structure.rank)
            approximation[at] = best.dense(best.fit(part.weight, part.gram, part.metric))
            total += error(part, approximation[at])
        assert loss == pytest.approx(total, rel=1e-8)
        assert error(x, approximation) <= high * loss * (1 + 1e-9)


def test_of_several_structures_the_hull_takes_the_best() -> None:
    x = linear(96, 64, seed=4, blocks=(2, 3))
    both = linear_menu(x, ("lowrank", "gs"), 16, parameters)
    alone = [linear_menu(x, (kind,), 16, parameters) for kind in ("lowrank", "gs")]
    assert is_hull(both)
    assert {c.cost for c in both} <= {c.cost for menu in alone for c in menu}
    for choice in itertools.chain(*alone):
        assert choice.loss >= envelope(both, choice.cost) * (1 - 1e-12)


def test_costs_are_the_caller_s() -> None:
    x = linear(24, 16, seed=5)
    menu = linear_menu(x, ("lowrank",), 4, lambda s: 0.25 * s.macs(1) + 7)
    assert [c.cost for c in menu] == [0.25 * only_structure(c).macs(1) + 7 for c in menu]


def only_structure(choice: Choice) -> Structure:
    [(structure, _)] = choice.label.values()
    return structure


def test_a_structure_without_a_curve_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"structure 'compot' has no predicted loss to allocate by: choose gs, lowrank, pifa"
    ):
        linear_menu(linear(24, 16, seed=6), ("compot",), 4, parameters)


# ---- several linears


def envelope(hull: Sequence[Choice], cost: float) -> float:
    """The hull's loss at a cost; infinite left of it."""
    if cost < hull[0].cost:
        return float("inf")
    for a, b in itertools.pairwise(hull):
        if a.cost <= cost <= b.cost:
            return a.loss + (b.loss - a.loss) * (cost - a.cost) / (b.cost - a.cost)
    return hull[-1].loss


def random_hull(rng: random.Random, role: str) -> list[Choice]:
    size = rng.randint(1, 6)
    costs = sorted(rng.sample(range(1, 40), size))
    losses = sorted((rng.choice([rng.random(), rng.randint(0, 4) / 4]) for _ in range(size)), reverse=True)
    return convex_hull(
        [Choice({role: (i, loss)}, float(c), loss) for i, (c, loss) in enumerate(zip(costs, losses, strict=True))]
    )


@pytest.mark.parametrize("seed", range(30))
def test_merged_is_the_hull_of_all_combinations(seed: int) -> None:
    rng = random.Random(seed)
    menus = [random_hull(rng, f"role {i}") for i in range(rng.randint(1, 4))]
    every = [
        Choice(None, sum(c.cost for c in picked), sum(c.loss for c in picked)) for picked in itertools.product(*menus)
    ]
    hull, found = convex_hull(every), merged(menus)
    assert len(found) == sum(len(menu) - 1 for menu in menus) + 1
    assert (found[0].cost, found[-1].cost) == (hull[0].cost, hull[-1].cost)
    for choice in found:  # each is a combination, and on the hull
        assert choice.loss == pytest.approx(envelope(hull, choice.cost), abs=1e-12)
        assert list(choice.label) == [f"role {i}" for i in range(len(menus))]
        assert choice.loss == pytest.approx(sum(loss for _, loss in choice.label.values()), abs=1e-12)
    for corner in hull:  # and no corner is missing
        assert any(c.cost == corner.cost and c.loss == pytest.approx(corner.loss, abs=1e-12) for c in found)


def test_a_shared_factor_is_as_good_as_its_fit() -> None:
    roles = ("attn.q", "attn.k", "attn.v")
    whole = linear(24, 20, seed=7)
    linears = [
        Linear(role, normal(n, 20, seed=20 + n), whole.gram, moment(n, 30 + n), "in")
        for role, n in zip(roles, (24, 12, 8), strict=True)
    ]
    menu = joint_menu(linears, 4, parameters)
    assert len(menu) >= 2
    for choice in menu:
        structures = {role: structure for role, (structure, _) in choice.label.items()}
        assert list(structures) == list(roles)
        assert [s.shares for s in structures.values()] == [None, "attn.q", "attn.q"]  # type: ignore[attr-defined]
        [rank] = {s.rank for s in structures.values()}  # type: ignore[attr-defined]
        V, parts = joint_fit([x.weight for x in linears], rank, whole.gram, [x.metric for x in linears])
        lost = sum(error(x, U @ V) for x, U in zip(linears, parts, strict=True))
        assert choice.loss == pytest.approx(lost, rel=1e-9)
        assert choice.loss == sum(loss for _, loss in choice.label.values())
        assert choice.cost == V.numel() + sum(U.numel() for U in parts)
        assert choice.cost < sum(x.weight.numel() for x in linears)


# ---- selections


def mlp(seed: int, inner: int = 24, d: int = 10) -> dict[str, Linear]:
    """The MLP in the order in which leading neurons matter most, and its down with the metric of `neuron_order`."""
    read, hidden = moment(d, seed), moment(inner, seed + 1)
    weights = {f"mlp.{r}.weight": normal(inner, d, seed=seed + i) for i, r in enumerate(("gate", "up"))}
    weights["mlp.down.weight"] = normal(d, inner, seed=seed + 3)
    metrics = {"mlp.gate": moment(inner, seed + 4), "mlp.up": moment(inner, seed + 5), "mlp.down": moment(d, seed + 6)}
    order, _ = neuron_order(weights["mlp.down.weight"], hidden, 2 * metrics["mlp.down"])

    class Arch:
        intermediate_size = inner

        @staticmethod
        def readers(sub: str) -> tuple[str, ...]:
            return ("mlp.gate", "mlp.up")

    turned = permute_neurons(weights, Arch, order)  # type: ignore[arg-type]
    found = {}
    for role, metric in metrics.items():
        down = role == "mlp.down"
        gram, h = (hidden[order][:, order], metric) if down else (read, metric[order][:, order])
        found[role] = Linear(role, turned[f"{role}.weight"], gram, h, "out" if down else "in")
    return found


@pytest.mark.parametrize("core", ["dense", "lowrank", "pifa"])
@pytest.mark.parametrize("seed", [40, 60])
def test_dropped_neurons_are_as_good_as_the_fits(core: str, seed: int) -> None:
    """Rows that stay in gate and up, fitted by themselves, and a down that is refitted to what is left to read."""
    linears, unit = mlp(seed), 4
    down = linears["mlp.down"]
    _, curve = neuron_order(down.weight, down.gram, 2 * down.metric)
    kinds = () if core == "dense" else (core,)

    def menu_of(role: str, select: SelectStructure | None) -> list[Choice]:
        return linear_menu(linears[role] if select is None else reduced(linears[role], select), kinds, 2, parameters)

    sizes = range(unit, 24, unit)
    menu = selected_menu(linears, dict.fromkeys(linears, 1), curve, sizes, menu_of)
    assert is_hull(menu)
    assert menu[-1].loss == 0
    seen, cores = 0, set[str]()
    for choice in menu:
        structures = {role: structure for role, (structure, _) in choice.label.items()}
        assert choice.cost == sum(map(parameters, structures.values()))
        assert choice.loss == pytest.approx(sum(loss for _, loss in choice.label.values()), abs=1e-12)
        if structures["mlp.down"].name != "select":
            continue
        seen += 1
        [kept] = {s.kept for s in structures.values()}  # type: ignore[attr-defined]
        assert [s.side for s in structures.values()] == ["out", "out", "in"]  # type: ignore[attr-defined]
        total = fitted_error(down, structures["mlp.down"])
        for role in ("mlp.gate", "mlp.up"):
            select = structures[role]
            assert isinstance(select, SelectStructure)
            rows = reduced(linears[role], select)
            assert torch.equal(rows.weight, linears[role].weight[:kept])
            total += fitted_error(rows, select.reduced)
        assert choice.loss == pytest.approx(total, rel=1e-8)
        cores |= {"dense" if s.core is None else s.core.name for s in structures.values()}  # type: ignore[attr-defined]
    assert seen >= 2
    assert core in cores


def test_dropped_values_are_as_good_as_the_fit_of_o() -> None:
    """Two query heads a key-value head: o keeps the leading values of each of its heads, v those of its own."""
    kv, heads, size, d = 2, 4, 6, 10
    v_weight, o_weight = normal(kv * size, d, seed=1), normal(d, heads * size, seed=2)
    gram, metric = moment(heads * size, 3), moment(d, 4)
    basis, curve = value_output_basis(o_weight, gram, 2 * metric, kv, size)
    turn = torch.block_diag(*basis.repeat_interleave(heads // kv, dim=0))
    o = Linear("attn.o", o_weight @ torch.linalg.inv(turn), turn @ gram @ turn.T, metric, "out")
    v = Linear("attn.v", torch.block_diag(*basis) @ v_weight, moment(d, 5), moment(kv * size, 6), "in")
    linears = {"attn.v": v, "attn.o": o}

    def menu_of(role: str, select: SelectStructure | None) -> list[Choice]:
        n, m = linears[role].weight.shape
        return [dense_choice(role, *((m, n) if select is None else select.reduced_sizes), parameters)]

    menu = selected_menu(linears, {"attn.v": kv, "attn.o": heads}, curve, range(1, size), menu_of)
    assert len(menu) >= 3
    for choice in menu[:-1]:
        structures = [structure for structure, _ in choice.label.values()]
        assert [s.groups for s in structures] == [kv, heads]  # type: ignore[attr-defined]
        assert choice.loss == pytest.approx(fitted_error(o, structures[1]), rel=1e-8)
        [kept] = {s.kept for s in structures}  # type: ignore[attr-defined]
        assert choice.cost == kept * (kv * d + heads * d)
