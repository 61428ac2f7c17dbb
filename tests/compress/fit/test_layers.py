"""Sequential fits: exact where they can be, better with correction than without, finite on hostile data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.architecture import SUB_BLOCKS, WRITERS, Architecture
from compress.artifact.state import mapped
from compress.calibration.moments import collect
from compress.calibration.streams import Runner
from compress.calibration.text import load_text
from compress.calibration.tokens import token_sequences
from compress.checkpoint.loading import load_model
from compress.checkpoint.reader import read_rotations
from compress.fit.layers import LayerFitter
from compress.fit.record import FitRecord
from compress.linalg import damped
from compress.rewrites.folding import folded
from compress.rewrites.rotations import rotate_block
from compress.source.model import ModelSource
from compress.structures import (
    DenseStructure,
    GroupShuffleStructure,
    KroneckerStructure,
    LowRankStructure,
    Structure,
)
from tests import tiny
from tests.compress import helpers
from tests.compress.helpers import (
    TinyModel,
    compressed,
    kept_in,
    logits_of,
    make_plan,
    relative,
    text_file,
    tiny_source,
    with_weights,
)


def exact(arch: Architecture, kind: str) -> dict[str, Structure]:
    """Structures of full size for all linears: they can hold every matrix without error."""
    chosen: dict[str, Structure] = {}
    for i in range(arch.num_layers):
        for role, (n, m) in arch.linears().items():
            side = "out" if role in WRITERS.values() else "in"
            sizes = {"in_features": m, "out_features": n}
            chosen[f"layers.{i}.{role}"] = {
                "kron": lambda sizes=sizes, side=side: KroneckerStructure(**sizes, blocks=4, terms=4, side=side),
                "leading": lambda sizes=sizes, side=side: KroneckerStructure(
                    **sizes, blocks=4, terms=4, side=side, mix="leading"
                ),
                "both": lambda sizes=sizes: KroneckerStructure(**sizes, blocks=4, terms=4, side="both", n1=2, m1=2),
                "gs": lambda sizes=sizes, n=n, m=m: GroupShuffleStructure(
                    **sizes, left_blocks=2, right_blocks=2, rank=min(n, m) // 2
                ),
                "lowrank": lambda sizes=sizes, n=n, m=m: LowRankStructure(**sizes, rank=min(n, m)),
            }[kind]()
    return chosen


@pytest.mark.parametrize("kind", ["kron", "leading", "both", "gs", "lowrank"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_opt"])
def test_full_size_structures_give_the_dense_model(name: str, kind: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_source(tiny_model, name)
    layers = {linear: s.to_config() for linear, s in exact(source.architecture(), kind).items()}
    artifact = compressed(source, tmp_path, structure="dense", layers=layers)
    ids = tiny.token_ids(2, 20)
    model = load_model(artifact.path("checkpoint"))
    assert "weight" not in dict(model.model.layers[0].attn.q.named_parameters())  # the structure really is there
    assert relative(logits_of(model, ids), logits_of(source.reference_model(torch.float32), ids)) < 2e-4


@pytest.mark.parametrize(
    ("structure", "rotation"), [("kron", "shared"), ("gs", "none"), ("lowrank", "none"), ("auto", "none")]
)
@pytest.mark.parametrize("correction", [0.0, 1.0])
def test_ratio_one_gives_the_dense_model(
    structure: str, rotation: str, correction: float, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    artifact = compressed(source, tmp_path, structure=structure, rotation=rotation, ratio=1.0, correction=correction)
    ids = tiny.token_ids(2, 20)
    seen = logits_of(load_model(artifact.path("checkpoint")), ids)
    assert relative(seen, logits_of(source.reference_model(torch.float32), ids)) < 1e-4


class Fit:
    """The fits alone, with the two streams at the end."""

    def __init__(self, source: ModelSource, folder: Path, **changes: Any) -> None:
        folder.mkdir(parents=True)
        self.recipe = recipe = helpers.recipe(text_file(folder), **changes)
        arch = source.architecture()
        c = recipe.calibration
        self.tokens = token_sequences(
            load_text(c.data),
            source.tokenizer(),
            samples=c.samples,
            length=c.sequence_length,
            seed=c.seed,
            vocab_size=arch.vocab_size,
        )
        model, runner = folded(source), Runner(arch, c.sequence_length, torch.device("cpu"), 4)
        kept = kept_in(folder / "state")  # the text lies beside it
        self.moments = moments = collect(
            model,
            self.tokens[: recipe.sensitivity_samples],
            sensitivity=recipe.sensitivity,
            seed=0,
            runner=runner,
            kept=kept,
        )
        self.plan = plan = make_plan(model, recipe, moments)
        ends = model.ends(plan.rotations)
        self.files, self.records = LayerFitter(model, plan, recipe, moments, self.tokens, runner, kept, ends).run()
        shape = (*self.tokens.shape, arch.hidden_size)
        self.dense, self.compressed = (
            mapped(folder / "state" / f"fit-{n}-{arch.num_layers}.f32", shape).clone() for n in ("dense", "compressed")
        )

    def error(self) -> float:
        """Relative error of the last residual stream."""
        return float((self.compressed - self.dense).square().sum() / self.dense.square().sum())


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_opt"])
@pytest.mark.parametrize(("structure", "rotation"), [("kron", "shared"), ("lowrank", "none"), ("kron", "block")])
def test_correction_brings_the_last_stream_closer(
    name: str, structure: str, rotation: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_source(tiny_model, name)
    errors = [
        Fit(
            source,
            tmp_path / str(correction),
            structure=structure,
            rotation=rotation,
            ratio=0.8,
            correction=correction,
            calibration={"samples": 17, "sequence_length": 64},
        ).error()
        for correction in (0.0, 0.5)
    ]
    assert 0 < errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("rotation", ["shared", "block"])
def test_streams_are_those_of_the_two_models(rotation: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """What the fitter believes the compressed model does is what the written checkpoint does."""
    source = tiny_source(tiny_model, "tiny_llama")
    fit = Fit(source, tmp_path / "fit", rotation=rotation)
    artifact = compressed(source, tmp_path, rotation=rotation)
    hidden: list[Tensor] = []
    model = load_model(artifact.path("checkpoint"))
    model.model.layers[-1].register_forward_hook(lambda module, inputs, output: hidden.append(output))
    logits_of(model, fit.tokens)
    assert relative(fit.compressed, hidden[0]) < 1e-4
    # Rotations keep lengths: the dense stream is that of the source.
    reference = source.reference_model(torch.float32)
    with torch.no_grad():
        reference.model.layers[-1].register_forward_hook(
            lambda module, inputs, output: hidden.append(output if isinstance(output, Tensor) else output[0])
        )
        reference(fit.tokens)
    torch.testing.assert_close(fit.dense.norm(dim=-1), hidden[1].norm(dim=-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("structure", "rotation"), [("kron", "shared"), ("lowrank", "none")])
def test_relative_errors_are_those_of_the_checkpoint(
    structure: str, rotation: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """||X (W - What)|| / ||X W||, X what each linear reads in the finished model, G damped as the recipe says."""
    source = tiny_source(tiny_model, "tiny_opt")
    artifact = compressed(source, tmp_path, structure=structure, rotation=rotation)
    folder = artifact.path("checkpoint")
    model, arch = load_model(folder), source.architecture()
    inputs: dict[str, Tensor] = {}
    linears = {f"layers.{i}.{role}": (i, role) for i in range(arch.num_layers) for role in arch.linears()}
    for name in linears:
        module = model.get_submodule(f"model.{name}")
        module.register_forward_hook(lambda module, seen, output, name=name: inputs.update({name: seen[0]}))
    recipe = helpers.recipe(text_file(tmp_path), structure=structure, rotation=rotation)
    c = recipe.calibration
    tokens = token_sequences(
        load_text(c.data),
        source.tokenizer(),
        samples=c.samples,
        length=c.sequence_length,
        seed=c.seed,
        vocab_size=arch.vocab_size,
    )
    logits_of(model, tokens)
    records = {r["name"]: FitRecord(**r) for r in json.loads((folder / "fit.json").read_text())}
    assert list(records) == list(linears)
    blocks = [rotate_block(folded(source).block(i), arch, i, read_rotations(folder)) for i in range(arch.num_layers)]
    for name, (layer, role) in linears.items():
        X = inputs[name].double().flatten(0, 1)
        G = damped(X.T @ X / len(X), recipe.gram_damping)
        W = blocks[layer][f"{role}.weight"].double()
        module = model.get_submodule(f"model.{name}")
        E = W - module.structure.dense(module.factors()).double()
        direct = float((((E @ G) * E).sum() / ((W @ G) * W).sum()).sqrt())
        assert records[name].relative_error == pytest.approx(direct, rel=1e-3, abs=1e-6)
        n, m = arch.linears()[role]
        assert records[name].dense_parameters == n * m
        assert records[name].parameters == module.structure.parameter_count()
        assert records[name].structure == module.structure.name
    assert sum(isinstance(model.get_submodule(f"model.{n}").structure, DenseStructure) for n in linears) < len(linears)


@pytest.mark.parametrize("rotation", ["shared", "block"])
def test_writers_are_fitted_in_the_loss_metric(rotation: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """The best B of K B, K the leading coordinates, in the metric H of the rotated stream: K^T H (W - K B) = 0."""
    source = tiny_source(tiny_model, "tiny_llama")
    fit = Fit(source, tmp_path / "fit", rotation=rotation, correction=0, ratio=0.6)
    arch, model, seen = source.architecture(), folded(source), 0
    for layer, file in enumerate(fit.files):
        weights, factors = rotate_block(model.block(layer), arch, layer, fit.plan.rotations), load_file(file)
        for sub, role in WRITERS.items():
            name = f"model.layers.{layer}.{role}.B"
            if name not in factors:
                continue
            gradient = (fit.moments[layer, sub].gradients or {}).get(role)
            q = fit.plan.rotations.at(2 * layer + SUB_BLOCKS.index(sub) + 1)
            assert gradient is not None
            assert q is not None
            H, B = q.T @ damped(gradient, fit.recipe.metric_damping) @ q, factors[name].double()
            E = weights[f"{role}.weight"].double().clone()
            whole = float((H @ E).norm())
            E[: len(B)] -= B
            assert float((H @ E)[: len(B)].norm()) < 1e-5 * whole
            assert float((H @ E)[len(B) :].norm()) > 1e-3 * whole
            seen += 1
    assert seen >= 3


# ---- hostile data


def switch_off(state: dict[str, Tensor]) -> None:
    """Half the neurons of one block, one value head of another, and the whole MLP of the last."""
    state["model.layers.0.mlp.up_proj.weight"][:80] = 0
    state["model.layers.1.self_attn.v_proj.weight"][:16] = 0
    state["model.layers.2.mlp.down_proj.weight"].zero_()


ALL = [
    ("kron", "shared"),
    ("kron", "block"),
    ("kron", "none"),
    ("gs", "none"),
    ("lowrank", "none"),
    ("auto", "none"),
    ("auto", "shared"),
]


@pytest.mark.parametrize("sensitivity", ["fisher", "none"])
@pytest.mark.parametrize(("structure", "rotation"), ALL)
def test_dead_neurons(structure: str, rotation: str, sensitivity: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source = with_weights(tiny_source(tiny_model, "tiny_llama"), tmp_path / "model", switch_off)
    artifact = compressed(source, tmp_path, structure=structure, rotation=rotation, sensitivity=sensitivity)
    check_sane(artifact.path("checkpoint"))


@pytest.mark.parametrize(("structure", "rotation"), ALL)
def test_fewer_tokens_than_dimensions(structure: str, rotation: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    artifact = compressed(
        source,
        tmp_path,
        structure=structure,
        rotation=rotation,
        correction=1.0,
        calibration={"samples": 2, "sequence_length": 5},
    )
    check_sane(artifact.path("checkpoint"))


@pytest.mark.parametrize(("structure", "rotation"), ALL)
def test_constant_text(structure: str, rotation: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """One token for ever: every Gram matrix has rank one or little more."""
    source = tiny_source(tiny_model, "tiny_opt")
    (tmp_path / "same.txt").write_text("a" * 2000)
    artifact = compressed(
        source,
        tmp_path,
        structure=structure,
        rotation=rotation,
        calibration={"data": str(tmp_path / "same.txt"), "samples": 4, "sequence_length": 16},
    )
    check_sane(artifact.path("checkpoint"))


def check_sane(checkpoint: Path) -> None:
    """Every number finite, and no factor of a size that would not survive float16."""
    model = load_model(checkpoint)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert float(parameter.abs().max()) < 1e4, name
    assert torch.isfinite(logits_of(model, tiny.token_ids(2, 16))).all()
