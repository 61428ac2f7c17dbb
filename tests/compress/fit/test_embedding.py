"""Embedding and head in factors: the optimum against brute force, and the model that stores, runs and exports them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.allocation.size import embedding_parameters, model_size
from compress.architecture import Architecture
from compress.calibration.gradients import head_logits
from compress.calibration.streams import embed
from compress.checkpoint.loading import load_model
from compress.checkpoint.plain import write_plain
from compress.checkpoint.writer import ShardWriter, config_for, write_config, write_rotations
from compress.errors import ArtifactError, UsageError
from compress.fit.embedding import EmbeddingRanks, WeightedTable, compress_embedding, head_gram, token_counts
from compress.model.blocks import rms_normalise
from compress.rewrites.folding import folded
from compress.rewrites.rotations import Rotations, Weights, rotate_block
from compress.source.model import ModelSource
from export.graph.decoder import export_onnx
from export.runtime.ort import OrtRunner
from tests import tiny
from tests.compress.helpers import TinyModel, logits_of, relative, tiny_source
from tests.compress.structures.battery import generator, second_moment
from tests.export.helpers import llama, write_checkpoint

VOCABULARY, WIDTH = 11, 4


def table(seed: int = 0) -> tuple[Tensor, Tensor]:
    """E (11, 4) and counts, some of them zero."""
    g = generator(seed)
    return torch.randn(VOCABULARY, WIDTH, generator=g, dtype=torch.float64), torch.randint(0, 9, (11,), generator=g)


def use(E: Tensor, made: Tensor, weights: Tensor, metric: Tensor) -> Tensor:
    """The relative error of one use, row by row as it is defined."""

    def energy(rows: Tensor) -> Tensor:
        return sum((w * row @ metric @ row for w, row in zip(weights, rows, strict=True)), torch.zeros(()))

    return energy(E - made) / energy(E)


@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_factors_are_the_optimum(uses: int, rank: int) -> None:
    """No descent from random starts goes below the closed form, and some reach it: with one use, and tied with two."""
    E, counts = table()
    weights = counts.double() + 1
    metrics = [torch.eye(WIDTH, dtype=torch.float64), second_moment(WIDTH, 1)][-uses:]
    whole = WeightedTable(E, weights, metrics)
    U, R = whole.factors(rank)
    assert (U.shape, R.shape) == ((VOCABULARY, rank), (rank, WIDTH))

    def error(made: Tensor) -> Tensor:
        return sum((use(E, made, weights, m) for m in metrics), torch.zeros(()))

    best = float(error(U @ R))
    assert float(whole.errors[rank]) == pytest.approx(best, rel=1e-9)
    assert float(whole.errors[0]) == pytest.approx(uses)
    found = []
    for seed in range(4):
        free = [torch.randn(f.shape, generator=generator(seed), dtype=f.dtype).requires_grad_() for f in (U, R)]
        optimizer = torch.optim.LBFGS(free, max_iter=300, tolerance_change=1e-13, line_search_fn="strong_wolfe")

        def closure(free: list[Tensor] = free, optimizer: Any = optimizer) -> float:
            optimizer.zero_grad()
            value = error(free[0] @ free[1])
            value.backward()
            return float(value.detach())

        optimizer.step(closure)
        found.append(float(error(free[0] @ free[1]).detach()))
    assert best * (1 - 1e-7) <= min(found) <= best * (1 + 1e-4)


def test_full_rank_is_exact() -> None:
    E, counts = table()
    for metric in (torch.eye(WIDTH, dtype=torch.float64), second_moment(WIDTH, 1), second_moment(WIDTH, 1, rank=2)):
        U, R = WeightedTable(E, counts.double() + 1, [metric]).factors(WIDTH)
        torch.testing.assert_close(U @ R, E)
        torch.testing.assert_close(U.norm(dim=0), R.norm(dim=1))


def test_frequent_tokens_are_kept_better() -> None:
    E, _ = table()
    rare, often = torch.ones(VOCABULARY, dtype=torch.float64), torch.ones(VOCABULARY, dtype=torch.float64)
    often[3] = 1e6
    metric = torch.eye(WIDTH, dtype=torch.float64)
    lost = []
    for weights in (rare, often):
        U, R = WeightedTable(E, weights, [metric]).factors(1)
        lost.append(float((E - U @ R)[3].norm()))
    assert lost[1] < 1e-3 * lost[0]


def test_large_vocabularies_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    E, counts = table()
    whole = WeightedTable(E, counts.double() + 1, [second_moment(WIDTH, 1)])
    monkeypatch.setattr("compress.fit.embedding.ROWS", 3)
    pieces = WeightedTable(E, counts.double() + 1, [second_moment(WIDTH, 1)])
    torch.testing.assert_close(pieces.errors, whole.errors)
    torch.testing.assert_close(torch.mm(*pieces.factors(2)), torch.mm(*whole.factors(2)))


def test_token_counts() -> None:
    assert token_counts(torch.tensor([[2, 0], [2, 4]]), 6).tolist() == [1, 0, 2, 0, 1, 0]


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_tied", "tiny_opt"])
def test_head_gram_is_what_the_head_reads(name: str, rotated: bool, tiny_model: TinyModel) -> None:
    model = folded(tiny_source(tiny_model, name), torch.float64)
    d = model.arch.hidden_size
    ends = model.ends(rotation_of(d) if rotated else Rotations.none())
    x = torch.randn(500, d, generator=generator(), dtype=torch.float64) + 0.3
    normalised = rms_normalise(x, model.arch.norm_eps)
    gram, mean = normalised.T @ normalised / 500, normalised.mean(0)
    # What a head of one-hot rows gives back is what it reads.
    read = head_logits({**ends, "lm_head.weight": torch.eye(d, dtype=torch.float64)}, model.arch.norm_eps, x)
    if "lm_head.bias" in ends:
        read = read - ends["lm_head.bias"]
    torch.testing.assert_close(head_gram(ends, gram, mean), read.T @ read / 500)


# ---- both ends of a model


def rotation_of(d: int) -> Rotations:
    return Rotations("shared", (torch.linalg.qr(torch.randn(d, d, generator=generator(), dtype=torch.float64)).Q,))


MODELS = ["tiny_llama", "tiny_llama_tied", "tiny_opt", "tiny_opt_untied"]
FRACTION, UNIT = 0.45, 4  # so little that no table of an untied model stays dense


def compressed_ends(
    source: ModelSource, rotations: Rotations, fraction: float = FRACTION
) -> tuple[Weights, Weights, EmbeddingRanks]:
    """(as they were, compressed, ranks), with counts of the tiny text and the Gram matrix of random hidden states."""
    model = folded(source)
    counts = token_counts(torch.tensor(source.tokenizer()(tiny.TEXT)["input_ids"]), model.arch.vocab_size)
    ends = model.ends(rotations)
    gram = second_moment(model.arch.hidden_size, 3)
    made, ranks = compress_embedding(ends, model.arch, counts, gram, fraction, UNIT)
    return ends, made, ranks


def write(source: ModelSource, rotations: Rotations, folder: Path, ends: Weights, ranks: EmbeddingRanks) -> Path:
    """A checkpoint of the rotated dense model with these ends."""
    model = folded(source)
    config = config_for(model.arch, {}, rotations)
    config.embedding_rank, config.head_rank = ranks.embedding, ranks.head
    with ShardWriter(folder) as shards:
        for name, tensor in ends.items():
            shards.add(name, tensor)
        for layer in range(model.arch.num_layers):
            for name, tensor in rotate_block(model.block(layer), model.arch, layer, rotations).items():
                shards.add(f"model.layers.{layer}.{name}", tensor)
    write_config(folder, config, torch.float32)
    write_rotations(folder, rotations)
    return folder


def dense_again(made: Weights) -> Weights:
    """The factors multiplied out."""
    whole = {name: tensor for name, tensor in made.items() if not name.endswith((".U", ".R"))}
    for name in ("model.embed_tokens", "lm_head"):
        if f"{name}.U" in made:
            whole[f"{name}.weight"] = made[f"{name}.U"] @ made[f"{name}.R"]
    return whole


@pytest.mark.parametrize("name", MODELS)
def test_budget_is_kept_and_counted(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_source(tiny_model, name)
    arch = source.architecture()
    _, made, ranks = compressed_ends(source, Rotations.none())
    folder = write(source, Rotations.none(), tmp_path, made, ranks)
    assert ranks.embedding % UNIT == ranks.head % UNIT == 0
    assert (ranks.head == 0) or not arch.tied
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("model-*.safetensors"):
        tensors |= load_file(path)
    names = [n for n in tensors if n.startswith(("model.embed_tokens.", "lm_head.")) and not n.endswith("bias")]
    stored = sum(tensors[n].nbytes for n in names)
    counted = embedding_parameters(arch, ranks.embedding, ranks.head)
    assert stored == 4 * counted
    size = model_size(arch, {}, "none", embedding_rank=ranks.embedding, head_rank=ranks.head)
    assert (size.embeddings, size.dense_embeddings) == (counted, embedding_parameters(arch))
    assert size.ratio == 1
    assert size.model_ratio == pytest.approx(1 - (size.dense_embeddings - counted) / size.dense_parameters)
    assert 0.8 * FRACTION < counted / size.dense_embeddings <= FRACTION
    # Everything in the files: of what `rest` counts the folds removed all norms but the last one of a tied head.
    vectors = (2 * arch.num_layers + (not arch.tied)) * arch.hidden_size * (2 if arch.norm == "layernorm" else 1)
    folded_in = sum(t.numel() for n, t in tensors.items() if n in ("lm_head.bias", "model.center"))
    assert sum(t.numel() for t in tensors.values()) == size.parameters - vectors + folded_in


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rotated", [False, True])
def test_model_runs_the_factors(name: str, rotated: bool, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Logits = those of the model whose embedding and head are the products; nothing of the originals is left."""
    source = tiny_source(tiny_model, name)
    rotations = rotation_of(64) if rotated else Rotations.none()
    ends, made, ranks = compressed_ends(source, rotations)
    model = load_model(write(source, rotations, tmp_path / "factors", made, ranks))
    product = load_model(write(source, rotations, tmp_path / "product", dense_again(made), EmbeddingRanks()))
    dense = load_model(write(source, rotations, tmp_path / "dense", ends, EmbeddingRanks()))
    ids = tiny.token_ids(2, 12)
    assert relative(logits_of(model, ids), logits_of(product, ids)) < 1e-4
    assert relative(logits_of(model, ids), logits_of(dense, ids)) > 1e-2
    assert ranks.embedding
    assert bool(ranks.head) != source.architecture().tied
    # The stream as the pipeline embeds it is the decoder's.
    positions = torch.arange(12).expand(2, 12)
    torch.testing.assert_close(embed(made, source.architecture(), ids), model.model.embed(ids, positions))


