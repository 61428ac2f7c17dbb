"""The rewrites of inner features change nothing; bias correction is the best affine map."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.allocation.selection import neuron_order, value_output_basis
from compress.allocation.size import model_size
from compress.architecture import Architecture, extra_biases
from compress.calibration.gram import GramSum
from compress.checkpoint.loading import load_model
from compress.errors import UsageError
from compress.fit.bias import bias_correction, centred
from compress.model.blocks import Block, rotary_for
from compress.model.masks import attention_mask_bool
from compress.pipeline import compress_model
from compress.rewrites.folding import FoldedModel
from compress.rewrites.inner import InnerRewrites, RewrittenModel, change_value_basis, permute_neurons
from compress.rewrites.rotations import Rotations, Weights, rotate_block
from compress.source import families
from compress.source.resolve import resolve
from compress.structures import DenseStructure, LowRankStructure, SelectStructure, Structure, structure_from_config
from compress.structures.select import selected_roles, selection
from export.graph.decoder import export_onnx
from export.runtime.ort import OrtRunner
from tests import tiny
from tests.compress.helpers import TinyModel, logits_of, recipe, relative, text_file, tiny_source

F64 = torch.float64
NAMES = sorted(tiny.CONFIGS)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def folded(tiny_model: TinyModel, name: str) -> FoldedModel:
    source = resolve(str(tiny_model(name)))
    arch = source.architecture()
    return FoldedModel(source.reader(), arch, families.tensor_names(arch), F64)


def run(
    weights: Weights,
    arch: Architecture,
    x: Tensor,
    structures: dict[str, Structure] | None = None,
    places: dict[str, Tensor] | None = None,
) -> Tensor:
    """The block's output on x (batch, length, d), the second sequence padded; the places of a tap on request."""
    block = Block(arch, structures or {}, 1, skips=any("skip" in name for name in weights)).double()
    block.load_state_dict(weights)
    padding = torch.ones(len(x), x.shape[1], dtype=torch.int64)
    padding[1, :3] = 0
    mask = attention_mask_bool(padding, len(x), 0, x.shape[1], arch.sliding_window, x.device)
    tap = None if places is None else places.__setitem__
    with torch.no_grad():
        out: Tensor = block(x, rotary_for(arch, torch.arange(x.shape[1])[None]), mask, tap=tap)
    return out


def stream(arch: Architecture) -> Tensor:
    return torch.randn(2, 12, arch.hidden_size, generator=generator(0), dtype=F64)


def some_basis(arch: Architecture, seed: int) -> Tensor:
    """Invertible, not orthogonal."""
    shape = (arch.num_kv_heads, arch.head_dim, arch.head_dim)
    return torch.eye(arch.head_dim, dtype=F64) + 0.2 * torch.randn(shape, generator=generator(seed), dtype=F64)


def some_rewrites(arch: Architecture) -> InnerRewrites:
    layers = range(arch.num_layers)
    orders = {i: torch.randperm(arch.intermediate_size, generator=generator(i)) for i in layers}
    return InnerRewrites(orders, {i: some_basis(arch, 10 + i) for i in layers})


@pytest.mark.parametrize("kind", ["none", "shared", "block"])
@pytest.mark.parametrize("name", NAMES)
def test_rewrites_change_nothing(name: str, kind: str, tiny_model: TinyModel) -> None:
    """Grouped and plain heads, biases, qk norms, windows, ungated ReLU; with every kind of rotation on top."""
    model = folded(tiny_model, name)
    arch, x = model.arch, stream(model.arch)
    d, count = arch.hidden_size, {"none": 0, "shared": 1, "block": 2 * arch.num_layers + 1}[kind]
    matrices = [torch.linalg.qr(torch.randn(d, d, generator=generator(50 + i), dtype=F64)).Q for i in range(count)]
    rotations = Rotations(kind, tuple(matrices))
    before, after = model.block(1), RewrittenModel(model, some_rewrites(arch)).block(1)
    assert before.keys() == after.keys()
    for role in ("attn.v", "attn.o", "mlp.up", "mlp.down"):
        changed = (before[f"{role}.weight"] - after[f"{role}.weight"]).norm() / before[f"{role}.weight"].norm()
        assert changed > 0.1
    seen, expected = (run(rotate_block(w, arch, 1, rotations), arch, x) for w in (after, before))
    assert (seen - expected).abs().max() < 1e-11 * expected.abs().max()
    # The rewrites commute with the rotation.
    other = some_rewrites(arch).block(rotate_block(before, arch, 1, rotations), arch, 1)
    for key, tensor in rotate_block(after, arch, 1, rotations).items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["tiny_opt", "tiny_llama_bias", "tiny_qwen2"])
