"""Groups of linears: menus over real blocks, moments of rewritten blocks, plans that predict the errors of the fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.allocation.budget import cost_of, unit_of
from compress.allocation.groups import LayerMenus
from compress.allocation.menus import Linear
from compress.allocation.plan import Plan
from compress.architecture import SUB_BLOCKS, WRITERS, position_of
from compress.calibration.metric import loss_metric
from compress.calibration.moments import StatisticsFolder, collect
from compress.calibration.streams import Runner
from compress.linalg import damped, weighted_error
from compress.recipe import Recipe, kinds_of
from compress.rewrites.folding import folded
from compress.rewrites.inner import InnerRewrites, RewrittenModel
from compress.rewrites.rotations import rotate_block
from compress.source.model import ModelSource
from compress.structures import LowRankStructure, SelectStructure, Structure, structure_from_config
from compress.structures.joint import joint_fit, leader_of
from tests import tiny
from tests.compress import helpers
from tests.compress.helpers import LENGTH, TinyModel, make_plan, relative, tiny_source

F64 = torch.float64


def recipe(**changes: Any) -> Recipe:
    return helpers.recipe(Path("unread.txt"), **{"ratio": 0.6, **changes})


def statistics(source: ModelSource, folder: Path, model: Any = None) -> StatisticsFolder:
    arch = source.architecture()
    runner = Runner(arch, LENGTH, torch.device("cpu"), 4)
    tokens = tiny.token_ids(12, LENGTH)
    return collect(
        model or folded(source), tokens, sensitivity="fisher", seed=0, runner=runner, kept=helpers.kept_in(folder)
    )


@pytest.fixture(scope="module")
def moments(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> StatisticsFolder:
    """Of tiny_llama."""
    return statistics(tiny_source(tiny_model, "tiny_llama"), tmp_path_factory.mktemp("moments"))


@pytest.fixture
def source(tiny_model: TinyModel) -> ModelSource:
    return tiny_source(tiny_model, "tiny_llama")


def menus_of(source: ModelSource, wanted: Recipe, moments: StatisticsFolder) -> LayerMenus:
    unit = unit_of(source.architecture(), wanted)
    return LayerMenus(folded(source), wanted, moments, None, kinds_of(wanted), unit, cost_of(wanted))


# ---- rewrites


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_opt", "tiny_qwen3"])
def test_rewritten_moments_are_those_of_the_rewritten_model(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_source(tiny_model, name)
    arch, generator = source.architecture(), torch.Generator().manual_seed(0)
    kv, size = arch.num_kv_heads, arch.head_dim
    bases = torch.linalg.qr(torch.randn(kv, size, size, generator=generator, dtype=F64)).Q
    bases = bases * torch.linspace(0.5, 2, size, dtype=F64)[:, None]  # invertible, not orthogonal
    orders = {1: torch.randperm(arch.intermediate_size, generator=generator)}
    # With biases, that of v moves to o: the moment of what o reads is then of other values (see `input_moment`).
    rewrites = InnerRewrites(orders, {} if arch.has_bias("attn.v") else {2: bases})
    plain = statistics(source, tmp_path / "plain")
    expected = statistics(source, tmp_path / "rewritten", RewrittenModel(folded(source), rewrites))
    for (layer, sub), moment in plain.items():
        found, right = moment.rewritten(rewrites, arch, layer, sub), expected[layer, sub]
        assert relative(found.read, right.read) < 1e-4
        assert relative(found.inner, right.inner) < 1e-4
        assert found.gradients is not None
        assert right.gradients is not None
        assert found.gradients.keys() == right.gradients.keys()
        for role, gradient in found.gradients.items():
            assert relative(gradient, right.gradients[role]) < 1e-3, (layer, role)
    changed = plain[1, "mlp"].inner, expected[1, "mlp"].inner
    assert relative(*changed) > 0.01


# ---- groups and their menus


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({"structure": "lowrank"}, [[role] for role in ("q", "k", "v", "o", "gate", "up", "down")]),
        ({"structure": "lowrank", "joint": True}, [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]),
        ({"structure": "auto"}, [["q"], ["k"], ["v"], ["o"], ["gate", "up", "down"]]),
        ({"structure": "auto", "inner": ["vo"]}, [["q"], ["k"], ["v", "o"], ["gate"], ["up"], ["down"]]),
        (
            {"structure": "auto", "inner": ["vo", "neurons"], "joint": True},
            [["q", "k"], ["v", "o"], ["gate", "up", "down"]],
        ),
        ({"structure": "gs", "inner": ["vo"]}, [["q"], ["k"], ["v", "o"], ["gate"], ["up"], ["down"]]),
    ],
)
def test_every_linear_is_in_one_group(
    changes: dict[str, Any], groups: list[list[str]], source: ModelSource, moments: StatisticsFolder
) -> None:
    arch, found = source.architecture(), list[list[str]]()
    for (layer, _), menu in menus_of(source, recipe(**changes), moments).of(1, None):
        assert layer == 1
        roles = list(menu[0].label)
        assert all(list(choice.label) == roles for choice in menu)
        found.append([role.partition(".")[2] for role in roles])
        # The dearest choice is to leave all as it is, and nothing costs more.
        assert [structure.name for structure, _ in menu[-1].label.values()] == ["dense"] * len(roles)
        dense = sum(arch.linears()[role][0] * arch.linears()[role][1] for role in roles)
        assert (menu[-1].cost, menu[-1].loss) == (dense, 0)
        for choice in menu:
            assert choice.cost == sum(structure.parameter_count() for structure, _ in choice.label.values())
            assert choice.loss == pytest.approx(sum(loss for _, loss in choice.label.values()), abs=1e-12)
            for role, (structure, _) in choice.label.items():
                assert (structure.out_features, structure.in_features) == arch.linears()[role]
    assert sorted(found) == sorted(groups)


@pytest.mark.parametrize("name", ["tiny_opt", "tiny_qwen3"])
def test_groups_of_other_families(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """An MLP without a gate; heads wider than their share of the stream."""
    source = tiny_source(tiny_model, name)
    menus = menus_of(source, recipe(structure="auto", inner=["vo", "neurons"]), statistics(source, tmp_path))
    roles = [role for _, menu in menus.of(0, None) for role in menu[0].label]
    assert sorted(roles) == sorted(source.architecture().linears())


def test_selections_are_aligned(source: ModelSource, moments: StatisticsFolder) -> None:
    menus = menus_of(source, recipe(structure="auto", inner=["vo", "neurons"]), moments)
    kept: dict[str, set[int]] = {"vo": set(), "neurons": set()}
    for (_, option), menu in menus.of(0, None):
        for choice in menu:
            kept.get(option, set()).update(
                structure.kept for structure, _ in choice.label.values() if isinstance(structure, SelectStructure)
            )
    assert kept["vo"]
    assert kept["neurons"]
    assert all(k % menus.head_unit == 0 and 4 <= k < 16 for k in kept["vo"])  # heads of 16
    assert all(k % menus.neuron_unit == 0 and 40 <= k < 160 for k in kept["neurons"])


# ---- plans


PLANS: list[tuple[dict[str, Any], set[str]]] = [
    ({"structure": "lowrank"}, {"lowrank"}),
    ({"structure": "lowrank", "sensitivity": "none"}, {"lowrank"}),
    ({"structure": "lowrank", "joint": True}, {"lowrank"}),
    ({"structure": "lowrank", "inner": ["neurons", "vo"], "ratio": 0.4}, {"lowrank", "select"}),
    ({"structure": "pifa"}, {"pifa"}),
    ({"structure": "auto", "joint": True, "inner": ["vo"], "menu": ["lowrank"]}, {"lowrank", "select"}),
    ({"structure": "auto", "allocation": "uniform"}, {"pifa", "select"}),
    ({"structure": "kron"}, {"kron"}),
    ({"structure": "kron", "rotation": "block", "ratio": 0.7}, {"kron"}),
    ({"structure": "kron", "inner": ["neurons", "vo"]}, {"kron", "select"}),
    ({"structure": "auto", "rotation": "shared", "joint": True, "ratio": 0.5}, {"select"}),
]


def linears_of(
    source: ModelSource, wanted: Recipe, moments: StatisticsFolder, plan: Plan, layer: int
) -> dict[str, Linear]:
    """The block of the plan: rewritten, and each linear in the coordinates of its rotation."""
    arch, model = source.architecture(), RewrittenModel(folded(source), plan.rewrites)
    weights = rotate_block(model.block(layer), arch, layer, plan.rotations)
    found = {}
    for sub in SUB_BLOCKS:
        moment = moments[layer, sub].rewritten(plan.rewrites, arch, layer, sub)
        for role in (*arch.readers(sub), WRITERS[sub]):
            gram = damped(moment.gram(role), wanted.gram_damping)
            metric = loss_metric(wanted, moment, role, model.block(layer)[f"{role}.weight"])
            q = plan.rotations.at(position_of(layer, role))
            if q is not None and role in WRITERS.values():
                metric = q.T @ metric @ q
            elif q is not None:
                gram = q.T @ gram @ q
            found[role] = Linear(role, weights[f"{role}.weight"].double(), gram, metric, arch.side(role))
    return found


def lost(x: Linear, approximation: Tensor) -> float:
    return float(weighted_error(x.weight, approximation, x.gram, x.metric))


def fitted_error(linears: dict[str, Linear], structures: dict[str, Structure], role: str) -> float:
    """Of the fit of a linear, together with those that use its V. Outputs that are dropped are made up for by who reads
    the others: what is kept is fitted by itself."""
    x, structure = linears[role], structures[role]
    if isinstance(structure, SelectStructure) and structure.side == "out":
        rows = structure.features()
        x = Linear(role, x.weight[rows], x.gram, x.metric[rows][:, rows], "in")
        structure = structure.reduced
    group = [x, *(linears[r] for r, s in structures.items() if getattr(s, "shares", None) == role)]
    if len(group) == 1:
        return lost(x, structure.dense(structure.fit(x.weight, x.gram, x.metric)))
    assert isinstance(structure, LowRankStructure)
    V, parts = joint_fit([m.weight for m in group], structure.rank, x.gram, [m.metric for m in group])
    return sum(lost(m, U @ V) for m, U in zip(group, parts, strict=True))


@pytest.mark.parametrize(("changes", "expected"), PLANS)
def test_predicted_losses_are_the_errors_of_the_fits(
    changes: dict[str, Any], expected: set[str], source: ModelSource, moments: StatisticsFolder
) -> None:
    """Every linear fitted by itself to the dense model's moments; those that share a V together."""
    wanted = recipe(**changes)
    plan, arch = make_plan(folded(source), wanted, moments), source.architecture()
    assert set(plan.predicted) == {f"layers.{i}.{role}" for i in range(arch.num_layers) for role in arch.linears()}
    assert expected <= {s.name for s in plan.structures.values()}
    assert any(getattr(s, "shares", None) for s in plan.structures.values()) == (
        wanted.joint and "kron" not in kinds_of(wanted)
    )
    for layer in range(arch.num_layers):
        prefix, linears = f"layers.{layer}.", linears_of(source, wanted, moments, plan, layer)
        here = {n.removeprefix(prefix): s for n, s in plan.structures.items() if n.startswith(prefix)}
        for role in linears:
            follows = leader_of(plan.structures, prefix + role) is not None  # its loss is booked to the leader
            error = 0 if follows or role not in here else fitted_error(linears, here, role)
            assert plan.predicted[prefix + role] == pytest.approx(error, rel=1e-4, abs=1e-9), prefix + role


