"""Joint rank-k: no data anywhere, the ranks that the budget allows, and each block's optimum by an independent SVD."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import preflight
from compress.artifact.store import Artifact
from compress.calibration import text as textdata
from compress.checkpoint.loading import load_model
from compress.checkpoint.reader import CheckpointReader
from compress.errors import UsageError
from compress.methods.jrk import energy_structures, jrk_groups, jrk_structures
from compress.methods.textless import fit_alone
from compress.pipeline import compress_model
from compress.recipe import Recipe, parse_recipe, read_yaml
from compress.requests import has_checkpoint
from compress.rewrites.folding import folded
from compress.structures import KroneckerStructure, LowRankStructure, Structure
from tests import tiny
from tests.compress.helpers import TinyModel, logits_of, relative, tiny_source
from tests.export.helpers import llama, opt

UNIT = 4


def of_block(structures: dict[str, Structure], layer: int = 0) -> dict[str, Structure]:
    prefix = f"layers.{layer}."
    return {name.removeprefix(prefix): s for name, s in structures.items() if name.startswith(prefix)}


def kept(structures: dict[str, Structure], arch: Any) -> float:
    dense = sum(n * m for name, (n, m) in arch.linears().items() if name not in of_block(structures))
    return (sum(s.parameter_count() for s in structures.values()) + arch.num_layers * dense) / (
        arch.projection_parameters()
    )


def test_groups_are_the_inter_connected_ones() -> None:
    assert [list(group) for group in jrk_groups(llama())] == [
        ["attn.q", "attn.k"],
        ["attn.v"],
        ["attn.o"],
        ["mlp.gate", "mlp.up"],
        ["mlp.down"],
    ]
    assert [list(group) for group in jrk_groups(opt())][3:] == [["mlp.up"], ["mlp.down"]]


@pytest.mark.parametrize("ratio", [0.9, 0.75, 0.5])
@pytest.mark.parametrize("arch", [llama(), opt()], ids=["llama", "opt"])
def test_ratio_is_kept_and_used(ratio: float, arch: Any) -> None:
    structures = jrk_structures(arch, ratio, 1)
    assert 0.96 * ratio < kept(structures, arch) <= ratio
    coarse = jrk_structures(arch, ratio, UNIT)
    assert all(s.rank % UNIT == 0 for s in coarse.values() if isinstance(s, LowRankStructure))
    assert kept(coarse, arch) <= ratio
    assert kept(jrk_structures(arch, 1.0, UNIT), arch) == 1


def test_ranks_are_those_of_the_formula() -> None:
    """k = c m sum(n) / (m + sum(n)): two thirds of c d for two d x d, before the leftover is spent."""
    arch = opt(hidden_size=96, num_heads=4, num_kv_heads=4, head_dim=24, intermediate_size=96)
    block = of_block(jrk_structures(arch, 0.75, 1))
    q, k, v = (block[f"attn.{role}"] for role in "qkv")
    assert isinstance(q, LowRankStructure)
    assert isinstance(k, LowRankStructure)
    assert isinstance(v, LowRankStructure)
    assert (q.rank, k.rank, k.shares) == (48, 48, "attn.q")  # 2/3 * 0.75 * 96
    assert (v.rank, v.shares) == (36, None)  # 1/2 * 0.75 * 96


def test_what_cannot_be_cut_stays_dense_and_is_paid_for() -> None:
    """In steps of 12 no rank of v (16 x 32, break-even 10.7) saves anything."""
    arch = llama()
    structures = jrk_structures(arch, 0.8, 12)
    assert "attn.v" not in of_block(structures)
    assert kept(structures, arch) <= 0.8
    with pytest.raises(UsageError, match="--unit"):
        jrk_structures(arch, 0.8, 40)
    with pytest.raises(UsageError, match=r"--ratio 0\.01"):
        jrk_structures(arch, 0.01, UNIT)


def test_blocks_are_fitted_to_the_optimum(tiny_model: TinyModel) -> None:
    """Eckart-Young on the stacked weights, by torch's own SVD."""
    model = folded(tiny_source(tiny_model, "tiny_llama"), torch.float64)
    weights, structures = model.block(1), of_block(jrk_structures(model.arch, 0.6, UNIT), 1)
    fitted = fit_alone(weights, structures)
    assert list(fitted) == list(structures)
    for roles in (["attn.q", "attn.k"], ["attn.v"], ["attn.o"], ["mlp.gate", "mlp.up"], ["mlp.down"]):
        first = structures[roles[0]]
        assert isinstance(first, LowRankStructure)
        stacked = torch.cat([weights[f"{role}.weight"] for role in roles])
        U, s, Vh = torch.linalg.svd(stacked, full_matrices=False)
        best = (U[:, : first.rank] * s[: first.rank]) @ Vh[: first.rank]
        V = fitted[roles[0]]["V"]
        torch.testing.assert_close(torch.cat([fitted[role]["U"] @ V for role in roles]), best)
        assert all(("V" in fitted[role]) == (role == roles[0]) for role in roles)


