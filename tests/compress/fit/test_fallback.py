"""Hostile models and fits that fail: what is written is finite, exact where it fell back, and says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.artifact.store import Artifact
from compress.checkpoint.loading import load_model
from compress.checkpoint.reader import CheckpointReader
from compress.errors import UsageError
from compress.fit import fallback
from compress.fit.fallback import Linear, fit_linears
from compress.fit.layers import LayerFitter
from compress.linalg import Moment, NumericalError, is_singular, noted_damping, weighted_error
from compress.pipeline import compress_model
from compress.recipe import parse_recipe, read_yaml
from compress.rewrites.folding import folded
from compress.source.model import ModelSource
from compress.source.resolve import resolve
from compress.structures import (
    CompotStructure,
    DenseStructure,
    GroupShuffleStructure,
    LowRankStructure,
    SelectStructure,
    Structure,
)
from compress.structures.joint import joint_fit
from tests import tiny
from tests.compress.helpers import TinyModel, compressed, logits_of, tiny_source

METHODS: list[dict[str, Any]] = [
    {"structure": "lowrank"},
    {"structure": "lowrank", "joint": True},
    {"structure": "lowrank", "inner": ["neurons", "vo", "bias"]},
    {"structure": "kron", "rotation": "shared"},
    {"structure": "kron", "rotation": "block", "ratio": 0.9},
    {"structure": "kron", "ties": False, "rotation": "none"},
    {"structure": "gs"},
    {"structure": "compot", "unit": 8, "ratio": 0.9},
]


def name_of(method: dict[str, Any]) -> str:
    return " ".join(str(value) for value in method.values())


def with_weights(
    source: ModelSource, folder: Path, change: Callable[[dict[str, Tensor]], None], dtype: torch.dtype | None = None
) -> ModelSource:
    """A copy of the model with `change` applied to its state dict."""
    shutil.copytree(source.path, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    state = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return resolve(str(folder))


def records_of(artifact: Artifact) -> dict[str, dict[str, Any]]:
    return {r["name"]: r for r in json.loads((artifact.path("checkpoint") / "fit.json").read_text())}


def check_sane(artifact: Artifact) -> None:
    """Every number finite, in the checkpoint and in what it computes."""
    model = load_model(artifact.path("checkpoint"))
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
    assert torch.isfinite(logits_of(model, tiny.token_ids(2, 24))).all()
    assert all(0 <= r["relative_error"] < 100 for r in records_of(artifact).values())


def outliers(state: dict[str, Tensor]) -> None:
    """A feature of the stream 1e4 times the rest, which the norms take back, and inner features of the same size."""
    state["model.embed_tokens.weight"][:, 5] *= 1e4
    for norm in [name for name in state if name.endswith("norm.weight")]:
        state[norm] *= 1e4 / 8  # a normalised stream of 64 features has length 8
        state[norm][5] = 1e-2
    state["model.layers.1.mlp.up_proj.weight"][7] *= 1e4
    state["model.layers.1.mlp.down_proj.weight"][:, 7] *= 1e-4
    state["model.layers.2.self_attn.v_proj.weight"][3] *= 1e4
    for column in (3, 19):  # both heads that read this value coordinate
        state["model.layers.2.self_attn.o_proj.weight"][:, column] *= 1e-4


def dead(state: dict[str, Tensor]) -> None:
    """Rows and columns of zeros in the activations, whole inputs of zeros, and a weight of zeros."""
    state["model.layers.0.mlp.up_proj.weight"][:80] = 0
    state["model.layers.1.self_attn.v_proj.weight"].zero_()
    state["model.layers.1.mlp.gate_proj.weight"].zero_()
    state["model.layers.2.mlp.down_proj.weight"].zero_()
    state["model.embed_tokens.weight"][:, 9] = 0


@pytest.mark.parametrize("method", METHODS, ids=name_of)
@pytest.mark.parametrize("change", [outliers, dead])
def test_hostile_weights(
    change: Callable[[dict[str, Tensor]], None],
    method: dict[str, Any],
    tiny_model: TinyModel,
    tmp_path: Path,
) -> None:
    source = with_weights(tiny_source(tiny_model, "tiny_llama"), tmp_path / "model", change)
    artifact = compressed(source, tmp_path, **method)
    check_sane(artifact)
    plain = compressed(source, tmp_path / "plain", sensitivity="none", correction=0.0, **method)
    check_sane(plain)
    assert all(r["relative_error"] < 1.1 for r in records_of(plain).values())  # 1 is no matrix at all
    if change is dead and method["structure"] != "kron":  # rotated, a zero is no longer an axis
        seen = records_of(artifact)["layers.1.mlp.down"]  # all that it reads is 0
        assert "Gram matrix" in seen["damped"]


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_bfloat16_weights(method: dict[str, Any], tiny_model: TinyModel, tmp_path: Path) -> None:
    source = with_weights(tiny_source(tiny_model, "tiny_llama"), tmp_path / "model", lambda s: None, torch.bfloat16)
    artifact = compressed(source, tmp_path, checkpoint_dtype="bfloat16", **method)
    check_sane(artifact)
    assert CheckpointReader(artifact.path("checkpoint")).get("model.embed_tokens.weight").dtype == torch.bfloat16
    whole = compressed(tiny_source(tiny_model, "tiny_llama"), tmp_path / "float32", **method)
    errors = [sum(r["relative_error"] for r in records_of(a).values()) for a in (artifact, whole)]
    assert errors[0] == pytest.approx(errors[1], rel=0.15)


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_damping_is_told(
    method: dict[str, Any], tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """10 tokens for 64 features and more: no Gram matrix has full rank."""
    source = tiny_source(tiny_model, "tiny_llama")
    artifact = compressed(source, tmp_path, calibration={"samples": 2, "sequence_length": 5}, **method)
    records = records_of(artifact)
    assert all("Gram matrix" in r["damped"] for r in records.values())
    structured = [r for r in records.values() if r["structure"] != "dense"]
    assert all("metric" in r["damped"] for r in structured)
    line = f"the Gram matrices of {len(structured)} structured linears, the metrics of {len(structured)}"
    assert line in capsys.readouterr().err
    model = load_model(artifact.path("checkpoint"))
    assert torch.isfinite(logits_of(model, tiny.token_ids(1, 8))).all()


def test_no_damping_is_told_where_none_was_needed(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    records = records_of(compressed(source, tmp_path, structure="lowrank"))
    assert records["layers.0.attn.q"]["damped"] is None
    assert not any(r["failed"] or r["note"] for r in records.values())


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_damping_too_small_is_refused_or_survived(
    method: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    """One token for ever, and as good as no damping of moments that are kept in float32."""
    source = tiny_source(tiny_model, "tiny_llama")
    (tmp_path / "same.txt").write_text("a" * 2000)
    calibration = {"data": str(tmp_path / "same.txt"), "samples": 4, "sequence_length": 16}
    try:
        artifact = compressed(
            source, tmp_path, calibration=calibration, gram_damping=1e-12, metric_damping=1e-12, **method
        )
    except UsageError as error:
        assert "gram_damping" in str(error)  # noqa: PT017 (either outcome is right)
        return
    model = load_model(artifact.path("checkpoint"))
    assert torch.isfinite(logits_of(model, tiny.token_ids(1, 8))).all()


# ---- calibration that is not finite


def overflowing(source: ModelSource, folder: Path, name: str) -> ModelSource:
    """Finite weights (the reader refuses others), so large that squares overflow."""

    def enlarge(state: dict[str, Tensor]) -> None:
        state[name] *= 1e25

    return with_weights(source, folder, enlarge)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.1.mlp.up_proj.weight", r"layers\.1, mlp\.down"),
        ("model.layers.2.self_attn.v_proj.weight", r"layers\.2, attn\.o"),
        ("model.embed_tokens.weight", "the token embedding"),
        ("lm_head.weight", "the logits"),
    ],
)
def test_activations_that_overflow_are_refused(name: str, place: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source = overflowing(tiny_source(tiny_model, "tiny_llama"), tmp_path / "model", name)
    with pytest.raises(UsageError, match=place):
        compressed(source, tmp_path, structure="lowrank")
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_the_fitter_refuses_them_too(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Without sensitivity compot collects no statistics beforehand."""
    name = "model.layers.1.mlp.up_proj.weight"
    source = overflowing(tiny_source(tiny_model, "tiny_llama"), tmp_path / "model", name)
    with pytest.raises(UsageError, match=r"layers\.1\.mlp"):
        compressed(source, tmp_path, structure="compot", unit=8, sensitivity="none", allocation="uniform")
    assert not (tmp_path / "out" / "checkpoint").exists()


