"""The cost table of `--budget-latency`: looked up exactly, kept to, and refused where it does not serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.allocation.budget import budget_of, budget_parameters, cost_of, ratio_of, unit_of
from compress.allocation.latency import LatencyTable
from compress.architecture import Architecture
from compress.checkpoint.reader import CheckpointReader
from compress.cli.entry import run_cli
from compress.errors import UsageError
from compress.forecast import forecast
from compress.methods.registry import check_recipe
from compress.run import main
from compress.structures import (
    DenseStructure,
    GroupShuffleStructure,
    KroneckerStructure,
    LowRankStructure,
    SelectStructure,
    Structure,
    structure_from_config,
)
from tests import tiny
from tests.compress import helpers
from tests.compress.helpers import TinyModel, compressed, tiny_source
from validate.latency import jobs_of

CALL = 1e-6  # what each matrix of the tables below takes beside its parameters


def entry(structure: Structure, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "structure": structure.name,
        "in_features": structure.in_features,
        "out_features": structure.out_features,
        "parameters": structure.parameter_count(),
        "seconds": seconds,
        **more,
    }


def linear_time(structure: Structure) -> float:
    """Of a machine on which structured parameters cost twice as much as dense ones."""
    return CALL + 1e-9 * structure.parameter_count() * (1 if structure.name == "dense" else 2)


def table_file(
    folder: Path, arch: Architecture, unit: int, kinds: tuple[str, ...] = ("pifa", "lowrank", "kron", "gs")
) -> Path:
    """What validate.latency would write on such a machine, with `variant`."""
    entries = []
    for job in jobs_of(arch, kinds, ("neurons", "vo"), unit):
        for s in (DenseStructure(job.shape.in_features, job.shape.out_features), *job.structures):
            entries.append(entry(s, linear_time(s), variant=s.variant))
    folder.mkdir(exist_ok=True)
    path = folder / "table.json"
    path.write_text(json.dumps({"tokens": 1, "entries": entries}))
    return path


# ---- lookup


def test_measured_sizes_are_looked_up_and_others_interpolated() -> None:
    ranks = {8: 3.0, 16: 5.0, 32: 11.0}
    table = LatencyTable.of([entry(LowRankStructure(64, 64, r), s) for r, s in ranks.items()], 1)
    for rank, seconds in ranks.items():
        assert table.seconds(LowRankStructure(64, 64, rank)) == pytest.approx(seconds)
    assert table.seconds(LowRankStructure(64, 64, 24)) == pytest.approx(8)
    assert table.seconds(LowRankStructure(64, 64, 4)) == 3  # a smaller product is not known to be faster
    assert table.seconds(LowRankStructure(64, 64, 40)) == pytest.approx(11 + 6 / 2)  # the last slope goes on


def test_equal_measurements_count_by_their_median() -> None:
    dense = DenseStructure(8, 8)
    assert LatencyTable.of([entry(dense, s) for s in (1.0, 9.0, 2.0)], 1).seconds(dense) == 2


def test_variants_are_told_apart() -> None:
    wide, deep = GroupShuffleStructure(64, 64, 2, 2, 8), GroupShuffleStructure(64, 64, 4, 4, 4)
    assert wide.parameter_count() == deep.parameter_count()
    reader, writer = (KroneckerStructure(64, 64, 4, 3, side, "leading") for side in ("in", "out"))  # type: ignore[arg-type]
    seconds = {wide: 1.0, deep: 2.0, reader: 3.0, writer: 4.0}
    table = LatencyTable.of([entry(s, t, variant=s.variant) for s, t in seconds.items()], 1)
    assert {s: table.seconds(s) for s in seconds} == seconds
    by_hand = LatencyTable.of([entry(wide, 1.0)], 1)  # without variants one stands for all
    assert by_hand.seconds(deep) == 1


def test_a_selection_costs_what_is_left_at_its_own_shape() -> None:
    """Not the whole matrix, nor a share of it by parameters: times are those of (in, out) = (32, 64)."""
    entries = [entry(DenseStructure(m, 64), s) for m, s in ((32, 5.0), (64, 6.0), (128, 20.0))]
    entries += [entry(DenseStructure(64, 128), 21.0), entry(DenseStructure(64, 32), 4.0)]
    entries += [entry(LowRankStructure(32, 64, 8), 2.5), entry(LowRankStructure(128, 64, 8), 7.0)]
    table = LatencyTable.of(entries, 1)
    assert table.seconds(SelectStructure(128, 64, 32)) == 5
    assert table.seconds(SelectStructure(128, 64, 8, groups=4)) == 5
    assert table.seconds(SelectStructure(128, 64, 48)) == pytest.approx(5.5)  # between 32 and 64
    assert table.seconds(SelectStructure(64, 128, 96, side="out")) == pytest.approx(6 + 15 / 2)  # between 64 and 128
    assert table.seconds(DenseStructure(96, 64)) == table.seconds(SelectStructure(128, 64, 96))
    assert table.seconds(SelectStructure(128, 64, 32, core=LowRankStructure(32, 64, 8))) == 2.5
    with pytest.raises(UsageError, match="no dense matrix of 64 x 16"):  # never beyond what was measured
        table.seconds(SelectStructure(128, 64, 16))


def test_a_core_between_shapes_has_the_same_share_of_each() -> None:
    """kron keeps 24 of 64 coordinates whatever the other side: times of 3/8 at 32 and at 128, and between them."""
    entries = [
        entry(KroneckerStructure(64, n, 8, terms, "in", "leading"), float(terms * n))
        for n in (32, 128)
        for terms in (1, 3, 7)
    ]
    table = LatencyTable.of(entries, 1)
    core = KroneckerStructure(64, 80, 8, 3, "in", "leading")
    assert table.seconds(core) == pytest.approx(3 * 80)
    assert table.seconds(KroneckerStructure(64, 80, 8, 2, "in", "leading")) == pytest.approx(2 * 80)


def test_a_follower_is_cheaper_than_its_leader() -> None:
    table = LatencyTable.of([entry(LowRankStructure(64, 64, r), float(r)) for r in (8, 16, 32)], 1)
    assert table.seconds(LowRankStructure(64, 64, 32, "attn.q")) == pytest.approx(16)
    assert table.seconds(LowRankStructure(64, 64, 32)) == 32


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "cannot be used"),
        ('{"tokens": 1}', "entries"),
        ('{"tokens": 1, "entries": [{"structure": "dense"}]}', "in_features"),
        ('{"tokens": 1, "entries": 7}', "cannot be used"),
    ],
)
def test_what_is_no_table(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(UsageError, match=said):
        LatencyTable.read(tmp_path / "table.json")


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_times(seconds: float) -> None:
    with pytest.raises(UsageError, match="8 x 8 dense"):
        LatencyTable.of([entry(DenseStructure(8, 8), seconds)], 1)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"validate\.latency"):
        LatencyTable.read(tmp_path / "none.json")


# ---- plans


def spent(table: LatencyTable, reader: CheckpointReader) -> float:
    """Seconds of a checkpoint's linears, each by what is stored of it, of its skips and of its head map."""
    arch, d = reader.architecture, reader.architecture.hidden_size
    total = sum(table.seconds(reader.structure(linear)) for linear in reader.linears())
    if reader.config.rotation == "block":
        total += 2 * arch.num_layers * table.dense(d, d)
    if arch.tied and reader.config.rotation != "none":
        total += table.dense(d, d)
    return total