def test_other_structures_are_fitted_without_data_too() -> None:
    weight = torch.randn(8, 8, dtype=torch.float64)
    spec = KroneckerStructure(8, 8, 4, 3)
    fitted = fit_alone({"attn.q.weight": weight}, {"attn.q": spec})
    torch.testing.assert_close(fitted["attn.q"], spec.fit(weight))


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_energy_ranks(threshold: float, tiny_model: TinyModel) -> None:
    model = folded(tiny_source(tiny_model, "tiny_llama"), torch.float64)
    weights = model.block(0)
    structures = energy_structures(weights, model.arch, threshold, 2)
    fitted = fit_alone(weights, structures)
    leader = structures["mlp.gate"]
    assert isinstance(leader, LowRankStructure)
    stacked = torch.cat([weights["mlp.gate.weight"], weights["mlp.up.weight"]])
    energy = torch.linalg.svdvals(stacked).square()
    needed = int((energy.cumsum(0) < threshold * energy.sum()).sum()) + 1
    assert leader.rank == needed + needed % 2
    lost = stacked - torch.cat([fitted["mlp.gate"]["U"], fitted["mlp.up"]["U"]]) @ fitted["mlp.gate"]["V"]
    assert float(lost.square().sum()) <= (1 - threshold) * float(energy.sum())
    assert not energy_structures(weights, model.arch, 1.0, 2)  # full ranks save nothing
    with pytest.raises(UsageError, match=r"not 1\.5"):
        energy_structures(weights, model.arch, 1.5, 2)


# ---- the whole compression


@pytest.fixture
def no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to read a calibration text fails."""

    def refuse(name: str) -> textdata.TextData:
        raise AssertionError(f"the text {name!r} was opened")

    monkeypatch.setattr(textdata, "load_text", refuse)
    monkeypatch.setattr(preflight, "load_text", refuse)


def recipe(**changes: Any) -> Recipe:
    return parse_recipe({"structure": "jrk", "ratio": 0.8, "unit": UNIT, **changes}, "a test")


@pytest.mark.usefixtures("no_text")
@pytest.mark.parametrize("name", ["tiny_llama_tied", "tiny_opt", "tiny_qwen3", "tiny_llama_bias"])
def test_no_calibration_text_is_opened(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_source(tiny_model, name)
    artifact = compress_model(source, recipe(), tmp_path / "out", materialize_dense=True)
    artifact.verify()
    facts = artifact.read_manifest()["stages"]["checkpoint"]
    assert 0.7 < facts["ratio"] <= 0.8
    reader = CheckpointReader(artifact.path("checkpoint"))
    assert {reader.structure(linear).name for linear in reader.linears()} == {"lowrank"}
    stored = sum(reader.get(n).numel() for n in reader.names() if n.endswith((".U", ".V")))
    assert stored == facts["projections"]
    records = json.loads((artifact.path("checkpoint") / "fit.json").read_text())
    assert len(records) == len(reader.linears())
    assert sum(r["parameters"] for r in records) == stored
    model, ids = load_model(artifact.path("checkpoint")), tiny.token_ids(1, 16)
    weights = folded(source).block(0)
    for record in records[: len(source.architecture().linears())]:
        module, role = model.get_submodule(f"model.{record['name']}"), record["name"].split(".", 2)[2]
        dense, weight = module.structure.dense(module.factors()), weights[f"{role}.weight"]  # type: ignore[union-attr, operator]
        assert record["relative_error"] == pytest.approx(float((weight - dense).norm() / weight.norm()), rel=1e-3)
    # Rank-k approximations are far from the source on random weights, but OUT/dense is the same model.
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(artifact.path("dense"))
    assert relative(logits_of(plain, ids), logits_of(model, ids)) < 1e-4
    assert relative(logits_of(model, ids), logits_of(source.reference_model(torch.float32), ids)) > 1e-2


@pytest.mark.usefixtures("no_text")
def test_a_recipe_fed_back_gives_the_same_checkpoint(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    first = compress_model(source, recipe(), tmp_path / "first")
    written = parse_recipe(read_yaml(first.path("recipe.yaml")), "first")
    second = compress_model(source, written, tmp_path / "second")
    for path in first.path("checkpoint").iterdir():
        assert path.read_bytes() == (second.path("checkpoint") / path.name).read_bytes()
    assert has_checkpoint(Artifact(tmp_path / "second"), source, written)


@pytest.mark.usefixtures("no_text")
def test_a_follower_without_its_leader_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    layers = {"layers.0.attn.q": {"structure": "dense", "in_features": 64, "out_features": 64}}
    with pytest.raises(UsageError, match=r"recipe layers: layers\.0\.attn\.k shares the V of layers\.0\.attn\.q"):
        compress_model(tiny_source(tiny_model, "tiny_llama"), recipe(layers=layers), tmp_path / "out")


def test_rotations_are_refused() -> None:
    with pytest.raises(UsageError, match="the same in every rotation"):
        recipe(rotation="shared")