# ---- fits that fail


class Sabotage:
    """Replaces what `fallback._factors` gives for chosen calls; `change` gets factors and whether they are weighted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, change: Callable[[list[dict[str, Tensor]], bool], Any]) -> None:
        self.seen = 0
        true = fallback._factors

        def factors(parts: Any, gram: Any) -> Any:
            found = true(parts, gram)
            self.seen += 1
            return change(found, gram is not None) if self.wanted(parts) else found

        self.wanted: Callable[[Any], bool] = lambda parts: True
        monkeypatch.setattr(fallback, "_factors", factors)


def spoilt(found: list[dict[str, Tensor]], weighted: bool) -> list[dict[str, Tensor]]:
    found[-1]["U"][0, 0] = torch.nan
    return found


def unsolved(found: list[dict[str, Tensor]], weighted: bool) -> list[dict[str, Tensor]]:
    raise torch.linalg.LinAlgError("eigh did not converge")  # type: ignore[attr-defined]


def indefinite(found: list[dict[str, Tensor]], weighted: bool) -> list[dict[str, Tensor]]:
    return [Moment.of(-torch.eye(3), 3, "Gram matrix", torch.ones(1)) for _ in found]  # type: ignore[misc]


def enlarged(found: list[dict[str, Tensor]], weighted: bool) -> list[dict[str, Tensor]]:
    return [{key: 10 * factor for key, factor in factors.items()} for factors in found]


def width(size: int) -> Callable[[Any], bool]:
    return lambda parts: parts[0].weight.shape[1] == size


@pytest.mark.parametrize("change", [spoilt, unsolved, indefinite, enlarged])
def test_a_fit_that_fails_leaves_the_linear_dense(
    change: Any,
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    Sabotage(monkeypatch, change).wanted = width(160)  # every down
    down = LowRankStructure(160, 64, 24).to_config()
    layers = {f"layers.{i}.mlp.down": down for i in range(3)}
    artifact = compressed(source, tmp_path, structure="lowrank", ratio=0.6, layers=layers)
    err = capsys.readouterr().err
    downs = [f"layers.{i}.mlp.down" for i in range(3)]
    records, reader = records_of(artifact), CheckpointReader(artifact.path("checkpoint"))
    assert {name for name, r in records.items() if r["failed"]} == set(downs)
    for name in downs:
        r = records[name]
        assert (r["structure"], r["parameters"], r["relative_error"]) == ("dense", r["dense_parameters"], 0)
        assert not r["predicted_loss"]
        assert r["note"].startswith("left dense: ")
        assert f"warning: {name} {r['note']}" in err
        assert isinstance(reader.structure(name), DenseStructure)
        weight = folded(source).block(int(name.split(".")[1]))["mlp.down.weight"]
        assert torch.equal(reader.get(f"model.{name}.weight"), weight)
        assert yaml.safe_load(artifact.path("recipe.yaml").read_text())["layers"][name]["structure"] == "dense"
    # The others were fitted, and everything counts what really is stored.
    assert any(isinstance(reader.structure(n), LowRankStructure) for n in reader.linears())
    stored = sum(r["parameters"] for r in records.values()) / sum(r["dense_parameters"] for r in records.values())
    assert artifact.read_manifest()["stages"]["checkpoint"]["ratio"] == pytest.approx(stored)
    assert torch.isfinite(logits_of(load_model(artifact.path("checkpoint")), tiny.token_ids(2, 16))).all()


def test_the_written_recipe_repeats_the_fall_back(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    with monkeypatch.context() as patch:
        Sabotage(patch, spoilt).wanted = width(160)
        first = compressed(source, tmp_path, structure="lowrank", ratio=0.6)
    recipe = parse_recipe(read_yaml(first.path("recipe.yaml")), "a test")
    again = compress_model(source, recipe, tmp_path / "again")
    folders = [a.path("checkpoint") for a in (first, again)]
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert configs[0]["structures"] == configs[1]["structures"]


def test_an_interrupted_run_remembers_the_fall_back(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, true = tiny_source(tiny_model, "tiny_llama"), LayerFitter._fit
    layers: dict[str, Structure] = {"attn.q": LowRankStructure(64, 64, 8)}
    for role in ("gate", "up"):
        layers[f"mlp.{role}"] = SelectStructure(64, 160, 100, 1, "out", LowRankStructure(64, 100, 8))
    layers["mlp.down"] = SelectStructure(160, 64, 100, 1, "in", LowRankStructure(100, 64, 8))
    given = {f"layers.0.{role}": structure.to_config() for role, structure in layers.items()}
    method = {"structure": "lowrank", "ratio": 0.6, "layers": given}

    def stop(self: LayerFitter, layer: int) -> Any:
        if layer == 1:
            raise KeyboardInterrupt
        return true(self, layer)

    with monkeypatch.context() as patch:
        Sabotage(patch, unsolved)
        patch.setattr(LayerFitter, "_fit", stop)
        with pytest.raises(KeyboardInterrupt):
            compressed(source, tmp_path, **method)
    artifact = compressed(source, tmp_path, **method)
    records, reader = records_of(artifact), CheckpointReader(artifact.path("checkpoint"))
    failed = {name for name, r in records.items() if r["failed"]}
    assert failed >= set(given)
    assert all(name.startswith("layers.0.") for name in failed)
    assert isinstance(reader.structure("layers.0.attn.q"), DenseStructure)
    assert reader.structure("layers.0.mlp.down") == SelectStructure(160, 64, 100)
    for name in reader.linears():
        assert reader.structure(name).name == records[name]["structure"]
        assert reader.structure(name).parameter_count() == records[name]["parameters"]
    assert torch.isfinite(logits_of(load_model(artifact.path("checkpoint")), tiny.token_ids(2, 16))).all()


def test_what_shares_a_factor_falls_back_together(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    Sabotage(monkeypatch, spoilt).wanted = lambda parts: len(parts) > 1
    artifact = compressed(source, tmp_path, structure="lowrank", joint=True, ratio=0.5)
    failed = {name for name, r in records_of(artifact).items() if r["failed"]}
    groups = {name.rsplit(".", 1)[0] for name in failed}
    assert failed
    for group in groups:
        roles = ("q", "k", "v") if group.endswith("attn") else ("gate", "up")
        assert {name for name in failed if name.startswith(group)} == {f"{group}.{role}" for role in roles}
    config = json.loads((artifact.path("checkpoint") / "config.json").read_text())
    assert not failed & set(config["structures"])
    assert torch.isfinite(logits_of(load_model(artifact.path("checkpoint")), tiny.token_ids(2, 16))).all()


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_opt"])
@pytest.mark.parametrize("inner", ["neurons", "vo"])
def test_a_selection_falls_back_to_what_it_keeps(
    name: str, inner: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept rows and columns as they are: the same function as dense linears between the features that are left."""
    source = tiny_source(tiny_model, name)
    arch = source.architecture()
    (tmp_path / "good").mkdir()
    select = {}
    for layer in range(arch.num_layers):
        for role, (n, m) in arch.linears().items():
            groups = {"attn.v": arch.num_kv_heads, "attn.o": arch.num_heads}.get(role, 1)
            if role in ("attn.v", "attn.o") if inner == "vo" else role.startswith("mlp"):
                side = "in" if role in ("attn.o", "mlp.down") else "out"
                size = (m if side == "in" else n) // groups
                config = SelectStructure(m, n, size // 2, groups, side)  # type: ignore[arg-type]
                core = LowRankStructure(*config.reduced_sizes, 4).to_config()
                select[f"layers.{layer}.{role}"] = {**config.to_config(), "core": core}
    Sabotage(monkeypatch, unsolved)
    artifact = compressed(source, tmp_path, structure="lowrank", ratio=1.0, layers=select, correction=0.5)
    reader, records = CheckpointReader(artifact.path("checkpoint")), records_of(artifact)
    assert {n for n, r in records.items() if r["failed"]} == set(select)
    for linear in select:
        structure = reader.structure(linear)
        assert isinstance(structure, SelectStructure)
        assert structure.core is None
        assert records[linear]["parameters"] == structure.parameter_count()
        assert "between its kept features" in records[linear]["note"]
    # Dense linears in their place, with the dropped rows and columns at zero, compute the same.
    model, ids = load_model(artifact.path("checkpoint")), tiny.token_ids(2, 24)
    seen = logits_of(model, ids)
    for linear in select:
        module = model.get_submodule(f"model.{linear}")
        side = module.structure.side
        weight = module.structure.dense(module.factors())
        kept = module.structure.features()
        assert float(weight.norm()) > 0
        assert float(weight.index_fill(1 if side == "in" else 0, kept, 0).abs().max()) == 0
        n, m = weight.shape
        module.structure, module.factor_names = DenseStructure(m, n), ("weight",)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
    torch.testing.assert_close(logits_of(model, ids), seen, rtol=1e-4, atol=1e-4)


def test_a_better_unweighted_fit_is_taken(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(found: list[dict[str, Tensor]], weighted: bool) -> list[dict[str, Tensor]]:
        return [{**f, "U": 0.01 * f["U"]} for f in found] if weighted else found

    source = tiny_source(tiny_model, "tiny_llama")
    Sabotage(monkeypatch, worse)
    artifact = compressed(source, tmp_path, structure="lowrank", ratio=0.6, correction=0.0)
    structured = [r for r in records_of(artifact).values() if r["structure"] != "dense"]
    assert structured
    assert all("unweighted" in r["note"] and not r["failed"] for r in structured)
    assert all(r["relative_error"] < 0.9 for r in structured)  # 0.99: the sabotaged fits


# ---- the parts


def problem(n: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W (n, m), G (m, m), H (n, n), float64, with falling spectra."""
    g = torch.Generator().manual_seed(seed)
    W, x, y = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((n, m), (4 * m, m), (4 * n, n)))
    x, y = x * 0.9 ** torch.arange(m), y * 0.9 ** torch.arange(n)
    return W, x.T @ x / len(x), y.T @ y / len(y)


STRUCTURES: list[Structure] = [
    LowRankStructure(24, 32, 6),
    GroupShuffleStructure(24, 32, 2, 2, 4),
    CompotStructure(24, 32, 12, 6),
    SelectStructure(24, 32, 12, 2, "in", LowRankStructure(24, 32, 6)),
    SelectStructure(24, 32, 8, 2, "out", LowRankStructure(24, 16, 6)),
]


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.name)
def test_a_good_fit_is_kept(structure: Structure) -> None:
    W, G, H = problem(32, 24)
    [fit] = fit_linears([Linear(structure, W, W, H)], G)
    assert (fit.structure, fit.failed) == (structure, False)
    if isinstance(structure, SelectStructure) and structure.side == "out":
        stay = structure.features()
        alone = structure.reduced.fit(W[stay], G, H[stay][:, stay])
    else:
        alone = structure.fit(W, G, H)
    for key, factor in alone.items():
        torch.testing.assert_close(fit.factors[key], factor.float() if factor.is_floating_point() else factor)
    if fit.note is None and not isinstance(structure, SelectStructure):
        plain = structure.dense(structure.fit(W))
        assert weighted_error(W, structure.dense(alone), G, H) <= weighted_error(W, plain, G, H)


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.name)
@pytest.mark.parametrize("what", ["indefinite", "nan gram", "nan target", "inf metric"])
def test_numbers_that_allow_no_fit(structure: Structure, what: str) -> None:
    W, G, H = problem(32, 24)
    target = W.clone()
    if what == "indefinite":
        G = G - 2 * torch.eye(24) * G.diagonal().mean()
    elif what == "nan gram":
        G[0, 0] = torch.nan
    elif what == "nan target":
        target[:] = torch.nan
    else:
        H[:] = torch.inf
    [fit] = fit_linears([Linear(structure, W, target, H)], G)
    assert fit.failed
    if isinstance(structure, SelectStructure):
        stay = structure.features()
        expected = torch.zeros_like(W)
        if structure.side == "in":
            expected[:, stay] = W[:, stay]
        else:
            expected[stay] = W[stay]
    else:
        expected = W
    assert torch.equal(fit.structure.dense(fit.factors), expected.float())


@pytest.mark.parametrize("structure", [DenseStructure(24, 32), SelectStructure(24, 32, 8, 2, "out")], ids=str)
def test_a_dense_linear_needs_no_fit_but_a_finite_target(structure: Structure) -> None:
    """It takes the corrected target in any metric, and stays what it was where that is not finite."""
    W, G, _ = problem(32, 24)
    stay = structure.features() if isinstance(structure, SelectStructure) else torch.arange(32)
    [fit] = fit_linears([Linear(structure, W, 2 * W, None)], -G)
    assert torch.equal(fit.factors["weight"], (2 * W)[stay].float())
    [fit] = fit_linears([Linear(structure, W, W * torch.inf, None)], G)
    assert (fit.failed, fit.structure) == (True, structure)
    assert torch.equal(fit.factors["weight"], W[stay].float())


def test_a_wrong_request_is_no_failed_fit() -> None:
    """Only what numbers do is caught: a matrix of another shape is a bug."""
    W, G, _ = problem(32, 24)
    with pytest.raises(UsageError, match="needs"):
        fit_linears([Linear(LowRankStructure(24, 32, 6), W, W, None)], G[:5, :5])
    with pytest.raises(UsageError, match="check the source model"):
        fit_linears([Linear(LowRankStructure(24, 32, 6), W * torch.nan, W, None)], G)


def test_a_joint_group_is_that_of_joint_fit() -> None:
    W, G, H = problem(32, 24)
    leader, follower = LowRankStructure(24, 32, 6), LowRankStructure(24, 32, 6, "attn.q")
    other = W.flip(0)
    fits = fit_linears([Linear(leader, W, W, H), Linear(follower, other, other, None)], G)
    v, us = joint_fit([W, other], 6, G, [H, None])
    for fit, u in zip(fits, us, strict=True):
        torch.testing.assert_close(fit.factors["V"], v.float())
        torch.testing.assert_close(fit.factors["U"], u.float())


def test_dictionaries_compare_where_the_weighted_fit_is_suspect(monkeypatch: pytest.MonkeyPatch) -> None:
    W, G, H = problem(32, 24)
    structure = CompotStructure(24, 32, 12, 6)
    calls: list[bool] = []
    true = fallback._factors

    def factors(parts: Any, gram: Any) -> Any:
        calls.append(gram is not None)
        found = true(parts, gram)
        if bad and gram is not None:
            found[0]["values"] *= 0.05  # hardly more than no matrix at all
        return found

    monkeypatch.setattr(fallback, "_factors", factors)
    bad = False
    fit_linears([Linear(structure, W, W, H)], G)
    assert calls == [True]
    bad = True
    [fit] = fit_linears([Linear(structure, W, W, H)], G)
    assert calls == [True, True, False]
    assert "unweighted" in str(fit.note)


def test_singular_moments_are_noted() -> None:
    full, rank_one = torch.eye(4, dtype=torch.float64), torch.ones(4, 4, dtype=torch.float64)
    assert not is_singular(full)
    assert is_singular(rank_one)
    assert is_singular(torch.zeros(4, 4))
    W = torch.ones(4, 4, dtype=torch.float64)
    with noted_damping() as noted:
        LowRankStructure(4, 4, 1).fit(W, full, full)
        assert noted == []
        LowRankStructure(4, 4, 1).fit(W, rank_one, torch.zeros(4, 4))
        assert noted == ["Gram matrix", "metric"]
    LowRankStructure(4, 4, 1).fit(W, rank_one)
    assert len(noted) == 2
    with pytest.raises(NumericalError):
        Moment.of(-full, 4, "Gram matrix", W)
