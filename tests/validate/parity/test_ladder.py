"""Every rung passes on a sound model and catches a defect that is planted for it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.checkpoint.loading import load_model
from compress.checkpoint.reader import CheckpointReader
from compress.checkpoint.rewritten import rewritten_model
from compress.errors import ArtifactError
from compress.source.resolve import resolve
from compress.structures import (
    DenseStructure,
    KroneckerStructure,
    PivotedStructure,
    SelectStructure,
    Structure,
    registry,
)
from export.runtime.ort import OrtRunner
from tests.export.helpers import llama, write_checkpoint
from tests.validate.damaging import damage
from tests.validate.parity.prompts import PROMPTS
from validate.parity.ladder import (
    Choices,
    Rung,
    dense_export_error,
    make_prompts,
    relative_error,
    rung_1,
    rung_2,
    rung_3,
    worst,
)


def test_prompts_have_padding_and_a_sequence_of_length_1() -> None:
    batch, _, single = PROMPTS
    assert batch.mask.sum(1).tolist() == [24, 12, 4, 1]
    assert all(row.tolist() == sorted(row.tolist()) for row in batch.mask)  # padding is on the left
    assert single.ids.shape == (1, 1)
    ids, mask = batch.continued()
    assert ids.shape == mask.shape
    assert mask[:, -1].all()


def test_prompts_from_text() -> None:
    tokens = torch.arange(1000)
    assert make_prompts(10, 24, tokens)[1].ids[0].tolist() == list(range(24))


def test_relative_error() -> None:
    a = torch.tensor([[[2.0, -4.0], [100.0, 0.0]]])
    b = torch.tensor([[[2.0, -3.0], [0.0, 0.0]]])
    assert relative_error(a, b) == 1.0
    assert relative_error(a, b, torch.tensor([[1, 0]])) == 0.25
    assert math.isnan(relative_error(a, b * math.nan))


def test_nan_is_the_worst_and_fails() -> None:
    assert math.isnan(worst([0.1, math.nan, 0.2]))
    rung = Rung(1, "t", math.nan, 1e-4, {"a": math.nan})
    assert not rung.passed
    json.dumps(rung.to_dict(), allow_nan=False)


# --- Rung 1 ---


def reference(folder: Path) -> Any:
    return resolve(str(folder)).reference_model(torch.float32)


def test_rung_1_passes_for_every_tiny_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Unrotated here; the rotated one is the built artefact's, below."""
    from compress.checkpoint.rewritten import write_rewritten
    from compress.rewrites.rotations import Rotations

    source = resolve(str(tiny_model_dir))
    write_rewritten(source, Rotations.none(), tmp_path)
    rung = rung_1(source.reference_model(torch.float32), load_model(tmp_path), PROMPTS)
    assert rung.passed, rung
    assert set(rung.cases) == {"left-padded batch", "one sequence", "length 1"}


def test_rung_1_passes_on_the_rotated_model(built: Any, tmp_path: Path) -> None:
    rewritten = rewritten_model(resolve(str(built.source)), built.out / "checkpoint", tmp_path)
    assert rung_1(reference(built.source), rewritten, PROMPTS).passed


def test_rung_1_catches_a_wrong_rotation(built: Any, tmp_path: Path) -> None:
    checkpoint = built.copy(tmp_path / "out").out / "checkpoint"
    file = checkpoint / "rotation.safetensors"
    tensors = load_file(file)
    assert tensors, "the artefact is not rotated"
    tensors["q.0"][0, 0] += 0.01
    save_file(tensors, file, metadata={"kind": "shared"})
    rewritten = rewritten_model(resolve(str(built.source)), checkpoint, tmp_path / "rewritten")
    assert not rung_1(reference(built.source), rewritten, PROMPTS).passed


def test_rung_1_catches_one_wrong_weight(built: Any, tmp_path: Path) -> None:
    rewritten = rewritten_model(resolve(str(built.source)), built.out / "checkpoint", tmp_path)
    rewritten.model.layers[1].attn.v.weight[3, 5] += 0.1
    assert not rung_1(reference(built.source), rewritten, PROMPTS).passed


# --- Rung 2 ---


def test_rung_2_passes_and_counts(built: Any) -> None:
    reader = CheckpointReader(built.out / "checkpoint")
    rung = rung_2(reader)
    assert rung.passed
    structured = sum(reader.structure(name).name != "dense" for name in reader.linears())
    assert rung.facts["layers"] == structured > 0
    assert rung.facts["layers"] + rung.facts["dense_layers"] == len(reader.linears())


