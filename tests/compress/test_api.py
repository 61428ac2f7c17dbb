"""The public functions: compress and load, a model and a text in memory, errors of ours, progress by a callback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.artifact.store import Artifact
from compress.errors import ArtifactError, UsageError
from compress.source.memory import MemorySource
from compress.source.provenance import find_source
from compress.source.resolve import resolve
from tests import tiny
from tests.compress.helpers import LENGTH, SAMPLES, TinyModel, logits_of, text_file

TEXTS = tiny.TEXT.split("\n\n")


def recipe(**changes: Any) -> compress.Recipe:
    calibration = {"samples": SAMPLES, "sequence_length": LENGTH}
    return compress.Recipe(
        **{"structure": "lowrank", "ratio": 0.8, "sensitivity": "none", "calibration": calibration, **changes}
    )


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "checkpoint").glob("*.safetensors")}


def test_importing_is_light() -> None:
    code = (
        "import sys, compress\n"
        "compress.Recipe(structure='auto'), compress.structures, compress.compress, compress.load, compress.register\n"
        "assert set(compress.__all__) <= set(dir(compress))\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_compress_and_load(tiny_model: TinyModel, tmp_path: Path) -> None:
    text = text_file(tmp_path)
    out = compress.compress(str(tiny_model("tiny_llama")), recipe(), out=tmp_path / "out", calibration=str(text))
    assert out == tmp_path / "out"
    ids = tiny.token_ids(2, 16)
    model, tokenizer = compress.load(out)
    again, _ = compress.load(out / "checkpoint", dtype=torch.float64)
    assert not model.training
    assert tokenizer("A stone")["input_ids"] == tiny.tokenizer()("A stone")["input_ids"]
    assert again.dtype == torch.float64
    assert torch.allclose(logits_of(model, ids), logits_of(again, ids).float(), atol=1e-3)
    plain = AutoModelForCausalLM.from_pretrained(out / "checkpoint")  # load has registered it
    assert type(plain) is type(model)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_tied", "tiny_opt"])
def test_a_model_in_memory_is_compressed_as_its_folder_is(tiny_model: TinyModel, tmp_path: Path, name: str) -> None:
    folder, text = tiny_model(name), text_file(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    a = compress.compress(str(folder), recipe(), out=tmp_path / "a", calibration=text)
    b = compress.compress(model, recipe(), out=tmp_path / "b", calibration=text, tokenizer=tiny.tokenizer())
    assert weights(a) == weights(b)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    recorded = Artifact(b).read_manifest()["source"]
    assert recorded["kind"] == "memory"
    assert recorded["id"] == folder.name
    assert str(folder.parent) not in json.dumps(recorded)


def test_validation_of_a_model_in_memory_asks_where_it_is(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Saved, in another type of file and precision that holds the same values, it is the same model."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model("tiny_llama")), tiny.tokenizer()
    out = compress.compress(model, recipe(structure="dense"), out=tmp_path / "out", tokenizer=tokenizer)
    recorded = Artifact(out).read_manifest()["source"]
    with pytest.raises(UsageError, match=r"model in memory .*--model PATH"):
        find_source(recorded, out)
    saved = tmp_path / "saved"
    model.double().save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    assert find_source(recorded, out, str(saved)).path == saved
    with pytest.raises(ArtifactError, match=r"is not the model .* weights"):
        find_source(recorded, out, str(tiny.write("tiny_llama_tied", tmp_path / "other")))


def test_the_reference_is_a_copy(tiny_model: TinyModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("tiny_llama_tied"))
    source = MemorySource.of(model, tiny.tokenizer())
    reference, ids = source.reference_model(torch.float32), tiny.token_ids(2, 12)
    assert torch.equal(logits_of(reference, ids), logits_of(model, ids))
    assert reference.get_input_embeddings().weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    assert source.architecture() == resolve(str(tiny_model("tiny_llama_tied"))).architecture()


def test_texts_in_memory(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Equal strings make equal checkpoints, other strings others, and the recipe names what it does not hold."""
    made = [
        compress.compress(str(tiny_model("tiny_llama")), recipe(), out=tmp_path / name, calibration=texts)
        for name, texts in (("a", TEXTS), ("b", list(TEXTS)), ("c", [*TEXTS[::-1], "More."]))
    ]
    a, b, c = map(weights, made)
    assert a == b != c
    requests = [Artifact(out).read_manifest()["stages"]["checkpoint"]["request"] for out in made]
    assert requests[0] == requests[1] != requests[2]
    from compress.calibration.text import load_text
    from compress.recipe import read_written

    data = read_written(made[0] / "recipe.yaml").calibration.data
    with pytest.raises(UsageError, match="list of strings in memory"):
        load_text(data)


def test_progress_by_a_callback(tiny_model: TinyModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[compress.Progress] = []
    compress.compress(
        str(tiny_model("tiny_llama")), recipe(), out=tmp_path / "out", calibration=TEXTS, progress=seen.append
    )
    assert any(each.done is not None and each.done == each.total for each in seen)
    assert any(each.done is None and each.text.startswith("kept ") for each in seen)
    assert "kept " not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": "lowrang"}, "structure: one of"),
        ({"ratio": 7}, "ratio: a finite number above 0 and at most 1 is needed, not 7"),
        ({"ratoi": 0.5}, "ratoi: there is no such field, did you mean ratio"),
        ({"rotation": "shared"}, "low rank is the same in every rotation"),
        ({"calibration": {"samples": 0}}, "calibration.samples: a whole number of at least 1"),
    ],
)
def test_a_wrong_recipe_is_told_in_words(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "no-such-model"}, "There is no model"),
        ({"model": torch.nn.Linear(2, 2)}, "model is a Linear: give a name"),
        ({"model": None}, "model is a NoneType"),
        ({"recipe": {"ratio": 0.5}}, "recipe must be a compress.Recipe, not a dict"),
        ({"calibration": []}, "0 strings of calibration are empty"),
        ({"calibration": ["", " \n"]}, "2 strings of calibration are empty"),
        ({"calibration": [1]}, "a list of strings"),
        ({"calibration": ["\ud800"]}, "half a surrogate pair"),
        ({"tokenizer": tiny.tokenizer()}, "brings its own"),
    ],
)
def test_wrong_arguments(tiny_model: TinyModel, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    given = {"model": str(tiny_model("tiny_llama")), "recipe": recipe(), "out": tmp_path / "out", **arguments}
    with pytest.raises(UsageError, match=message):
        compress.compress(**given)


def test_a_model_in_memory_needs_its_tokenizer(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("tiny_llama"))
    with pytest.raises(UsageError, match="needs its tokenizer"):
        compress.compress(model, recipe(), out=tmp_path)
    with pytest.raises(UsageError, match="revision"):
        compress.compress(model, recipe(), out=tmp_path, revision="main", tokenizer=tiny.tokenizer())


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no compressed model"):
        compress.load(tmp_path)
