"""OUT/dense: a plain checkpoint of the compressed model, which loads where this project is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.artifact.store import Artifact
from compress.checkpoint.loading import load_model
from compress.checkpoint.plain import write_plain
from compress.checkpoint.reader import CheckpointReader
from compress.errors import UsageError
from compress.pipeline import compress_model
from compress.rewrites.folding import folded
from compress.structures import cast
from tests import tiny
from tests.compress import helpers
from tests.compress.helpers import TinyModel, logits_of, once, relative, text_file, tiny_source

CASES: list[tuple[str, dict[str, Any]]] = [
    ("tiny_llama", {"rotation": "shared"}),
    ("tiny_llama", {"rotation": "block"}),
    ("tiny_llama_tied", {"rotation": "shared"}),
    ("tiny_llama_tied", {"rotation": "block"}),
    ("tiny_opt", {"rotation": "shared"}),
    ("tiny_opt", {"rotation": "block"}),
    ("tiny_opt_untied", {"rotation": "shared"}),
    ("tiny_opt_untied", {"rotation": "block"}),
    ("tiny_llama_bias", {"rotation": "block"}),
    ("tiny_qwen2", {"structure": "gs"}),
    ("tiny_qwen3", {"rotation": "shared"}),
    ("tiny_mistral", {"structure": "lowrank"}),
    ("tiny_opt", {"structure": "lowrank"}),
    ("tiny_opt", {"rotation": "shared", "checkpoint_dtype": "bfloat16"}),
    ("tiny_opt", {"structure": "dense"}),
]
IDS = tiny.token_ids(2, 24)


@pytest.fixture(scope="module")
def artifacts(tiny_model: TinyModel, shared_folder: Path) -> list[Artifact]:
    """One artefact per case, with OUT/dense."""

    def run(folder: Path) -> None:
        for i, (name, changes) in enumerate(CASES):
            wanted = helpers.recipe(text_file(folder), **changes)
            compress_model(tiny_source(tiny_model, name), wanted, folder / f"out-{i}", materialize_dense=True)

    folder = once(shared_folder / "materialize", run)
    return [Artifact(folder / f"out-{i}") for i in range(len(CASES))]


@pytest.fixture(scope="module")
def plain_logits(artifacts: list[Artifact], shared_folder: Path) -> list[torch.Tensor]:
    """Logits of every OUT/dense, computed by a process that never sees this project."""
    folder = once(shared_folder / "plain", lambda folder: run_plain(artifacts, folder))
    logits: list[torch.Tensor] = torch.load(folder / "logits.pt")
    return logits


def run_plain(artifacts: list[Artifact], folder: Path) -> None:
    """Write FOLDER/logits.pt."""
    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "ids, out = torch.load(sys.argv[1]), []\n"
        "for folder in sys.argv[3:]:\n"
        "    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)\n"
        "    assert not info['missing_keys'] and not info['unexpected_keys'], (folder, info)\n"
        "    AutoTokenizer.from_pretrained(folder)\n"
        "    with torch.no_grad():\n        out.append(model(ids).logits.float())\n"
        "assert 'compress' not in sys.modules\ntorch.save(out, sys.argv[2])\n"
    )
    torch.save(IDS, folder / "ids.pt")
    paths = [folder / "ids.pt", folder / "logits.pt", *(a.path("dense") for a in artifacts)]
    command = [sys.executable, "-I", "-c", script, *map(str, paths)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{n}-{'-'.join(c.values())}" for n, c in CASES])
def test_same_logits_without_the_import(case: int, artifacts: list[Artifact], plain_logits: list[torch.Tensor]) -> None:
    expected = logits_of(load_model(artifacts[case].path("checkpoint")), IDS)
    # Factors stored in half precision have lost their exact rotation, and with it the exact absence of a mean.
    half = "checkpoint_dtype" in CASES[case][1]
    assert relative(plain_logits[case], expected) < (5e-2 if half else 1e-4)
    assert expected.std() > 0.1


def test_it_is_the_compressed_model_and_not_the_source(
    artifacts: list[Artifact], plain_logits: list[torch.Tensor], tiny_model: TinyModel
) -> None:
    for (name, changes), logits in zip(CASES, plain_logits, strict=True):
        dense = logits_of(tiny_source(tiny_model, name).reference_model(torch.float32), IDS)
        assert (relative(logits, dense) > 1e-2) == (changes.get("structure") != "dense")


def test_config_is_the_source_s(artifacts: list[Artifact], tiny_model: TinyModel) -> None:
    for (name, _), artifact in zip(CASES, artifacts, strict=True):
        seen = json.loads((artifact.path("dense") / "config.json").read_text())
        source = json.loads((tiny_model(name) / "config.json").read_text())
        volatile = {"transformers_version", "dtype", "torch_dtype"}
        assert {k: v for k, v in seen.items() if k not in volatile} == {
            k: v for k, v in source.items() if k not in volatile
        }


def test_stage_belongs_to_its_checkpoint(artifacts: list[Artifact]) -> None:
    for artifact in artifacts:
        artifact.verify(["dense"])
        assert artifact.require_stage("dense") == artifact.path("dense")


def test_products_are_not_rounded_to_half_precision(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Factors in 16 bits are multiplied in more: OUT/dense is in float32."""
    wanted = helpers.recipe(text_file(tmp_path), structure="lowrank", ratio=0.5, checkpoint_dtype="bfloat16")
    out = compress_model(tiny_source(tiny_model, "tiny_llama"), wanted, tmp_path / "out", materialize_dense=True).out
    reader = CheckpointReader(out / "checkpoint")
    linear = next(n for n in reader.linears() if n.endswith("mlp.gate") and reader.structure(n).name == "lowrank")
    exact = reader.structure(linear).dense(cast(reader.factors(linear), torch.float64))
    stored = {k: v for file in (out / "dense").glob("*.safetensors") for k, v in load_file(file).items()}
    assert relative(stored[f"model.{linear}_proj.weight"].double(), exact) < 1e-6