def test_uniform_low_rank_keeps_the_share_that_is_asked(source: ModelSource, moments: StatisticsFolder) -> None:
    """Each linear within a step of it; the lower hull of its sizes and dense lacks those near the break-even."""
    wanted = recipe(structure="lowrank", allocation="uniform", sensitivity="none", unit=1, ratio=0.75)
    plan, arch = make_plan(folded(source), wanted, moments), source.architecture()
    for layer in range(arch.num_layers):
        for role, (n, m) in arch.linears().items():
            kept = plan.structures[f"layers.{layer}.{role}"].parameter_count()
            assert 0.75 * n * m - (n + m) <= kept <= 0.75 * n * m + (n + m), role


def test_choices_by_name_bring_their_rewrites(source: ModelSource, moments: StatisticsFolder) -> None:
    """Those of the recipe's layers alone, and the same as a plan finds."""
    planned = make_plan(folded(source), recipe(structure="auto", inner=["vo", "neurons"], ratio=0.5), moments)
    assert planned.rewrites.orders
    assert planned.rewrites.bases
    order, basis = min(planned.rewrites.orders), min(planned.rewrites.bases)
    names = [f"layers.{order}.mlp.{r}" for r in ("gate", "up", "down")] + [f"layers.{basis}.attn.{r}" for r in "vo"]
    layers = {name: planned.structures[name].to_config() for name in names}
    given = make_plan(folded(source), recipe(structure="dense", layers=layers), moments)
    assert given.structures == {name: structure_from_config(config) for name, config in layers.items()}
    assert (list(given.rewrites.orders), list(given.rewrites.bases)) == ([order], [basis])
    assert torch.equal(given.rewrites.orders[order], planned.rewrites.orders[order])
    assert torch.equal(given.rewrites.bases[basis], planned.rewrites.bases[basis])


def test_the_same_plan_again(source: ModelSource, moments: StatisticsFolder) -> None:
    for changes, _ in PLANS[::3]:
        a, b = (make_plan(folded(source), recipe(**changes), moments) for _ in range(2))
        assert (a.structures, a.predicted) == (b.structures, b.predicted)
        assert all(torch.equal(x, y) for x, y in zip(a.rotations.matrices, b.rotations.matrices, strict=True))
