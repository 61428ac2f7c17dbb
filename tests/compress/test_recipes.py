"""Every kind of recipe through the whole program: budget, logits, its recipe fed back, interrupts, statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.artifact import state
from compress.artifact.store import Artifact
from compress.calibration.streams import Runner
from compress.checkpoint.loading import load_model
from compress.checkpoint.plain import write_plain
from compress.checkpoint.reader import CheckpointReader
from compress.checkpoint.rewritten import rewritten_model
from compress.errors import UsageError
from compress.forecast import forecast
from compress.pipeline import compress_model
from compress.recipe import parse_recipe, read_yaml
from compress.rewrites.folding import folded
from compress.source.model import ModelSource
from tests import tiny
from tests.compress import helpers
from tests.compress.helpers import (
    TinyModel,
    compressed,
    interrupted_at,
    logits_of,
    once,
    relative,
    same_files,
    text_file,
    tiny_source,
)

RATIO = 0.8
KINDS: dict[str, dict[str, Any]] = {
    "auto": {"structure": "auto"},
    "auto with kron": {"structure": "auto", "menu": ["kron"], "rotation": "shared", "ratio": 0.6},
    "auto with block rotations": {"structure": "auto", "rotation": "block", "ratio": 0.9},
    "auto with all structures": {"structure": "auto", "menu": ["pifa", "lowrank", "kron", "gs"], "rotation": "shared"},
    "auto, vo, bias": {"structure": "auto", "inner": ["vo", "bias"]},
    "auto, vo": {"structure": "auto", "inner": ["vo"], "ratio": 0.6},
    "auto, joint": {"structure": "auto", "joint": True, "inner": ["neurons", "vo"]},
    "auto, uniform": {"structure": "auto", "allocation": "uniform"},
    "auto, measured": {"structure": "auto", "sensitivity": "measured"},
    "auto, no sensitivity": {"structure": "auto", "sensitivity": "none", "inner": ["neurons", "vo", "bias"]},
    "auto, embedding": {"structure": "auto", "embedding": 0.75},
    "auto, bytes": {"structure": "auto", "budget_bytes": 180_000, "ratio": 0.1, "checkpoint_dtype": "float16"},
    "kron, inner": {"structure": "kron", "inner": ["neurons", "vo", "bias"]},
    "kron, cs": {"structure": "kron", "rotation": "block", "skip": "cs"},
    "kron, cs, bias": {"structure": "kron", "rotation": "block", "skip": "cs", "inner": ["bias"]},
    "kron, householder": {"structure": "kron", "rotation": "block", "skip": "householder", "reflections": 8},
    "kron, no ties": {"structure": "kron", "ties": False},
    "kron, paper": {"structure": "kron", "fit": "paper", "ratio": 0.9},
    "gs": {"structure": "gs"},
    "gs, rotated": {"structure": "gs", "rotation": "shared"},
    "gs, paper": {"structure": "gs", "fit": "paper", "ratio": 0.9},
    "lowrank, uniform": {"structure": "lowrank", "allocation": "uniform", "sensitivity": "none", "correction": 0.0},
    "pifa, bias": {"structure": "pifa", "inner": ["bias"]},
    "lowrank, joint": {"structure": "lowrank", "joint": True},
    "lowrank, bias": {"structure": "lowrank", "inner": ["bias"], "embedding": 0.75},
    "compot": {"structure": "compot"},
    "compot, bytes, bias": {"structure": "compot", "budget_bytes": 360_000, "inner": ["bias"]},
    "compot24, uniform": {"structure": "compot24", "allocation": "uniform"},
    "jrk": {"structure": "jrk"},
    "jrk, embedding": {"structure": "jrk", "embedding": 0.75},
    "slice": {"structure": "slice"},
    "slice, embedding": {"structure": "slice", "embedding": 0.75},
}
KIND = pytest.mark.parametrize("kind", KINDS)
# Where every linear has a bias, what touches the inner side of blocks is of interest.
PAIRS = [(name, kind) for name in ("tiny_llama_tied", "tiny_opt") for kind in KINDS] + [
    ("tiny_llama_bias", kind) for kind, changes in KINDS.items() if "bias" in kind or changes.get("inner")
]
Build = Callable[[str, str], Artifact]


def changes_of(kind: str) -> dict[str, Any]:
    return {"ratio": RATIO, **KINDS[kind]}


@pytest.fixture(scope="module")
def build(tiny_model: TinyModel, shared_folder: Path) -> Build:
    """(model, kind) -> its artefact, made at the first call, and the number of files that the run wrote for itself in
    the file `writes` beside it. Not to be changed."""

    def make(name: str, kind: str) -> Artifact:
        def run(folder: Path) -> None:
            with pytest.MonkeyPatch.context() as patch:
                calls = interrupted_at(patch, state, "save_file", 0)
                compressed(tiny_source(tiny_model, name), folder, **changes_of(kind))
            (folder / "writes").write_text(str(calls[0]))

        return Artifact(once(shared_folder / "recipes" / f"{name} {kind}", run) / "out")

    return make


@pytest.fixture
def source(tiny_model: TinyModel) -> ModelSource:
    return tiny_source(tiny_model, "tiny_llama_tied")


def text_of(artifact: Artifact) -> dict[str, Any]:
    """The calibration of the run that made the artefact: the text's name is part of the recipe."""
    return {"data": str(artifact.out.parent / "text.txt")}


