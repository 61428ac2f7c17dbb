"""SliceGPT: exact at full width, principal components of the sliced network's own stream, resumable, within budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.allocation.size import model_size
from compress.allocation.width import kept_for_ratio, leading_structures
from compress.artifact.state import save_whole
from compress.calibration.streams import Runner
from compress.checkpoint.loading import load_model
from compress.checkpoint.plain import write_plain
from compress.checkpoint.writer import ShardWriter, config_for, write_config, write_rotations
from compress.errors import UsageError
from compress.methods import slicegpt as slicing
from compress.methods.slicegpt import Sliced, principal_components, slice_model, sliced_block
from compress.model.decoder import ProcrustesForCausalLM
from compress.model.skips import SliceSkip, parameters_of
from compress.rewrites.folding import FoldedModel, folded
from compress.rewrites.rotations import Rotations
from compress.source.model import ModelSource
from tests import tiny
from tests.compress.helpers import TinyModel, kept_in, logits_of, relative, tiny_source

NAMES = ["tiny_opt", "tiny_opt_untied", "tiny_llama", "tiny_llama_tied", "tiny_qwen3"]
TOKENS = tiny.token_ids(6, 24)


def sliced(source: ModelSource, kept: int, state: Path, tokens: Tensor = TOKENS) -> Sliced:
    state.mkdir(parents=True, exist_ok=True)
    model = folded(source)
    return slice_model(model, tokens, kept, Runner(model.arch, tokens.shape[1], torch.device("cpu"), 2), kept_in(state))


def written(
    source: ModelSource, found: Sliced, folder: Path, dtype: torch.dtype = torch.float32
) -> ProcrustesForCausalLM:
    """As the pipeline writes it; in float64 the blocks are cut anew from the source's own weights."""
    model = folded(source, dtype)
    with ShardWriter(folder, dtype) as shards:
        for name, tensor in model.ends(found.rotations).items():
            shards.add(name, tensor)
        for layer, file in enumerate(found.files):
            block = load_file(file) if dtype == torch.float32 else sliced_block(model, layer, found.rotations)
            for name, tensor in block.items():
                shards.add(name, tensor)
    config = config_for(model.arch, found.structures, found.rotations)
    for name, value in found.rotations.skip_choices().items():
        setattr(config, name, value)
    write_config(folder, config, dtype)
    write_rotations(folder, found.rotations)
    return load_model(folder, dtype)


# ---- principal components