def test_bias_of_v_moves_to_o_where_o_has_one(name: str, tiny_model: TinyModel) -> None:
    model = folded(tiny_model, name)
    before = model.block(0)
    after = change_value_basis(before, model.arch, some_basis(model.arch, 3))
    assert float(before["attn.v.bias"].abs().max()) > 0.1
    if name == "tiny_qwen2":
        assert float(after["attn.v.bias"].abs().max()) > 0.1
    else:
        assert float(after["attn.v.bias"].abs().max()) == 0
        assert float((after["attn.o.bias"] - before["attn.o.bias"]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_opt", "tiny_qwen3"])
def test_a_selection_of_everything_is_the_block(name: str, tiny_model: TinyModel) -> None:
    model = folded(tiny_model, name)
    arch, x, weights = model.arch, stream(model.arch), model.block(1)
    structures: dict[str, Structure] = {
        f"layers.1.{role}": selection(arch, role, arch.head_dim if sub == "attn" else arch.intermediate_size)
        for sub in ("attn", "mlp")
        for role in selected_roles(arch, sub)
    }
    assert (run(weights, arch, x, structures) - run(weights, arch, x)).abs().max() < 1e-11


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_bias", "tiny_opt", "tiny_qwen3"])
def test_what_a_selection_drops_contributes_nothing(name: str, tiny_model: TinyModel) -> None:
    """The block with selections = the block with those rows and columns (and biases) set to zero, without structures;
    the bias of a dropped neuron, act(b) of which is not zero, is not read by down."""
    model = folded(tiny_model, name)
    arch, x, weights = model.arch, stream(model.arch), model.block(1)
    weights = some_rewrites(arch).block(weights, arch, 1)
    kept = {"attn": arch.head_dim // 2, "mlp": 37}
    structures, state, plain = dict[str, Structure](), dict(weights), dict(weights)
    for sub, count in kept.items():
        for role in selected_roles(arch, sub):
            structure = selection(arch, role, count)
            structures[f"layers.1.{role}"] = structure
            axis, stay = int(structure.side == "in"), structure.features()
            state[f"{role}.weight"] = weights[f"{role}.weight"].index_select(axis, stay)
            plain[f"{role}.weight"] = structure.dense({"weight": state[f"{role}.weight"]})
            if f"{role}.bias" in weights:
                plain[f"{role}.bias"] = structure.kept_bias(weights[f"{role}.bias"])
    for biases in (weights, plain):  # as they were, and without those of what was dropped
        state |= {key: biases[key] for key in weights if key.endswith("bias")}
        assert (run(state, arch, x, structures) - run(plain, arch, x)).abs().max() < 1e-11


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_opt"])
def test_predicted_losses_are_those_of_the_block(name: str, tiny_model: TinyModel) -> None:
    """Order and basis from the moments of the inputs, the rewrite, the selection with its refit: the error at the
    writers' outputs is the one that was predicted before any of it."""
    model = folded(tiny_model, name)
    arch, x = model.arch, torch.randn(2, 200, model.arch.hidden_size, generator=generator(1), dtype=F64)
    weights = model.block(1)
    if "attn.v.bias" in weights:  # moved to o beforehand: see InnerRewrites.input_moment
        eye = torch.eye(arch.head_dim, dtype=F64).expand(arch.num_kv_heads, -1, -1)
        weights = change_value_basis(weights, arch, eye)
    places: dict[str, Tensor] = {}
    run(weights, arch, x, places=places)
    rows = {place: places[place].flatten(0, 1) for place in ("attn.o", "mlp.down", "attn.out", "mlp.out")}
    grams = {place: rows[place].T @ rows[place] / len(rows[place]) for place in ("attn.o", "mlp.down")}
    basis, values = value_output_basis(
        weights["attn.o.weight"], grams["attn.o"], None, arch.num_kv_heads, arch.head_dim
    )
    order, neurons = neuron_order(weights["mlp.down.weight"], grams["mlp.down"])
    rewrites = InnerRewrites({1: order}, {1: basis})
    after = rewrites.block(weights, arch, 1)
    new_places: dict[str, Tensor] = {}
    run(after, arch, x, places=new_places)
    for role, kept, curve in (("attn.o", arch.head_dim // 2, values), ("mlp.down", 40, neurons)):
        gram = rewrites.input_moment(grams[role], arch, 1, role)
        inner = new_places[role].flatten(0, 1)
        torch.testing.assert_close(gram, inner.T @ inner / len(inner), rtol=1e-8, atol=1e-8)
        structure = selection(arch, role, kept)
        y = structure.apply(structure.fit(after[f"{role}.weight"], gram), inner)
        if f"{role}.bias" in after:
            y = y + after[f"{role}.bias"]
        error = (y - rows["attn.out" if role == "attn.o" else "mlp.out"]).square().sum() / len(y)
        # Within what damping a singular Gram matrix costs.
        assert float(error) / 2 == pytest.approx(float(curve[kept]), rel=1e-3)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_opt"])
def test_gradient_moments_follow_the_rewrite(name: str, tiny_model: TinyModel) -> None:
    model = folded(tiny_model, name)
    arch, weights, rewrites = model.arch, model.block(1), some_rewrites(model.arch)
    target = torch.randn(2, 12, arch.hidden_size, generator=generator(5), dtype=F64)

    def moments(weights: Weights) -> dict[str, Tensor]:
        block = Block(arch, {}, 1, skips=False).double()
        block.load_state_dict(weights)
        x, seen = stream(arch).requires_grad_(), dict[str, Tensor]()
        roles = (*arch.readers("attn"), *arch.readers("mlp"))
        for role in roles:
            block.get_submodule(role).register_forward_hook(
                lambda _module, _inputs, y, role=role: seen.__setitem__(role, y)  # type: ignore[misc]
            )
        mask = attention_mask_bool(None, 2, 0, 12, None, x.device)
        y = block(x, rotary_for(arch, torch.arange(12)[None]), mask)
        gradients = torch.autograd.grad((y * target).sum(), [seen[role] for role in roles])
        flat = [g.flatten(0, 1) for g in gradients]
        return {role: g.T @ g for role, g in zip(roles, flat, strict=True)}

    before, after = moments(weights), moments(rewrites.block(weights, arch, 1))
    for role, moment in before.items():
        seen = rewrites.gradient_moment(moment, arch, 1, role)
        torch.testing.assert_close(seen, after[role], rtol=1e-9, atol=1e-9)
        assert torch.equal(rewrites.gradient_moment(moment, arch, 7, role), moment)  # another layer


def test_rewrites_are_saved(tmp_path: Path, tiny_model: TinyModel) -> None:
    arch = folded(tiny_model, "tiny_llama").arch
    rewrites = some_rewrites(arch)
    rewrites.save(tmp_path / "inner.safetensors")
    loaded = InnerRewrites.load(tmp_path / "inner.safetensors")
    assert loaded.orders.keys() == rewrites.orders.keys() == loaded.bases.keys()
    assert all(torch.equal(loaded.orders[i], order) for i, order in rewrites.orders.items())
    assert all(torch.equal(loaded.bases[i], basis) for i, basis in rewrites.bases.items())


def test_refusals(tiny_model: TinyModel) -> None:
    model = folded(tiny_model, "tiny_llama")
    weights, arch = model.block(0), model.arch
    with pytest.raises(UsageError, match="permutation"):
        permute_neurons(weights, arch, torch.zeros(arch.intermediate_size, dtype=torch.int64))
    with pytest.raises(UsageError, match="this model needs"):
        change_value_basis(weights, arch, torch.eye(arch.head_dim)[None])
    for role in ("attn.q", "attn.k"):
        with pytest.raises(UsageError, match="no inner features"):
            selection(arch, role, 3)


def test_selections_of_an_architecture(tiny_model: TinyModel) -> None:
    arch = folded(tiny_model, "tiny_llama").arch  # d 64, 4 heads of 16 in 2 groups, 160 neurons
    assert selection(arch, "attn.v", 5) == SelectStructure(64, 32, 5, 2, "out")
    assert selection(arch, "attn.o", 5) == SelectStructure(64, 64, 5, 4, "in")
    assert selection(arch, "mlp.gate", 100) == SelectStructure(64, 160, 100, 1, "out")
    core = LowRankStructure(100, 64, 7)
    assert selection(arch, "mlp.down", 100, core) == SelectStructure(160, 64, 100, 1, "in", core)
    assert selection(arch, "attn.o", 5).reduced == DenseStructure(20, 64)
    assert selected_roles(arch, "mlp") == ("mlp.gate", "mlp.up", "mlp.down")
    assert selected_roles(arch, "attn") == ("attn.v", "attn.o")


# --- bias correction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["in", "out"])
def test_bias_correction_is_the_best_affine_map(side: str) -> None:
    """Fit in the centred moment, then the correction: no worse than an affine least-squares problem solved whole."""
    g = generator(2)
    X = torch.randn(500, 9, generator=g, dtype=F64) @ torch.randn(9, 9, generator=g, dtype=F64) + 3
    W = torch.randn(6, 9, generator=g, dtype=F64)
    spec: Structure = SelectStructure(9, 6, 4) if side == "in" else LowRankStructure(9, 6, 3)
    sums = GramSum(9, 9, torch.device("cpu"))
    for part in X.split(100):
        sums.add(part)
    mean, gram = sums.first(), sums.mean()
    torch.testing.assert_close(mean, X.mean(0))

    def error(moment: Tensor, corrected: bool) -> float:
        What = spec.dense(spec.fit(W, moment))
        delta = bias_correction(W, What, mean) if corrected else torch.zeros(6, dtype=F64)
        return float((X @ W.T - X @ What.T - delta).square().sum()) / len(X)

    best = error(centred(gram, mean, share=0.0), True)
    assert best < error(gram, True) < error(gram, False)
    covariance = (X - mean).T @ (X - mean) / len(X)
    if side == "in":
        A = torch.cat([X[:, :4], torch.ones(len(X), 1, dtype=F64)], 1)
        affine = X @ W.T - A @ torch.linalg.lstsq(A, X @ W.T, driver="gelsd").solution
        assert best == pytest.approx(float(affine.square().sum()) / len(X), rel=1e-9)
    What = spec.dense(spec.fit(W, covariance))
    assert best == pytest.approx(float((((W - What) @ covariance) * (W - What)).sum()), rel=1e-9)


def test_a_share_of_the_mean_stays_and_cross_moments_are_centred() -> None:
    g = generator(3)
    X, Y = (torch.randn(50, n, generator=g, dtype=F64) + 2 for n in (4, 3))
    cross = X.T @ Y / 50
    covariance = (X - X.mean(0)).T @ (Y - Y.mean(0)) / 50
    torch.testing.assert_close(centred(cross, X.mean(0), Y.mean(0), share=0.0), covariance)
    torch.testing.assert_close(centred(cross, X.mean(0), Y.mean(0), share=1.0), cross)
    gram = X.T @ X / 50
    half = centred(gram, X.mean(0), share=0.5)
    torch.testing.assert_close(half, gram - torch.outer(X.mean(0), X.mean(0)) / 2)


def test_shift_of_the_target_is_part_of_the_correction() -> None:
    """A target T = W x + s(x): the correction makes the mean error zero when it is given the mean of s."""
    g = generator(4)
    X = torch.randn(80, 5, generator=g, dtype=F64) + 1
    W, What = (torch.randn(3, 5, generator=g, dtype=F64) for _ in range(2))
    s = X.square() @ torch.randn(5, 3, generator=g, dtype=F64)
    delta = bias_correction(W, What, X.mean(0), shift=s.mean(0))
    torch.testing.assert_close((X @ W.T + s - X @ What.T - delta).mean(0), torch.zeros(3, dtype=F64))


def test_linears_that_get_a_bias(tiny_model: TinyModel) -> None:
    llama, opt = (folded(tiny_model, name).arch for name in ("tiny_llama", "tiny_opt"))
    assert extra_biases(llama, ("attn.o", "mlp.down")) == [
        f"layers.{i}.{role}" for i in range(3) for role in ("attn.o", "mlp.down")
    ]
    assert extra_biases(opt, ("attn.o", "mlp.down", "attn.q")) == []


# --- through the whole program ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_opt", "tiny_qwen2"])
def test_selections_in_a_recipe(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Fitted block by block, written, read back, exported, and written as a plain checkpoint: always the same logits.

    (The features are the first ones, as they come: no rewrite precedes a selection that a recipe gives by name.)
    """
    source = tiny_source(tiny_model, name)
    arch = source.architecture()
    sizes = {"attn": arch.head_dim - 4, "mlp": arch.intermediate_size - 24}
    layers = {
        f"layers.1.{role}": selection(arch, role, kept).to_config()
        for sub, kept in sizes.items()
        for role in selected_roles(arch, sub)
    }
    wanted = recipe(text_file(tmp_path), structure="dense", layers=layers)
    artifact = compress_model(source, wanted, tmp_path / "out", materialize_dense=True)
    model, ids = load_model(artifact.path("checkpoint")), tiny.token_ids(2, 24)
    logits, dense = logits_of(model, ids), logits_of(source.reference_model(torch.float32), ids)
    assert 1e-3 < relative(logits, dense) < 1
    plain = AutoModelForCausalLM.from_pretrained(artifact.path("dense")).eval()
    assert relative(logits_of(plain, ids), logits) < 1e-4
    path = export_onnx(artifact.path("checkpoint"), tmp_path / "onnx").path
    assert relative(torch.from_numpy(OrtRunner(path).run_full(ids.numpy())), logits) < 1e-4
    structures = {name: structure_from_config(config) for name, config in layers.items()}
    saved = sum(s.in_features * s.out_features - s.parameter_count() for s in structures.values())
    size = model_size(arch, structures, "none")
    assert size.dense_projections - size.projections == saved > 0