# ---- what comes out


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_budget_holds_and_the_model_speaks(name: str, kind: str, build: Build, tiny_model: TinyModel) -> None:
    source, artifact = tiny_source(tiny_model, name), build(name, kind)
    facts, reader = artifact.read_manifest()["stages"]["checkpoint"], CheckpointReader(artifact.path("checkpoint"))
    asked, dtype = changes_of(kind), getattr(torch, changes_of(kind).get("checkpoint_dtype", "float32"))
    projections = sum(reader.structure(linear).bytes(dtype) for linear in reader.linears())
    if (budget := asked.get("budget_bytes")) is not None:
        assert 0.8 * budget < projections + facts["overhead"] * dtype.itemsize <= budget
    else:
        assert 0.75 * asked["ratio"] < facts["ratio"] <= asked["ratio"]
    foretold = forecast(source.architecture(), parse_recipe(read_yaml(artifact.path("recipe.yaml")), "recipe.yaml"))
    # A skip of form cs turns no more planes than there are angles.
    assert facts["overhead"] <= foretold["rotation_overhead"] <= facts["overhead"] * (1.1 if "cs" in kind else 1)
    assert facts["projections"] <= foretold["projection_budget"]
    assert foretold["model_ratio"] - 0.15 < facts["model_ratio"] <= foretold["model_ratio"] + 1e-4
    ends = facts["embeddings"] / facts["dense_embeddings"]
    assert ends <= asked["embedding"] if "embedding" in asked else ends == 1
    # Closer to the dense model, in KL divergence on calibration text, than a model that knows nothing.
    ids = torch.tensor([source.tokenizer()(tiny.TEXT)["input_ids"][:100]])
    dense = logits_of(source.reference_model(torch.float32), ids).log_softmax(-1)
    ours = logits_of(load_model(artifact.path("checkpoint")), ids).log_softmax(-1)
    assert torch.isfinite(ours).all()
    unigram = dense.exp().mean((0, 1)).log()
    lost, limit = (float((dense.exp() * (dense - q)).sum(-1).mean()) for q in (ours, unigram))
    assert 0 < lost < limit * (4 if asked["structure"] in ("jrk", "slice") else 1)  # nothing is fitted there


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("auto, vo", {"pifa", "select"}),
        ("auto with kron", {"kron", "select"}),
        ("lowrank, joint", {"lowrank"}),
        ("compot24, uniform", {"compot24"}),
        ("jrk", {"lowrank"}),
        ("slice", {"kron"}),
    ],
)
def test_what_is_asked_for_is_there(kind: str, expected: set[str], build: Build) -> None:
    reader = CheckpointReader(build("tiny_llama_tied", kind).path("checkpoint"))
    structures = [reader.structure(linear) for linear in reader.linears()]
    kinds = {structure.name for structure in structures}
    assert expected <= kinds <= expected | {"dense", "lowrank"}
    if "joint" in kind:
        assert any(getattr(structure, "shares", None) for structure in structures)