def test_no_search_finds_better_components() -> None:
    """Descent over k-dimensional subspaces from many starts captures no more of the energy."""
    x = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = (x * torch.arange(1, 7)).T @ (x * torch.arange(1, 7)) / 50
    q = principal_components(gram)
    torch.testing.assert_close(q.T @ q, torch.eye(6, dtype=torch.float64))
    energy = (q.T @ gram @ q).diagonal()
    assert torch.all(energy.diff() <= 0)
    for k in (1, 3, 5):
        raw = torch.randn(20, 6, k, dtype=torch.float64, generator=torch.Generator().manual_seed(k)).requires_grad_()
        optimizer = torch.optim.Adam([raw], lr=0.1)
        for _ in range(300):
            optimizer.zero_grad()
            basis = torch.linalg.qr(raw).Q
            captured = (basis.mT @ gram @ basis).diagonal(dim1=1, dim2=2).sum(1)
            (-captured.sum()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        best = float(captured.detach().max())
        assert float(energy[:k].sum()) >= best - 1e-9
        assert best == pytest.approx(float(energy[:k].sum()), rel=1e-3)  # the search itself gets there


# ---- the sliced model


@pytest.mark.parametrize("name", NAMES)
def test_full_width_is_the_dense_model(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source, ids = tiny_source(tiny_model, name), tiny.token_ids(2, 20, seed=5)
    found = sliced(source, source.architecture().hidden_size, tmp_path / "state")
    assert found.structures == {}
    assert all(record.relative_error < 1e-6 and record.structure == "dense" for record in found.records)
    exact = written(source, found, tmp_path / "exact", torch.float64)
    dense = replace(found, rotations=Rotations("block", found.rotations.matrices))  # not cut: dense skips
    assert dense.rotations.forms() != found.rotations.forms()
    with ShardWriter(tmp_path / "plain", torch.float64) as shards:
        model = folded(source, torch.float64)
        for key, tensor in model.ends(Rotations.none()).items():
            shards.add(key, tensor)
        for layer in range(model.arch.num_layers):
            for key, tensor in model.block(layer).items():
                shards.add(f"model.layers.{layer}.{key}", tensor)
    write_config(tmp_path / "plain", config_for(model.arch, {}, Rotations.none()), torch.float64)
    plain = load_model(tmp_path / "plain", torch.float64)
    with torch.no_grad():
        assert relative(exact(ids).logits, plain(ids).logits) < 1e-11
    stored = written(source, found, tmp_path / "stored")
    assert relative(logits_of(stored, ids), plain(ids).logits.float()) < 1e-4


def streams_of(model: ProcrustesForCausalLM, tokens: Tensor) -> list[Tensor]:
    """What flows past each position in rotated coordinates, (tokens, d) float64: inputs of the skips, the output."""
    seen: list[Tensor] = []

    def hook(module: Any, inputs: Any, output: Any = None) -> None:
        value = inputs[0] if output is None else output
        seen.append(value.double().flatten(0, 1))

    for block in model.model.layers:
        block.attn_skip.register_forward_pre_hook(hook)
        block.mlp_skip.register_forward_pre_hook(hook)
    model.model.layers[-1].register_forward_hook(hook)
    logits_of(model, tokens)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_components_are_those_of_the_sliced_networks_own_stream(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """In the model that is written, the coordinates at every position are uncorrelated, in descending order."""
    source, kept = tiny_source(tiny_model, name), 40
    found = sliced(source, kept, tmp_path / "state")
    model = written(source, found, tmp_path / "out")
    streams = streams_of(model, TOKENS)
    assert len(streams) == len(found.rotations.matrices)
    for position, x in enumerate(streams):
        width = kept if position < len(streams) - 1 else x.shape[1]
        if position or not source.architecture().tied:
            assert torch.count_nonzero(x[:, width:]) == 0
        gram = x[:, :width].T @ x[:, :width]
        energy = gram.diagonal()
        assert (gram - torch.diag(energy)).abs().max() < 1e-4 * energy.max()
        assert torch.all(energy.diff() < 1e-4 * energy.max())


def test_the_dense_networks_components_are_others(tiny_model: TinyModel, tmp_path: Path) -> None:
    """What the test above sees is the sequence: with the rotations of the dense stream it would fail."""
    source, kept = tiny_source(tiny_model, "tiny_llama"), 40
    dense = sliced(source, 64, tmp_path / "dense")
    cut = (SliceSkip(64, kept, kept),) * 5 + (SliceSkip(64, kept, 64),)
    rotations = Rotations("block", dense.rotations.matrices, cut)
    model = folded(source)
    for layer, file in enumerate(dense.files):
        save_whole(sliced_block(model, layer, rotations), file)
    found = replace(dense, rotations=rotations, structures=leading_structures(model.arch, kept, 64))
    x = streams_of(written(source, found, tmp_path / "out"), TOKENS)[-2][:, :kept]
    gram = x.T @ x
    assert (gram - torch.diag(gram.diagonal())).abs().max() > 1e-2 * gram.max()


def test_quality_falls_with_the_width(tiny_model: TinyModel, tmp_path: Path) -> None:
    source, ids = tiny_source(tiny_model, "tiny_llama"), TOKENS[:2]
    dense = logits_of(source.reference_model(torch.float32), ids)
    errors, records = [], []
    for kept in (64, 56, 40, 16):
        found = sliced(source, kept, tmp_path / f"state-{kept}")
        errors.append(float((logits_of(written(source, found, tmp_path / f"{kept}"), ids) - dense).square().mean()))
        records.append(sum(record.relative_error for record in found.records))
    assert errors == sorted(errors)
    assert records == sorted(records)
    assert errors[0] < 1e-6 < errors[1]


def test_records_are_the_measured_errors(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Of the first readers, against the embeddings by hand."""
    source, kept = tiny_source(tiny_model, "tiny_llama"), 24
    found, model = sliced(source, kept, tmp_path), folded(source, torch.float64)
    x = model.ends(Rotations.none())["model.embed_tokens.weight"][TOKENS].flatten(0, 1)
    h = x * torch.rsqrt(x.square().mean(1, keepdim=True) + model.arch.norm_eps)
    k = found.rotations.matrices[0][:, :kept]
    by_name = {record.name: record for record in found.records}
    for role in ("attn.q", "attn.k", "attn.v"):
        w = model.block(0)[f"{role}.weight"]
        expected = ((h - h @ k @ k.T) @ w.T).norm() / (h @ w.T).norm()
        assert by_name[f"layers.0.{role}"].relative_error == pytest.approx(float(expected), rel=1e-4)
    # The head's position is whole: the last writer is dense and loses nothing.
    last = by_name["layers.2.mlp.down"]
    assert (last.structure, last.relative_error < 1e-6) == ("dense", True)
    assert by_name["layers.1.mlp.down"].relative_error > 1e-2


def test_an_interrupted_run_goes_on(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    whole = sliced(source, 40, tmp_path / "whole")
    original: Callable[[FoldedModel, int], Any] = FoldedModel.block

    def failing(self: FoldedModel, layer: int) -> Any:
        if layer == 2:
            raise KeyboardInterrupt
        return original(self, layer)

    monkeypatch.setattr(FoldedModel, "block", failing)
    with pytest.raises(KeyboardInterrupt):
        sliced(source, 40, tmp_path / "again")
    read: list[int] = []

    def counting(self: slicing._Slicer, layer: int) -> Any:
        read.append(layer)
        return find(self, layer)

    find = slicing._Slicer._find
    monkeypatch.setattr(FoldedModel, "block", original)
    monkeypatch.setattr(slicing._Slicer, "_find", counting)
    again = sliced(source, 40, tmp_path / "again")
    assert read == [2]
    for a, b in zip(whole.files, again.files, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert again.records == whole.records
    read.clear()
    sliced(source, 40, tmp_path / "again")
    assert read == []


def test_no_plain_equivalent(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    written(source, sliced(source, 40, tmp_path / "state"), tmp_path / "out")
    with pytest.raises(UsageError, match="drop part of the stream"):
        write_plain(source, folded(source), tmp_path / "out", tmp_path / "plain")


# ---- sizes


@pytest.mark.parametrize("skip", ["slice", "dense", "cs", "householder"])
@pytest.mark.parametrize("name", ["tiny_opt", "tiny_llama", "tiny_qwen3"])
def test_the_ratio_is_met_and_used(name: str, skip: str, tiny_model: TinyModel) -> None:
    arch = tiny_source(tiny_model, name).architecture()
    d, unit, reflections = arch.hidden_size, 2, 3 if skip == "householder" else None

    def ratio_of(k: int) -> float:
        skips = parameters_of(skip, d, arch.num_layers, kept=k, reflections=reflections)
        structures = leading_structures(arch, k, d if skip == "slice" else k)
        return model_size(arch, structures, "block", skip_parameters=skips).ratio

    for ratio in (0.7, 0.9, 1.0):
        k = kept_for_ratio(arch, ratio, skip, unit=unit, reflections=reflections)
        assert k % unit == 0
        assert ratio_of(k) <= ratio
        assert k + unit >= d or ratio_of(k + unit) > ratio
    assert kept_for_ratio(arch, 0.75, "slice") % 8 == 0
    with pytest.raises(UsageError, match=r"--ratio 0\.01 is too low .* raise --ratio"):
        kept_for_ratio(arch, 0.01, skip, unit=unit, reflections=reflections)


@pytest.mark.parametrize(("kept", "head"), [(0, 64), (65, 64), (8, 0), (8, 65)])
def test_wrong_widths_are_refused(kept: int, head: int, tiny_model: TinyModel) -> None:
    with pytest.raises(UsageError, match="kept coordinates of a stream of 64: choose 1"):
        leading_structures(tiny_source(tiny_model, "tiny_llama").architecture(), kept, head)


def test_even_widths_have_structures(tiny_model: TinyModel) -> None:
    arch = tiny_source(tiny_model, "tiny_llama").architecture()
    for kept in range(2, 64, 2):
        structures = leading_structures(arch, kept, 64)
        assert all(s.kept == kept for s in structures.values())  # type: ignore[attr-defined]
        assert "layers.2.mlp.down" not in structures
        assert len(structures) == 3 * 7 - 1
