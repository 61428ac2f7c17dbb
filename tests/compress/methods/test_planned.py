"""Plans: budgets that hold, sizes that group as the stream does, and refusals before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.allocation.budget import budget_parameters, default_unit
from compress.allocation.plan import Plan
from compress.allocation.size import model_size, overhead_parameters
from compress.architecture import SUB_BLOCKS, WRITERS
from compress.calibration.moments import StreamMoments
from compress.errors import UsageError
from compress.methods.registry import check_recipe
from compress.recipe import Recipe
from compress.rewrites.folding import folded
from compress.rewrites.rotations import orthogonality_error
from compress.source.model import ModelSource
from compress.structures import KroneckerStructure
from tests.compress import helpers
from tests.compress.helpers import TinyModel, make_plan, tiny_source

MODELS = ["tiny_llama", "tiny_llama_tied", "tiny_opt", "tiny_qwen3"]
VARIANTS = [
    ("kron", "shared"),
    ("kron", "block"),
    ("kron", "none"),
    ("gs", "none"),
    ("gs", "shared"),
    ("lowrank", "none"),
    ("pifa", "none"),
    ("auto", "none"),
    ("auto", "shared"),
    ("auto", "block"),
]


RANK_4 = {"structure": "lowrank", "in_features": 64, "out_features": 32, "rank": 4}


def recipe(**changes: Any) -> Recipe:
    return helpers.recipe(Path("unread.txt"), **changes)


def random_moments(source: ModelSource, gradients: bool = True) -> dict[tuple[int, str], StreamMoments]:
    """Moments with falling spectra, and gradients whose size differs between sub-blocks."""
    arch, generator = source.architecture(), torch.Generator().manual_seed(0)

    def moment(width: int, scale: float) -> Tensor:
        half = torch.randn(width, width, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(half).Q
        return scale * (basis * 0.9 ** torch.arange(width, dtype=torch.float64)) @ basis.T

    d, found = arch.hidden_size, {}
    for layer in range(arch.num_layers):
        for sub in SUB_BLOCKS:
            weight = 10.0 ** (layer - 1)
            found[layer, sub] = StreamMoments(
                moment(d, 1),
                moment(arch.linears()[WRITERS[sub]][1], 1),
                {role: moment(arch.linears()[role][0], weight) for role in (*arch.readers(sub), WRITERS[sub])}
                if gradients
                else None,
            )
    return found


def plan_of(source: ModelSource, **changes: Any) -> Plan:
    gradients = changes.get("sensitivity") != "none"
    return make_plan(folded(source), recipe(**changes), random_moments(source, gradients))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("structure", "rotation"), VARIANTS)
def test_budget_holds(name: str, structure: str, rotation: str, tiny_model: TinyModel) -> None:
    source = tiny_source(tiny_model, name)
    arch, ratio = source.architecture(), 0.8
    plan = plan_of(source, structure=structure, rotation=rotation, ratio=ratio, rotation_iterations=2)
    size = model_size(arch, plan.structures, plan.rotations.kind)
    assert plan.rotations.kind == rotation
    assert 0.8 * ratio < size.ratio <= ratio
    assert size.structured_linears == len(plan.structures) > 0
    kinds = {"pifa", "kron", "select"} if structure == "auto" else {structure}
    assert {s.name for s in plan.structures.values()} <= kinds
    assert len(plan.rotations.matrices) == {"none": 0, "shared": 1, "block": 2 * arch.num_layers + 1}[rotation]
    assert orthogonality_error(plan.rotations.matrices) < 1e-10
    for linear, spec in plan.structures.items():
        n, m = arch.linears()[linear.split(".", 2)[2]]
        assert (spec.out_features, spec.in_features) == (n, m)
        assert spec.parameter_count() < n * m


@pytest.mark.parametrize("structure", ["gs", "lowrank", "pifa", "kron", "compot"])
def test_budget_holds_where_some_linears_must_stay_dense(structure: str, tiny_model: TinyModel) -> None:
    """Large steps: the narrow k and v have no size that fits, and the others pay for them."""
    source = tiny_source(tiny_model, "tiny_llama")
    for ratio in (0.45, 0.55, 0.65):
        try:
            plan = plan_of(source, structure=structure, rotation="none", ratio=ratio, unit=32)
        except UsageError as error:
            assert "lower --unit" in str(error)  # noqa: PT017 (either outcome is right)
            assert "raise --ratio" in str(error)  # noqa: PT017
            continue
        assert model_size(source.architecture(), plan.structures, "none").ratio <= ratio


@pytest.mark.parametrize(("structure", "rotation"), VARIANTS)
def test_ratio_one_keeps_everything(structure: str, rotation: str, tiny_model: TinyModel) -> None:
    source = tiny_source(tiny_model, "tiny_llama")  # untied: a shared rotation costs nothing
    plan = plan_of(source, structure=structure, rotation=rotation, ratio=1.0)
    size = model_size(source.architecture(), plan.structures, rotation)
    assert size.ratio <= 1
    if rotation != "block":
        assert plan.structures == {}


def test_what_matters_more_keeps_more(tiny_model: TinyModel) -> None:
    source = tiny_source(tiny_model, "tiny_qwen3")
    plan, arch = plan_of(source, ratio=0.7), source.architecture()
    kept = {
        (layer, role): spec.kept
        if isinstance(spec := plan.structures.get(f"layers.{layer}.{role}"), KroneckerStructure)
        else arch.hidden_size
        for layer in range(arch.num_layers)
        for role in arch.linears()
    }
    assert len(set(kept.values())) > 1  # the allocation tells linears apart
    # Block 2 matters 100 times as much as block 0.
    assert sum(kept[2, role] for role in arch.linears()) > sum(kept[0, role] for role in arch.linears())


def test_more_budget_loses_less(tiny_model: TinyModel) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    losses = [sum(plan_of(source, ratio=r).predicted.values()) for r in (0.5, 0.7, 0.9)]
    assert losses[0] > losses[1] > losses[2] > 0


def test_optimised_rotations_lose_less(tiny_model: TinyModel) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    start = plan_of(source, ratio=0.7, rotation_iterations=0)
    better = plan_of(source, ratio=0.7, rotation_iterations=20)
    assert sum(better.predicted.values()) < sum(start.predicted.values())


def test_the_same_again(tiny_model: TinyModel) -> None:
    source = tiny_source(tiny_model, "tiny_opt")
    a, b = plan_of(source, ratio=0.7), plan_of(source, ratio=0.7)
    assert a.structures == b.structures
    assert torch.equal(a.rotations.matrices[0], b.rotations.matrices[0])


def test_without_gradients(tiny_model: TinyModel) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    plan = plan_of(source, ratio=0.7, sensitivity="none")
    assert model_size(source.architecture(), plan.structures, "shared").ratio <= 0.7
    assert all(torch.isfinite(torch.tensor(list(plan.predicted.values()))))


def test_a_sub_block_that_does_nothing(tiny_model: TinyModel) -> None:
    """Zero moments and zero gradients (a block that was switched off) must not turn into NaN."""
    source = tiny_source(tiny_model, "tiny_llama")
    for gradients, sensitivity in ((True, "fisher"), (False, "none")):
        moments = random_moments(source, gradients)
        moments[1, "mlp"] = StreamMoments(
            torch.zeros_like(moments[1, "mlp"].read),
            torch.zeros_like(moments[1, "mlp"].inner),
            {role: torch.zeros_like(h) for role, h in (moments[1, "mlp"].gradients or {}).items()} or None,
        )
        plan = make_plan(folded(source), recipe(ratio=0.7, sensitivity=sensitivity), moments)
        assert torch.isfinite(plan.rotations.matrices[0]).all()
        assert model_size(source.architecture(), plan.structures, "shared").ratio <= 0.7


def test_layers_of_the_recipe_win(tiny_model: TinyModel) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    wanted = {"structure": "lowrank", "in_features": 64, "out_features": 64, "rank": 8}
    dense = {"structure": "dense", "in_features": 64, "out_features": 160}
    layers = {"layers.1.attn.q": wanted, "layers.2.mlp.up": dense}
    plan = plan_of(source, structure="gs", rotation="none", layers=layers)
    assert plan.structures["layers.1.attn.q"].to_config() == wanted
    assert "layers.2.mlp.up" not in plan.structures
    assert plan.structures["layers.1.mlp.up"].name == "gs"
    assert list(plan_of(source, structure="dense", layers=layers).structures) == ["layers.1.attn.q"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rotation": "block", "ratio": 0.15}, r"rotation 'block' alone adds 24,576: raise it or choose"),
        ({"rotation": "block", "ratio": 0.2}, r"--unit 8 allows are 16,128 parameters: raise --ratio"),
        ({"rotation": "shared", "ratio": 0.1}, r"--ratio 0\.1 is too low: the smallest sizes"),
        ({"unit": 48}, r"--unit 48 does not divide the hidden size 64"),
        ({"structure": "gs", "ratio": 0.01}, r"raise --ratio or lower --unit"),
        ({"structure": "auto", "joint": True, "ratio": 0.01}, r"--ratio 0\.01 is too low: the smallest sizes"),
        ({"structure": "kron", "rotation": "none", "ratio": 0.01}, r"lower --unit or raise --ratio"),
        ({"structure": "compot", "ratio": 0.01}, r"lower --unit or raise --ratio"),
        ({"structure": "gs", "budget_bytes": 1000}, r"--budget-bytes 1000 is too low.* raise --budget-bytes or lower"),
        ({"structure": "slice", "ratio": 0.1}, r"--ratio 0\.1 is too low for rotation 'block' with skip 'slice'"),
        ({"rotation": "block", "skip": "cs", "ratio": 0.1}, r"too low for rotation 'block' with skip 'cs'"),
        ({"fit": "paper", "ratio": 0.1}, r"--ratio 0\.1 is too low for --fit paper"),
        ({"structure": "jrk", "ratio": 0.01}, r"--ratio 0\.01: lower --unit"),
        ({"structure": "lowrank", "budget_bytes": 1000}, r"the smallest sizes"),
        ({"structure": "lowrank", "budget_latency": 1.0}, r"--budget-latency needs --latency-table"),
        ({"structure": "lowrank", "budget_latency": 1.0, "latency_table": "no"}, r"--latency-table no is missing"),
        *(
            ({**fixed, "layers": {"layers.0.attn.v": RANK_4}}, r"layers\.0\.attn\.v is given as lowrank, .* alone")
            for fixed in ({"structure": "slice"}, {"fit": "paper"}, {"fit": "paper", "structure": "gs"})
        ),
        ({"calibration": {"sequence_length": 129}}, r"sequences of 129 .* the 128 positions of this model"),
        ({"layers": {"layers.9.attn.q": {}}}, r"'layers\.9\.attn\.q' is no linear of this model"),
        ({"layers": {"lm_head": {}}}, r"'lm_head' is no linear of this model"),
        ({"layers": {"layers.0.attn.q": {}}}, r"layers\.0\.attn\.q: unknown structure None"),
        (
            {"layers": {"layers.0.attn.q": {"structure": "lowrank", "rank": 2}}},
            r"layers\.0\.attn\.q: missing field in_features",
        ),
        (
            {"layers": {"layers.0.mlp.up": {"structure": "dense", "in_features": 64, "out_features": 64}}},
            r"layers\.0\.mlp\.up is 160 x 64, the recipe gives 64 x 64",
        ),
    ],
)
def test_refused_before_any_work(changes: dict[str, Any], sentence: str, tiny_model: TinyModel) -> None:
    arch = tiny_source(tiny_model, "tiny_llama").architecture()
    check_recipe(arch, recipe())
    with pytest.raises(UsageError, match=sentence):
        check_recipe(arch, recipe(**changes))


def test_budget_counts_what_rotations_add(tiny_model: TinyModel) -> None:
    for name, kind, added in [
        ("tiny_llama", "shared", 0),
        ("tiny_llama", "block", 6 * 64 * 64),
        ("tiny_llama_tied", "shared", 64 * 64),
        ("tiny_llama_tied", "block", 7 * 64 * 64),
        ("tiny_llama_tied", "none", 0),
    ]:
        arch = tiny_source(tiny_model, name).architecture()
        assert overhead_parameters(arch, kind) == added
        budget = budget_parameters(arch, recipe(rotation=kind, ratio=0.8))
        assert budget == pytest.approx(0.8 * arch.projection_parameters() - added)


def test_units(tiny_model: TinyModel) -> None:
    from dataclasses import replace

    arch = tiny_source(tiny_model, "tiny_llama").architecture()
    units = {width: default_unit(replace(arch, hidden_size=width)) for width in (64, 576, 2048, 5120)}
    assert all(width % unit == 0 for width, unit in units.items())
    assert units[5120] % 64 == 0


@pytest.mark.parametrize("rotation", ["shared", "block"])
def test_the_mean_of_a_layer_norm_stream_is_the_last_coordinate(rotation: str, tiny_model: TinyModel) -> None:
    plan = plan_of(tiny_source(tiny_model, "tiny_opt"), rotation=rotation, ratio=0.8)
    for q in plan.rotations.matrices:
        torch.testing.assert_close(q[:, -1], torch.full((64,), 1 / 8, dtype=torch.float64))
    assert orthogonality_error(plan.rotations.matrices) < 1e-10


def test_general_kronecker_says_what_it_costs(tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    n, m = source.architecture().linears()["attn.q"]
    sides = {"structure": "kron", "in_features": m, "out_features": n, "side": "both", "mix": "explicit"}
    check_recipe(
        source.architecture(), recipe(layers={"layers.0.attn.q": {**sides, "blocks": 16, "n1": 4, "m1": 4, "terms": 4}})
    )
    assert "1 linears of this recipe need more arithmetic than dense ones" in capsys.readouterr().err
    check_recipe(source.architecture(), recipe())
    assert "arithmetic" not in capsys.readouterr().err