IMPOSSIBLE: list[tuple[str, dict[str, Any], str]] = [
    ("tiny_opt", {"structure": "kron", "rotation": "none"}, "has a mean"),
    ("tiny_opt", {"structure": "kron", "rotation": "shared", "ties": False}, "has a mean"),
    ("tiny_opt", {"structure": "kron", "fit": "paper", "ratio": 0.95}, "kron --fit paper .* has a mean"),
    ("tiny_opt", {"structure": "gs"}, "has a mean"),
    ("tiny_opt", {"structure": "compot"}, "has a mean"),
    ("tiny_opt_untied", {"structure": "lowrank", "embedding": 0.6}, "do without --embedding"),
    ("tiny_llama", {"structure": "slice", "ratio": 0.9}, "structure slice"),
    ("tiny_llama", {"structure": "auto", "inner": ("bias",)}, "--inner bias gives layers.0"),
]


# What a menu may lead to: whether it does, only the fit would tell.
UNSURE: list[tuple[str, dict[str, Any], str]] = [
    ("tiny_opt", {"structure": "auto", "menu": ("pifa", "gs")}, "auto --menu pifa,gs .* may have a mean"),
    ("tiny_opt", {"structure": "auto", "menu": ("gs", "kron"), "rotation": "shared"}, "may have a mean"),
]


@pytest.mark.parametrize(("name", "changes", "message"), [*IMPOSSIBLE, *UNSURE])
def test_what_has_no_plain_equivalent_is_refused_first(
    name: str, changes: dict[str, Any], message: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Before anything is read or written, not after hours of work."""
    wanted = helpers.recipe(text_file(tmp_path), **changes)
    with pytest.raises(UsageError, match=rf"{message}.* do without|or without --materialize-dense"):
        compress_model(tiny_source(tiny_model, name), wanted, tmp_path / "out", materialize_dense=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "changes", "message"), IMPOSSIBLE)
def test_what_is_refused_first_cannot_be_written(
    name: str, changes: dict[str, Any], message: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """The recipes of above, fitted: the writer finds the same fault in their weights."""
    source, wanted = tiny_source(tiny_model, name), helpers.recipe(text_file(tmp_path), **changes)
    checkpoint = compress_model(source, wanted, tmp_path / "out").path("checkpoint")
    with pytest.raises(UsageError, match=r"without --materialize-dense"):
        write_plain(source, folded(source), checkpoint, tmp_path / "dense")