METHODS: list[dict[str, Any]] = [
    {"structure": "lowrank"},
    {"structure": "lowrank", "joint": True},
    {"structure": "lowrank", "allocation": "uniform"},
    {"structure": "kron", "rotation": "shared"},
    {"structure": "kron", "rotation": "block"},
    {"structure": "gs"},
    {"structure": "auto", "inner": ["neurons", "vo"]},
    {"structure": "auto", "rotation": "shared", "inner": ["neurons"]},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: " ".join(map(str, m.values())))
@pytest.mark.parametrize("name", ["tiny_llama_tied", "tiny_opt"])
def test_the_plan_meets_the_budget(
    name: str, method: dict[str, Any], tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_source(tiny_model, name)
    arch = source.architecture()
    path = table_file(tmp_path, arch, unit_of(arch, helpers.recipe(Path("unread"), **method)))
    table = LatencyTable.read(path)
    dense = arch.num_layers * sum(table.dense(m, n) for n, m in arch.linears().values())
    overhead = dense - budget_of(arch, helpers.recipe(Path("unread"), budget_latency=dense, **table_of(path), **method))
    share = 0.9 if method["structure"] == "gs" else 0.75  # its smallest sizes are large
    budget = share * dense + overhead
    artifact = compressed(source, tmp_path, budget_latency=budget, **table_of(path), **method)
    reader = CheckpointReader(artifact.path("checkpoint"))
    seconds = spent(table, reader)
    assert seconds <= budget * (1 + 1e-12)
    # And makes use of it, as far as one fraction for all can.
    assert seconds > (0.6 if method.get("allocation") == "uniform" else 0.85) * budget
    if method.get("allocation") != "uniform" and "joint" not in method:
        assert f"projections take {seconds:.4g} of {budget:g} seconds" in capsys.readouterr().err
    records = json.loads((artifact.path("checkpoint") / "fit.json").read_text())
    assert any(r["structure"] != "dense" for r in records)
    # Structured parameters cost twice as much here: none is kept that is no faster than dense.
    for linear in reader.linears():
        structure, (n, m) = reader.structure(linear), arch.linears()[linear.split(".", 2)[2]]
        assert structure.name in ("dense", "select") or table.seconds(structure) < table.dense(m, n)


def table_of(path: Path) -> dict[str, str]:
    return {"latency_table": str(path)}


def test_what_a_rotation_adds_is_paid_from_the_budget(tiny_model: TinyModel, tmp_path: Path) -> None:
    arch = tiny_source(tiny_model, "tiny_llama_tied").architecture()
    one = linear_time(DenseStructure(64, 64))
    path = table_file(tmp_path, arch, 8)
    for rotation, count in (("shared", 1), ("block", 1 + 2 * arch.num_layers)):
        recipe = helpers.recipe(
            Path("unread"), structure="kron", rotation=rotation, budget_latency=1.0, **table_of(path)
        )
        assert budget_of(arch, recipe) == pytest.approx(1 - count * one)
        short = recipe.model_copy(update={"budget_latency": count * one / 2})
        with pytest.raises(UsageError, match=f"the {count} matrices that rotation '{rotation}' adds"):
            check_recipe(arch, short)
    plain = helpers.recipe(Path("unread"), structure="lowrank", budget_latency=1.0, **table_of(path))
    assert budget_of(arch, plain) == 1
    untied = tiny_source(tiny_model, "tiny_llama").architecture()
    shared = helpers.recipe(Path("unread"), structure="kron", budget_latency=1.0, **table_of(path))
    assert budget_of(untied, shared) == 1


def test_a_table_that_lacks_something_is_refused_before_calibration(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    arch = source.architecture()
    path = table_file(tmp_path, arch, 8, ("lowrank",))
    entries = json.loads(path.read_text())["entries"]

    def refused(drop: Any, said: str, **changes: Any) -> None:
        left = tmp_path / "left.json"
        left.write_text(json.dumps({"tokens": 1, "entries": [e for e in entries if not drop(e)]}))
        method = {"structure": "lowrank", "budget_latency": 1.0, **table_of(left), **changes}
        # There is no text to calibrate on, so that the refusal comes first.
        recipe = helpers.recipe(tmp_path / "no text", **method)
        with pytest.raises(UsageError, match=said):
            check_recipe(arch, recipe)

    refused(lambda e: e["structure"] == "lowrank" and e["out_features"] == 160, "no lowrank matrix of 160 x 64")
    refused(lambda e: e["structure"] == "dense" and e["in_features"] == 160, "no dense matrix of 64 x 160")
    refused(lambda e: False, r"no kron in leading .*--structures kron", structure="kron", rotation="shared")
    narrow = [60, 100, 20]  # what validate.latency measures beside the 160 neurons
    refused(lambda e: {e["in_features"], e["out_features"]} & {*narrow, 32}, "matrix of", inner=["neurons"])
    with pytest.raises(UsageError, match="--latency-table"):
        cost_of(helpers.recipe(Path("unread"), structure="lowrank", budget_latency=1.0))


def test_a_budget_that_nothing_meets(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    path = table_file(tmp_path, source.architecture(), 8)
    with pytest.raises(UsageError, match="below the smallest possible"):
        compressed(source, tmp_path, structure="lowrank", budget_latency=1e-7, **table_of(path))


def test_a_changed_table_is_another_request(tiny_model: TinyModel, tmp_path: Path) -> None:
    from compress.requests import request_digest

    source = tiny_source(tiny_model, "tiny_llama")
    path = table_file(tmp_path, source.architecture(), 8)
    recipe = helpers.recipe(helpers.text_file(tmp_path), structure="lowrank", budget_latency=1.0, **table_of(path))
    before = request_digest(source, recipe)
    path.write_text(path.read_text().replace('"tokens": 1', '"tokens": 2'))
    assert request_digest(source, recipe) != before


def test_entries_of_a_recipe_cost_as_their_structures(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The recipe that a latency budget resolves to says the same of every matrix when it is fed back."""
    source = tiny_source(tiny_model, "tiny_llama")
    arch = source.architecture()
    path = table_file(tmp_path, arch, 8)
    table = LatencyTable.read(path)
    dense = arch.num_layers * sum(table.dense(m, n) for n, m in arch.linears().values())
    artifact = compressed(source, tmp_path, structure="lowrank", budget_latency=0.8 * dense, **table_of(path))
    from compress.recipe import read_yaml

    layers = read_yaml(artifact.path("recipe.yaml"))["layers"]
    told = ("predicted_loss", "bytes", "macs")
    structures = [structure_from_config({k: v for k, v in c.items() if k not in told}) for c in layers.values()]
    assert sum(map(table.seconds, structures)) <= 0.8 * dense


@pytest.mark.parametrize("rotation", ["none", "shared"])
def test_a_dry_run_tells_no_ratio_that_was_not_asked_for(
    rotation: str, tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ratio of the recipe has no say here, whatever it is, and space is the most that there can be."""
    source = tiny_source(tiny_model, "tiny_llama_tied")
    arch = source.architecture()
    path = table_file(tmp_path, arch, 8)
    command = ["--model", str(tiny_model("tiny_llama_tied")), "--out", str(tmp_path / "out"), "--structure", "auto"]
    command += ["--rotation", rotation, "--budget-latency", "1", "--latency-table", str(path), "--dry-run"]
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT)
    command += [
        "--sequence-length",
        "32",
        "--calibration-samples",
        "2",
        "--inner",
        "none",
        "--calibration-data",
        str(text),
    ]
    found = []
    for ratio in ("0.3", "0.75"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"ratio: {ratio}\n")
        assert run_cli(main, [*command, "--json", "--recipe", str(recipe)]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    said = found[0]
    assert said["seconds_asked"] == 1
    assert "ratio_asked" not in said
    assert {said[key] for key in ("projection_budget", "model_ratio", "decode_ceiling")} == {None}
    assert said["checkpoint_bytes_about"] >= 4 * arch.projection_parameters()
    assert run_cli(main, command) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "seconds_asked: 1.0" in shown
    assert not any("ratio_asked" in line or "None" in line for line in shown)
    assert "model_ratio: known once sizes are planned by --latency-table" in shown


def test_a_ratio_is_not_taken_from_a_budget_in_seconds(tiny_model: TinyModel, tmp_path: Path) -> None:
    arch = tiny_source(tiny_model, "tiny_llama").architecture()
    recipe = helpers.recipe(Path("unread"), structure="lowrank", budget_latency=1.0, latency_table="unread")
    for asked in (ratio_of, budget_parameters):
        with pytest.raises(ValueError, match="seconds"):
            asked(arch, recipe)


def test_a_dense_copy_asks_for_no_ratio(tiny_model: TinyModel) -> None:
    arch = tiny_source(tiny_model, "tiny_llama").architecture()
    said = forecast(arch, helpers.recipe(Path("unread"), structure="dense"))
    assert said["model_ratio"] == 1
    assert not any("asked" in name for name in said)
