"""Second moments and loss gradients against hooks and one whole autograd graph of transformers' own model."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.architecture import SUB_BLOCKS, WRITERS
from compress.artifact.state import mapped, mapped_anew, save_whole
from compress.calibration.gradients import sample
from compress.calibration.gram import GramSum
from compress.calibration.moments import StatisticsFolder, StreamMoments, collect
from compress.calibration.streams import Runner
from compress.errors import ArtifactError
from compress.rewrites.folding import folded
from compress.source import families
from compress.source.model import ModelSource
from tests import tiny
from tests.compress.helpers import LENGTH, TinyModel, interrupted_at, kept_in, relative, tiny_source

SEED = 5
MODELS = ["tiny_llama_tied", "tiny_llama_bias", "tiny_opt", "tiny_opt_untied", "tiny_qwen3", "tiny_mistral"]


def moments_of(
    source: ModelSource,
    tokens: Tensor,
    folder: Path,
    *,
    batch: int = 2,
    sensitivity: str = "fisher",
    seed: int = SEED,
) -> StatisticsFolder:
    runner = Runner(source.architecture(), tokens.shape[1], torch.device("cpu"), batch)
    return collect(folded(source), tokens, sensitivity=sensitivity, seed=seed, runner=runner, kept=kept_in(folder))


def mean_of_squares(x: Tensor) -> Tensor:
    """E[x x^T] per token, in float64."""
    flat = x.detach().double().flatten(0, -2)
    return flat.T @ flat / len(flat)


def reference_moments(source: ModelSource, tokens: Tensor) -> tuple[dict[tuple[int, str], StreamMoments], Tensor]:
    """The same from transformers' model in float64: everything in memory, one graph, one backward pass; and the moment
    of what the head reads. Before the folds a reader sees h * scale + shift."""
    arch = source.architecture()
    model, names = source.reference_model(torch.float64), families.tensor_names(arch)
    seen: dict[Any, Tensor] = {}

    def keep(key: tuple[int, str, str]) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[key], seen[(*key, "input")] = output, inputs[0]

        return hook

    norms = {}
    for layer, at in enumerate(names.layers):
        for sub, norm in zip(SUB_BLOCKS, (at.attn_norm, at.mlp_norm), strict=True):
            norms[layer, sub] = model.get_submodule(norm.weight.removesuffix(".weight"))
            norms[layer, sub].register_forward_hook(keep((layer, sub, "norm")))
            for role in (*arch.readers(sub), WRITERS[sub]):
                linear = model.get_submodule(at.linears[role].weight.removesuffix(".weight"))
                linear.register_forward_hook(keep((layer, sub, role)))
    final = model.get_submodule(names.final_norm.weight.removesuffix(".weight"))
    final.register_forward_hook(keep((arch.num_layers, "", "norm")))
    logits = model(tokens).logits
    generator = torch.Generator().manual_seed(SEED)
    loss = logits.new_zeros(())
    for row in logits:
        labels = sample(row.detach().float().softmax(-1), generator)
        loss = loss + nn.functional.cross_entropy(row, labels, reduction="sum")
    outputs = {key: value for key, value in seen.items() if key[-1] != "input"}
    gradients = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))

    def normalised(key: tuple[int, str], norm: nn.Module) -> Tensor:
        h, shift = seen[(*key, "norm")], getattr(norm, "bias", None)
        return mean_of_squares((h if shift is None else h - shift) / norm.weight)

    found = {}
    for (layer, sub), norm in norms.items():
        roles = (*arch.readers(sub), WRITERS[sub])
        found[layer, sub] = StreamMoments(
            normalised((layer, sub), norm),
            mean_of_squares(seen[layer, sub, WRITERS[sub], "input"]),
            {role: mean_of_squares(gradients[layer, sub, role]) for role in roles},
        )
    return found, normalised((arch.num_layers, ""), final)


@pytest.mark.parametrize("name", MODELS)
def test_moments_and_gradients_of_every_sub_block(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source, tokens = tiny_source(tiny_model, name), tiny.token_ids(5, 24)
    arch, d = source.architecture(), source.architecture().hidden_size
    found, (expected, final) = moments_of(source, tokens, tmp_path), reference_moments(source, tokens)
    assert set(found) == set(expected) == {(layer, sub) for layer in range(arch.num_layers) for sub in SUB_BLOCKS}
    assert len(found) == 2 * arch.num_layers
    centre = torch.eye(d, dtype=torch.float64)
    if arch.norm == "layernorm":
        centre -= 1 / d
    for key, moment in found.items():
        for place in ("read", "inner"):
            seen, right = getattr(moment, place), getattr(expected[key], place)
            assert seen.dtype == torch.float64
            assert relative(seen, right) < 1e-4, (key, place)
        assert moment.gradients is not None
        assert expected[key].gradients is not None
        assert list(moment.gradients) == [*arch.readers(key[1]), WRITERS[key[1]]]
        for role, seen in moment.gradients.items():
            if role in WRITERS.values():
                # The mean direction, which transformers' LayerNorm cannot feel, is outside of everything written.
                seen = centre @ seen @ centre
            assert relative(seen, expected[key].gradients[role]) < 1e-4, (key, role)
            assert moment.gram(role) is (moment.inner if role in WRITERS.values() else moment.read)
    assert relative(found.final(), final) < 1e-4
    for key in ((arch.num_layers, "attn"), (-1, "mlp"), (0, "norm")):
        with pytest.raises(KeyError):
            found[key]


def test_batches_do_not_matter(tiny_model: TinyModel, tmp_path: Path) -> None:
    source, tokens = tiny_source(tiny_model, "tiny_llama"), tiny.token_ids(5, LENGTH)
    alone = moments_of(source, tokens, tmp_path / "one", batch=1)
    together = moments_of(source, tokens, tmp_path / "all", batch=8)
    assert relative(together.final(), alone.final()) < 1e-4
    for key, moment in alone.items():
        for place in ("read", "inner"):
            assert relative(getattr(together[key], place), getattr(moment, place)) < 1e-4
        assert moment.gradients is not None
        for role, gradient in moment.gradients.items():
            assert relative(together[key].gradients[role], gradient) < 1e-4  # type: ignore[index]


def test_again_gives_the_same_bits(tiny_model: TinyModel, tmp_path: Path) -> None:
    source, tokens = tiny_source(tiny_model, "tiny_opt"), tiny.token_ids(4, LENGTH)
    arch = source.architecture()
    for run in "ab":
        moments_of(source, tokens, tmp_path / run)
    # Nothing else is left: the streams are larger than the model.
    blocks = [f"{way}-{layer}.safetensors" for way in ("forward", "backward") for layer in range(arch.num_layers)]
    names = sorted(["ledger.json", "final.safetensors", *blocks])
    for run in "ab":
        assert sorted(p.name for p in (tmp_path / run).iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_finished_moments_are_read_back(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, tokens = tiny_source(tiny_model, "tiny_llama"), tiny.token_ids(4, LENGTH)
    first = {key: moment.read for key, moment in moments_of(source, tokens, tmp_path).items()}
    monkeypatch.setattr(Runner, "block", None)  # nothing may run
    again = moments_of(source, tokens, tmp_path)
    assert all(torch.equal(again[key].read, read) for key, read in first.items())


@pytest.mark.parametrize("call", [2, 3, 4, 6], ids=["second block", "last block", "first back", "last back"])
def test_an_interrupted_pass_is_resumed(
    call: int, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, tokens = tiny_source(tiny_model, "tiny_llama_tied"), tiny.token_ids(5, LENGTH)
    moments_of(source, tokens, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupted_at(patch, Runner, "block", call)
        with pytest.raises(KeyboardInterrupt):
            moments_of(source, tokens, tmp_path / "resumed")
    with monkeypatch.context() as patch:
        calls = interrupted_at(patch, Runner, "block", 0)
        moments_of(source, tokens, tmp_path / "resumed")
    assert calls[0] == 6 - (call - 1)  # what is done is not done again, in either pass
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes()


def test_what_is_not_asked_for_is_not_collected(tiny_model: TinyModel, tmp_path: Path) -> None:
    source, tokens = tiny_source(tiny_model, "tiny_llama"), tiny.token_ids(2, LENGTH)
    for sensitivity in ("none", "measured"):
        found = moments_of(source, tokens, tmp_path / sensitivity, sensitivity=sensitivity)
        assert all(moment.gradients is None for moment in found.values())
        assert not list((tmp_path / sensitivity).glob("backward*"))


def test_another_seed_samples_other_labels(tiny_model: TinyModel, tmp_path: Path) -> None:
    source, tokens = tiny_source(tiny_model, "tiny_llama"), tiny.token_ids(2, LENGTH)
    gradients = []
    for seed in (0, 1):
        found = moments_of(source, tokens, tmp_path / str(seed), seed=seed)[0, "attn"].gradients
        assert found is not None
        gradients.append(found["attn.q"])
    assert relative(gradients[0], gradients[1]) > 0.01


def test_gram_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 30, 5, generator=generator), torch.randn(2, 30, 3, generator=generator)
    cross, own = GramSum(5, 3, torch.device("cpu")), GramSum(5, 5, torch.device("cpu"))
    for i in range(2):
        cross.add(x[i], y[i])
        own.add(x[i])
    torch.testing.assert_close(cross.mean(), torch.einsum("bti,btj->ij", x.double(), y.double()) / 60)
    torch.testing.assert_close(own.mean(), torch.einsum("bti,btj->ij", x.double(), x.double()) / 60)
    assert float(GramSum(2, 2, torch.device("cpu")).mean().abs().max()) == 0


def test_gram_sum_of_bfloat16_numbers_is_exact() -> None:
    x = torch.randn(4, 500, 40, generator=torch.Generator().manual_seed(0)) * 100 + 50
    total = GramSum(40, 40, torch.device("cpu"), fast=True)
    cross = GramSum(40, 7, torch.device("cpu"), fast=True)
    for part in x:
        total.add(part)
        cross.add(part, part[:, :7])
    rounded = x.bfloat16().double().flatten(0, 1)
    expected = rounded.T @ rounded / len(rounded)
    assert relative(total.mean(), expected) < 1e-5
    assert relative(cross.mean(), expected[:, :7]) < 1e-5
    assert relative(total.mean(), x.double().flatten(0, 1).T @ x.double().flatten(0, 1) / len(rounded)) > 2e-5
    assert torch.get_float32_matmul_precision() == "highest"


# ---- streams on the disk


def test_mapped_stream_survives(tmp_path: Path) -> None:
    stream = mapped_anew(tmp_path / "new" / "x.f32", (3, 4, 5))
    stream.copy_(torch.arange(60.0).view(3, 4, 5))
    del stream
    torch.testing.assert_close(mapped(tmp_path / "new" / "x.f32", (3, 4, 5)), torch.arange(60.0).view(3, 4, 5))
    assert (tmp_path / "new" / "x.f32").stat().st_size == 240


@contextmanager
def no_space_beyond(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_stream_without_space_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    with no_space_beyond(4096), pytest.raises(OSError, match=r"x\.f32"):
        mapped_anew(tmp_path / "x.f32", (100, 100))


def test_a_stream_that_is_not_there_is_not_made_by_reading_it(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="missing"):
        mapped(tmp_path / "x.f32", (3, 4))
    assert not (tmp_path / "x.f32").exists()
    (tmp_path / "x.f32").write_bytes(bytes(44))
    with pytest.raises(ArtifactError, match="is of 44 bytes, where 48 bytes"):
        mapped(tmp_path / "x.f32", (3, 4))
    assert (tmp_path / "x.f32").stat().st_size == 44


def test_tensors_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with no_space_beyond(4096), pytest.raises(OSError, match=r"x\.safetensors"):
        save_whole({"x": torch.zeros(100, 100)}, path)
    assert not path.exists()
    save_whole({"x": torch.zeros(100, 100).T}, path)
    assert path.exists()
