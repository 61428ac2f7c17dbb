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

from compress import families
from compress.architecture import WRITERS
from compress.models import ModelSource
from compress.pipeline import folded
from compress.statistics import SUB_BLOCKS, StreamMoments, collect
from compress.streams import GramSum, Runner, mapped, save_whole
from tests import tiny
from tests.compress.helpers import LENGTH, TinyModel, relative, tiny_source

SEED = 5
MODELS = ["tiny_llama_tied", "tiny_llama_bias", "tiny_opt", "tiny_opt_untied", "tiny_qwen3", "tiny_mistral"]


def moments_of(
    source: ModelSource, tokens: Tensor, state: Path, *, batch: int = 2, sensitivity: str = "fisher", inner: bool = True
) -> dict[tuple[int, str], StreamMoments]:
    runner = Runner(source.architecture(), tokens.shape[1], torch.device("cpu"), batch)
    model = folded(source)
    return collect(model, tokens, sensitivity=sensitivity, inner=inner, seed=SEED, runner=runner, state=state)


def mean_of_squares(x: Tensor) -> Tensor:
    """E[x x^T] per token, in float64."""
    flat = x.detach().double().flatten(0, -2)
    return flat.T @ flat / len(flat)


def reference_moments(source: ModelSource, tokens: Tensor) -> dict[tuple[int, str], StreamMoments]:
    """The same from transformers' model in float64: everything in memory, one graph, one backward pass.

    Before the folds a reader sees h * scale + shift, so that gradients at h are those at its input times the scale.
    """
    arch = source.architecture()
    model, names = source.reference_model(torch.float64), families.tensor_names(arch)
    seen: dict[Any, Tensor] = {}

    def keep(key: tuple[int, str, str]) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[key], seen[(*key, "input")] = output, inputs[0]

        return hook

    norms, writers, readers = {}, {}, {}
    for layer, at in enumerate(names.layers):
        for sub, norm in zip(SUB_BLOCKS, (at.attn_norm, at.mlp_norm), strict=True):
            norms[layer, sub] = model.get_submodule(norm.weight.removesuffix(".weight"))
            writers[layer, sub] = model.get_submodule(at.linears[WRITERS[sub]].weight.removesuffix(".weight"))
            readers[layer, sub] = {
                role: model.get_submodule(at.linears[role].weight.removesuffix(".weight")) for role in arch.readers(sub)
            }
            for role, linear in readers[layer, sub].items():
                linear.register_forward_hook(keep((layer, sub, role)))
            norms[layer, sub].register_forward_hook(keep((layer, sub, "norm")))
            writers[layer, sub].register_forward_hook(keep((layer, sub, "writer")))
    logits = model(tokens).logits
    generator = torch.Generator().manual_seed(SEED)
    loss = logits.new_zeros(())
    for row in logits:
        labels = torch.multinomial(row.detach().float().softmax(-1), 1, generator=generator)[:, 0]
        loss = loss + nn.functional.cross_entropy(row, labels, reduction="sum")
    outputs = {key: value for key, value in seen.items() if key[-1] != "input"}
    gradients = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    d = arch.hidden_size
    # LayerNorm never sees the mean of the stream; the folded model removes it from every write.
    centre = torch.eye(d, dtype=torch.float64)
    if arch.norm == "layernorm":
        centre -= 1 / d
    found = {}
    for (layer, sub), norm in norms.items():
        scale, shift = norm.weight, getattr(norm, "bias", None)
        h = seen[layer, sub, "norm"] if shift is None else seen[layer, sub, "norm"] - shift
        bias = writers[layer, sub].bias
        out = seen[layer, sub, "writer"] if bias is None else seen[layer, sub, "writer"] - bias
        found[layer, sub] = StreamMoments(
            mean_of_squares(h / scale),
            mean_of_squares(out @ centre),
            {
                role: mean_of_squares(gradients[layer, sub, role] @ (linear.weight * scale))
                for role, linear in readers[layer, sub].items()
            },
            mean_of_squares(gradients[layer, sub, "writer"]),
            mean_of_squares(seen[layer, sub, "writer", "input"]),
        )
    return found