def every_structure() -> list[Structure]:
    """Each registered structure in both directions, and what lies between kept features in each that may."""
    found: list[Structure] = []
    for name, cls in registry().items():
        if name in ("dense", "select"):
            continue
        for n, m in ((128, 64), (64, 128)):
            found.append(cls.for_ratio(m, n, "in" if n > m else "out", 0.75, 16))
    cores = [PivotedStructure(48, 128, 16, "in"), PivotedStructure(48, 128, 16, "out"), DenseStructure(48, 128)]
    return [*found, *(SelectStructure(64, 128, 48, 1, "in", core) for core in cores)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("structure", every_structure(), ids=str)
def test_rung_2_on_every_structure(structure: Structure, dtype: torch.dtype, tmp_path: Path) -> None:
    """Integers among the factors included, and factors stored in 16 bits."""
    arch = llama(hidden_size=64, intermediate_size=128, head_dim=16, num_layers=1)
    n, m = structure.out_features, structure.in_features
    role = next(role for role, shape in arch.linears().items() if shape == (n, m))
    write_checkpoint(tmp_path, arch, {f"layers.0.{role}": structure}, dtype=dtype)
    rung = rung_2(CheckpointReader(tmp_path))
    assert rung.passed, rung
    assert rung.facts["layers"] == 1


def test_rung_2_catches_one_wrong_factor_value(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factored product sees another value than the dense equivalent, in one layer only."""
    reader = CheckpointReader(built.out / "checkpoint")
    target = next(n for n in reversed(reader.linears()) if reader.structure(n).name == "kron")
    value = reader.factors(target)["B"][0, 0]
    apply = KroneckerStructure.apply

    def wrong(self: KroneckerStructure, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        if factors["B"][0, 0] == value:
            factors = {**factors, "B": factors["B"].clone()}
            factors["B"][0, 0] += 0.01
        return apply(self, factors, x)

    monkeypatch.setattr(KroneckerStructure, "apply", wrong)
    rung = rung_2(reader)
    assert not rung.passed
    assert rung.facts["worst_layer"] == target


def test_rung_2_catches_nan(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        KroneckerStructure, "apply", lambda self, factors, x: torch.full((len(x), self.out_features), math.nan)
    )
    assert not rung_2(CheckpointReader(built.out / "checkpoint")).passed


# --- Rung 3 ---


def test_rung_3_passes(built: Any) -> None:
    rung = rung_3(load_model(built.out / "checkpoint"), OrtRunner(built.out / "onnx" / "model.onnx"), PROMPTS)
    assert rung.passed, rung
    assert rung.value < 1e-5
    assert rung.facts["top1_agreement"] == 1
    assert rung.facts["greedy"] == {"sequences": 6, "equal": 6, "ties": 0, "different": 0}
    for prompt in PROMPTS:
        assert {f"{prompt.name}: {kind}" for kind in ("full forward", "prefill", "decode with cache")} <= set(
            rung.cases
        )


def test_clear_choices_must_agree_and_near_ties_need_not() -> None:
    reference = torch.tensor([[10.0, 0.0, 0.0], [10.0, 9.9, 0.0], [0.0, 10.0, 5.0]])
    rounded = torch.tensor([[10.0, 0.0, 0.0], [9.9, 10.0, 0.0], [0.0, 10.0, 5.0]])
    greedy = {"sequences": 1, "equal": 1, "ties": 0, "different": 0}
    choices = Choices(0.01)  # two errors of 1 % of 10: closer than 0.2 is a near tie
    choices.add(reference, rounded)
    facts, failures = choices.result(greedy)
    assert (facts["positions"], facts["clear_positions"], failures) == (3, 2, ())
    assert facts["top1_agreement"] == pytest.approx(2 / 3)
    choices.add(reference, reference.roll(1, dims=-1))
    assert choices.result({**greedy, "different": 2})[1] == (
        "2 of 4 clear top-1 choices differ",
        "2 of 1 greedy continuations differ",
    )


@pytest.mark.parametrize("which", [0, -1])
def test_rung_3_catches_one_wrong_weight(built: Any, tmp_path: Path, which: int) -> None:
    copy = built.copy(tmp_path / "out").out
    damage(copy / "onnx", which)
    assert not rung_3(load_model(copy / "checkpoint"), OrtRunner(copy / "onnx" / "model.onnx"), PROMPTS).passed


class _ForgetsMask(OrtRunner):
    """A runner that treats padding as tokens while it decodes."""

    def decode(self, token_ids: Any) -> Any:
        self._mask = np.ones_like(self._mask)
        return super().decode(token_ids)


def test_rung_3_catches_a_cache_that_is_used_wrongly(built: Any) -> None:
    rung = rung_3(load_model(built.out / "checkpoint"), _ForgetsMask(built.out / "onnx" / "model.onnx"), PROMPTS)
    assert not rung.passed
    assert rung.cases["left-padded batch: full forward"] < rung.tolerance
    assert rung.cases["left-padded batch: prefill"] < rung.tolerance
    assert rung.cases["left-padded batch: decode with cache"] > rung.tolerance
    assert rung.cases["length 1: decode with cache"] < rung.tolerance


class _OtherChoice(OrtRunner):
    """A runner whose generation is off by one token."""

    def generate(self, prompts: Any, **options: Any) -> list[list[int]]:
        return [[(t + 1) % self.vocabulary for t in tokens] for tokens in super().generate(prompts, **options)]


def test_rung_3_catches_other_greedy_tokens(built: Any) -> None:
    rung = rung_3(load_model(built.out / "checkpoint"), _OtherChoice(built.out / "onnx" / "model.onnx"), PROMPTS)
    assert rung.value <= rung.tolerance
    assert rung.failures == ("6 of 6 greedy continuations differ",)
    assert not rung.passed


def test_rung_3_on_a_graph_of_last_logits(built: Any, tmp_path: Path) -> None:
    from export.graph.decoder import export_onnx

    info = export_onnx(built.out / "checkpoint", tmp_path, logits="last")
    assert rung_3(load_model(built.out / "checkpoint"), OrtRunner(info.path), PROMPTS).passed


def test_the_dense_export_is_checked(built: Any, tmp_path: Path) -> None:
    """The compressed graph is not the dense model."""
    dense = rewritten_model(resolve(str(built.source)), built.out / "checkpoint", tmp_path)
    with pytest.raises(ArtifactError, match="not the dense source model"):
        dense_export_error(dense, built.out / "onnx" / "model.onnx")