@pytest.mark.parametrize("name", MODELS)
def test_graph_runs_the_factors(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_source(tiny_model, name)
    rotations = rotation_of(64)
    _, made, ranks = compressed_ends(source, rotations)
    model = load_model(write(source, rotations, tmp_path / "checkpoint", made, ranks))
    info = export_onnx(tmp_path / "checkpoint", tmp_path / "onnx")
    ids = tiny.token_ids(2, 12)
    got = torch.from_numpy(OrtRunner(info.path).run_full(ids.numpy()))
    assert relative(got, logits_of(model, ids)) < 3e-5


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_tied", "tiny_opt"])
def test_plain_checkpoint_has_the_products(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source, rotations = tiny_source(tiny_model, name), rotation_of(64)
    _, made, ranks = compressed_ends(source, rotations)
    folder = write(source, rotations, tmp_path / "checkpoint", made, ranks)
    write_plain(source, folded(source), folder, tmp_path / "plain")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = tiny.token_ids(2, 12)
    assert relative(logits_of(plain, ids), logits_of(load_model(folder), ids)) < 1e-4


def test_a_head_with_a_shift_has_no_plain_equivalent(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_source(tiny_model, "tiny_opt_untied")
    _, made, ranks = compressed_ends(source, Rotations.none())
    assert ranks.head
    folder = write(source, Rotations.none(), tmp_path / "checkpoint", made, ranks)
    with pytest.raises(UsageError, match="needs a bias that its own class does not have"):
        write_plain(source, folded(source), folder, tmp_path / "plain")


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_tied"])
def test_transformers_loads_and_saves_it(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """A tied table is one pair of factors in memory and in the file."""
    from transformers import AutoModelForCausalLM

    source = tiny_source(tiny_model, name)
    _, made, ranks = compressed_ends(source, Rotations.none())
    folder = write(source, Rotations.none(), tmp_path / "a", made, ranks)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = tiny.token_ids(1, 12)
    expected = logits_of(load_model(folder), ids)
    assert relative(logits_of(model, ids), expected) < 1e-5
    assert (model.lm_head.U is model.model.embed_tokens.U) == source.architecture().tied
    model.save_pretrained(tmp_path / "b")
    names = set(load_file(tmp_path / "b" / "model.safetensors"))
    assert len(names & {"model.embed_tokens.U", "lm_head.U"}) == (1 if source.architecture().tied else 2)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert relative(logits_of(again, ids), expected) < 1e-5


# ---- the budget


def random_ends(arch: Architecture, seed: int = 0) -> Weights:
    """A table of slowly falling spectrum, and a head of a steep one, which low ranks suit."""
    g, d = generator(seed), arch.hidden_size
    ends = {"model.embed_tokens.weight": torch.randn(arch.vocab_size, d, generator=g)}
    if not arch.tied:
        steep = torch.randn(arch.vocab_size, d, generator=g) * 0.7 ** torch.arange(d)
        ends["lm_head.weight"] = steep
    return ends


@pytest.mark.parametrize("fraction", [0.3, 0.45, 0.6])
def test_untied_tables_share_the_budget_by_their_errors(fraction: float) -> None:
    """The sum of the relative errors is the least of all pairs of ranks within the budget."""
    arch = llama(tied=False)
    ends, size, dense = random_ends(arch), arch.vocab_size + arch.hidden_size, arch.vocab_size * arch.hidden_size
    made, ranks = compress_embedding(ends, arch, None, None, fraction, 1)
    assert ("lm_head.U" in made, "model.embed_tokens.U" in made) == (ranks.head > 0, ranks.embedding > 0)
    one, metric = torch.ones(arch.vocab_size, dtype=torch.float64), torch.eye(32, dtype=torch.float64)
    a, b = (WeightedTable(table, one, [metric]).errors for table in ends.values())
    allowed = {0: dense} | {k: k * size for k in range(1, 33) if k * size < dense}

    def loss(errors: Tensor, rank: int) -> float:
        return float(errors[rank]) if rank else 0.0

    best = min(
        loss(a, i) + loss(b, j) for i, x in allowed.items() for j, y in allowed.items() if x + y <= fraction * 2 * dense
    )
    assert allowed[ranks.embedding] + allowed[ranks.head] <= fraction * 2 * dense
    assert loss(a, ranks.embedding) + loss(b, ranks.head) == pytest.approx(best)


def test_half_precision_stays_half() -> None:
    arch = llama()
    ends = {name: tensor.half() for name, tensor in random_ends(arch).items()}
    made, _ = compress_embedding(ends, arch, None, None, 0.5, 1)
    assert {tensor.dtype for tensor in made.values()} == {torch.float16}


def test_nothing_asked_changes_nothing() -> None:
    ends = random_ends(llama())
    assert compress_embedding(ends, llama(), None, None, 1.0, 64) == (ends, EmbeddingRanks())


@pytest.mark.parametrize(("fraction", "unit"), [(0.01, 1), (0.5, 16), (0.9, 64)])
@pytest.mark.parametrize("arch", [llama(), llama(tied=False)], ids=["tied", "untied"])
def test_impossible_fractions_are_refused(arch: Architecture, fraction: float, unit: int) -> None:
    with pytest.raises(UsageError, match=f"--embedding {fraction:g} keeps"):
        compress_embedding(random_ends(arch), arch, None, None, fraction, unit)


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"embedding_rank": "8"}, "embedding_rank '8'"),
    "true": ({"embedding_rank": True}, "embedding_rank True"),
    "negative": ({"embedding_rank": -1}, "embedding_rank -1"),
    "beyond the full rank": ({"head_rank": 33}, "head_rank 33"),
    "a tied head of its own": ({"head_rank": 8}, "tied to the embedding"),
    "another rank": ({"embedding_rank": 9}, "does not hold the model"),
    "dense": ({"embedding_rank": 0}, "does not hold the model"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_ranks_are_refused(name: str, tmp_path: Path) -> None:
    changes, sentence = HOSTILE[name]
    write_checkpoint(tmp_path, llama(), embedding_rank=8)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ArtifactError, match=sentence):
        load_model(tmp_path)
    with pytest.raises(ArtifactError):
        export_onnx(tmp_path, tmp_path / "onnx")