@pytest.mark.parametrize("name", MODELS)
def test_moments_and_gradients_of_every_sub_block(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source, tokens = tiny_source(tiny_model, name), tiny.token_ids(5, 24)
    arch, d = source.architecture(), source.architecture().hidden_size
    found, expected = moments_of(source, tokens, tmp_path), reference_moments(source, tokens)
    assert set(found) == {(layer, sub) for layer in range(arch.num_layers) for sub in SUB_BLOCKS}
    centre = torch.eye(d, dtype=torch.float64)
    if arch.norm == "layernorm":
        centre -= 1 / d
    for key, moment in found.items():
        for place in ("read", "write", "inner"):
            seen, right = getattr(moment, place), getattr(expected[key], place)
            assert seen.dtype == torch.float64
            assert relative(seen, right) < 1e-4, (key, place)
        assert moment.read_gradients is not None
        assert expected[key].read_gradients is not None
        assert list(moment.read_gradients) == list(arch.readers(key[1]))
        for role, seen in moment.read_gradients.items():
            assert relative(seen, expected[key].read_gradients[role]) < 1e-4, (key, role)
        assert moment.write_gradient is not None
        assert expected[key].write_gradient is not None
        # The mean direction, which transformers' LayerNorm cannot feel, is outside of everything that is written.
        assert relative(centre @ moment.write_gradient @ centre, expected[key].write_gradient) < 1e-4, key


def test_batches_do_not_matter(tiny_model: TinyModel, tmp_path: Path) -> None:
    source, tokens = tiny_source(tiny_model, "tiny_llama"), tiny.token_ids(5, LENGTH)
    alone = moments_of(source, tokens, tmp_path / "one", batch=1)
    together = moments_of(source, tokens, tmp_path / "all", batch=8)
    for key, moment in alone.items():
        for place in ("read", "write", "write_gradient", "inner"):
            assert relative(getattr(together[key], place), getattr(moment, place)) < 1e-4
        assert moment.read_gradients is not None
        for role, gradient in moment.read_gradients.items():
            assert relative(together[key].read_gradients[role], gradient) < 1e-4


def test_again_gives_the_same_bits(tiny_model: TinyModel, tmp_path: Path) -> None:
    source, tokens = tiny_source(tiny_model, "tiny_opt"), tiny.token_ids(4, LENGTH)
    moments_of(source, tokens, tmp_path / "a")
    moments_of(source, tokens, tmp_path / "b")
    files = [tmp_path / run / "moments.safetensors" for run in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    # Nothing else is left: the streams are larger than the model.
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["moments.safetensors"]


def test_finished_moments_are_read_back(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, tokens = tiny_source(tiny_model, "tiny_llama"), tiny.token_ids(4, LENGTH)
    first = moments_of(source, tokens, tmp_path)
    monkeypatch.setattr(Runner, "block", None)  # nothing may run
    again = moments_of(source, tokens, tmp_path)
    assert all(torch.equal(again[key].read, first[key].read) for key in first)


def test_what_is_not_asked_for_is_not_collected(tiny_model: TinyModel, tmp_path: Path) -> None:
    source, tokens = tiny_source(tiny_model, "tiny_llama"), tiny.token_ids(2, LENGTH)
    for moment in moments_of(source, tokens, tmp_path, sensitivity="none", inner=False).values():
        assert (moment.read_gradients, moment.write_gradient, moment.inner) == (None, None, None)


def test_another_seed_samples_other_labels(tiny_model: TinyModel, tmp_path: Path) -> None:
    source, tokens = tiny_source(tiny_model, "tiny_llama"), tiny.token_ids(2, LENGTH)
    runner = Runner(source.architecture(), LENGTH, torch.device("cpu"), 2)
    gradients = []
    for seed in (0, 1):
        state = tmp_path / str(seed)
        found = collect(
            folded(source), tokens, sensitivity="fisher", inner=False, seed=seed, runner=runner, state=state
        )
        gradients.append((found[0, "attn"].read_gradients or {}).get("attn.q"))
    assert gradients[0] is not None
    assert gradients[1] is not None
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


# ---- streams on the disk


def test_mapped_stream_survives(tmp_path: Path) -> None:
    stream = mapped(tmp_path / "new" / "x.f32", (3, 4, 5))
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
        mapped(tmp_path / "x.f32", (100, 100))


def test_tensors_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with no_space_beyond(4096), pytest.raises(OSError, match=r"x\.safetensors"):
        save_whole({"x": torch.zeros(100, 100)}, path)
    assert not path.exists()
    save_whole({"x": torch.zeros(100, 100).T}, path)
    assert path.exists()