# ---- the same again


@KIND
def test_the_written_recipe_gives_the_same_checkpoint(
    kind: str, source: ModelSource, build: Build, tmp_path: Path
) -> None:
    whole = build("tiny_llama_tied", kind)
    resolved = parse_recipe(read_yaml(whole.path("recipe.yaml")), "recipe.yaml")
    reader = CheckpointReader(whole.path("checkpoint"))
    assert list(resolved.layers) == reader.linears()
    for name, told in resolved.layers.items():
        structure = reader.structure(name)
        assert (told["macs"], told["bytes"]) == (
            structure.macs(1),
            structure.bytes(getattr(torch, resolved.checkpoint_dtype)),
        )
        assert resolved.has_menus() == (told["predicted_loss"] is not None)
    same_files(compress_model(source, resolved, tmp_path / "out"), whole)


@KIND
def test_interrupted_and_resumed_is_the_same(
    kind: str, source: ModelSource, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, after a third of the files that a whole run writes for itself."""
    whole = build("tiny_llama_tied", kind)
    changes = {**changes_of(kind), "calibration": text_of(whole)}
    writes = int((whole.out.parent / "writes").read_text())
    assert writes >= 3
    for _ in range(2):
        with monkeypatch.context() as patch:
            interrupted_at(patch, state, "save_file", writes // 3 + 1)
            with pytest.raises(KeyboardInterrupt):
                compressed(source, tmp_path, **changes)
    with monkeypatch.context() as patch:
        calls = interrupted_at(patch, state, "save_file", 0)
        same_files(compressed(source, tmp_path, **changes), whole)
    # What was done is not done again, but for one file where a piece of two was cut in half (the plan is one).
    assert writes - 2 * (writes // 3) <= calls[0] <= writes - 2 * (writes // 3) + 1


def test_statistics_are_computed_once(source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, shared = text_file(tmp_path), tmp_path / "statistics"
    lowrank, auto = helpers.recipe(text, structure="lowrank", ratio=0.7), helpers.recipe(text, structure="auto")
    # Blocks run: 3 forward, 3 backward, 6 (dense and compressed) to fit.
    for i, (recipe, runs) in enumerate([(lowrank, 12), (auto, 6), (lowrank, 6)]):
        with monkeypatch.context() as patch:
            calls = interrupted_at(patch, Runner, "block", 0)
            artifact = compress_model(source, recipe, tmp_path / f"shared-{i}", statistics=shared)
        assert calls[0] == runs
        same_files(artifact, compress_model(source, recipe, tmp_path / f"alone-{i}"))
    assert len(list(shared.iterdir())) == 1


def test_other_calibrations_have_statistics_of_their_own(source: ModelSource, tmp_path: Path) -> None:
    text, shared = text_file(tmp_path), tmp_path / "statistics"
    for i, changes in enumerate(
        ({}, {"sensitivity": "none"}, {"calibration": {"seed": 1}}, {"sensitivity_samples": 3}, {"ratio": 0.7}), start=1
    ):
        recipe = helpers.recipe(text, structure="lowrank", **changes)
        artifact = compress_model(source, recipe, tmp_path / f"shared-{i}", statistics=shared)
        assert len(list(shared.iterdir())) == min(i, 4)  # the ratio has no part in it
        same_files(artifact, compress_model(source, recipe, tmp_path / f"alone-{i}"))
    text.write_text(tiny.TEXT[300:])
    compress_model(source, helpers.recipe(text, structure="lowrank"), tmp_path / "edited", statistics=shared)
    assert len(list(shared.iterdir())) == 5


def test_an_edited_choice_is_taken(source: ModelSource, build: Build, tmp_path: Path) -> None:
    whole = build("tiny_llama_tied", "auto")
    values = read_yaml(whole.path("recipe.yaml"))
    n, m = source.architecture().linears()["attn.q"]
    values["layers"]["layers.1.attn.q"] = {"structure": "lowrank", "in_features": m, "out_features": n, "rank": 5}
    artifact = compress_model(source, parse_recipe(values, "edited"), tmp_path / "out")
    reader, before = (CheckpointReader(a.path("checkpoint")) for a in (artifact, whole))
    assert reader.structure("layers.1.attn.q").to_config() == values["layers"]["layers.1.attn.q"]
    for linear in reader.linears():
        if linear != "layers.1.attn.q":
            assert reader.structure(linear) == before.structure(linear)


def test_selections_by_name_need_no_menu(source: ModelSource, build: Build, tmp_path: Path) -> None:
    """Structure dense and no sensitivity: the order of the neurons is found for the recipe's layers alone."""
    layers = {
        f"layers.1.mlp.{role}": {"structure": "select", "in_features": m, "out_features": n, "kept": 100, "side": side}
        for role, (n, m), side in (("gate", (160, 64), "out"), ("up", (160, 64), "out"), ("down", (64, 160), "in"))
    }
    artifact = compressed(source, tmp_path, structure="dense", sensitivity="none", layers=layers)
    model, ids = load_model(artifact.path("checkpoint")), tiny.token_ids(2, 16)
    assert model.model.layers[1].mlp.up.structure.name == "select"
    error = relative(logits_of(model, ids), logits_of(source.reference_model(torch.float32), ids))
    assert 1e-3 < error < 1


# ---- parity: what is not approximated, and plain checkpoints


@pytest.mark.parametrize(
    "kind",
    ["auto", "auto with kron", "auto with block rotations", "kron, cs", "kron, householder", "kron, paper", "slice"],
)
@pytest.mark.parametrize("name", ["tiny_llama_tied", "tiny_opt"])
def test_rung_1_is_exact(name: str, kind: str, build: Build, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Folded, rotated and with the skips of the checkpoint, but nothing approximated: the source's own logits."""
    source, ids = tiny_source(tiny_model, name), tiny.token_ids(2, 16)
    model = rewritten_model(source, build(name, kind).path("checkpoint"), tmp_path)
    assert relative(logits_of(model, ids), logits_of(source.reference_model(torch.float32), ids)) < 1e-4


REFUSED = {
    "slice": "the skips of --structure slice drop part of the stream",
    "bias": "needs a bias that its own class does not have",
    "mean": r"writes a mean .* do without --materialize-dense",
}


@pytest.mark.parametrize(
    ("name", "kind", "refused"),
    [
        ("tiny_llama_tied", "auto", None),
        ("tiny_llama_tied", "auto with kron", None),
        ("tiny_llama_tied", "auto, joint", None),
        ("tiny_llama_tied", "auto, embedding", None),
        ("tiny_llama_tied", "kron, cs", None),
        ("tiny_llama_tied", "kron, householder", None),
        ("tiny_llama_tied", "kron, paper", None),
        ("tiny_llama_tied", "gs, paper", None),
        ("tiny_llama_tied", "lowrank, joint", None),
        ("tiny_llama_tied", "compot", None),
        ("tiny_llama_tied", "jrk, embedding", None),
        ("tiny_llama_tied", "auto, vo, bias", "bias"),
        ("tiny_llama_tied", "slice", "slice"),
        ("tiny_llama_bias", "auto, vo, bias", None),
        ("tiny_llama_bias", "auto, embedding", None),
        ("tiny_qwen2", "auto, joint", None),
        ("tiny_opt", "auto", None),
        ("tiny_opt", "auto, vo, bias", None),
        ("tiny_opt", "auto with kron", None),
        ("tiny_opt", "kron, cs", None),
        ("tiny_opt", "lowrank, bias", None),
        ("tiny_opt", "gs", "mean"),
        ("tiny_opt", "compot", "mean"),
        ("tiny_opt_untied", "auto, embedding", "bias"),
    ],
)
def test_plain_checkpoints(
    name: str, kind: str, refused: str | None, build: Build, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source, checkpoint = tiny_source(tiny_model, name), build(name, kind).path("checkpoint")
    if refused is not None:
        with pytest.raises(UsageError, match=REFUSED[refused]):
            write_plain(source, folded(source), checkpoint, tmp_path)
        return
    write_plain(source, folded(source), checkpoint, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tiny.token_ids(2, 16)
    assert type(plain) is type(source.reference_model(torch.float32))
    assert relative(logits_of(plain, ids), logits_of(load_model(checkpoint), ids)) < 1e-4
