"""Tokenizers as repositories have them: tokenizer.model alone, custom code, and more tokens than the model."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.calibration.text import TextData
from compress.calibration.tokens import token_sequences
from compress.cli.entry import run_cli
from compress.errors import ArtifactError, MissingDependencyError, UsageError
from compress.source.resolve import resolve
from export.build import main
from export.runtime.ort import OrtRunner
from tests import tiny
from validate.perplexity.windows import make_windows

LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    """A model of Llama 2's kind: BPE with byte fallback and split digits."""
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.TEXT.splitlines()),
        model_writer=made,
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        split_digits=True,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return made.getvalue()


@pytest.fixture
def folder(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny Llama without any tokenizer."""
    path = Path(shutil.copytree(tiny_model("tiny_llama"), tmp_path / "model"))
    for file in path.glob("*token*"):
        file.unlink()
    return path


@pytest.mark.parametrize("config", [None, {}, LLAMA, LLAMA | {"legacy": False}])
def test_tokenizer_model_alone(folder: Path, sentencepiece_model: bytes, config: dict[str, Any] | None) -> None:
    import sentencepiece

    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = resolve(str(folder)).tokenizer()
    expected = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    for text in (tiny.TEXT, "A b", "1962, in 7 hours; ünïcödé \U0001f600"):
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        assert ids == expected.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer(text, verbose=False).input_ids == [expected.bos_id(), *ids]


def test_tokenizer_model_alone_from_end_to_end(folder: Path, sentencepiece_model: bytes, tmp_path: Path) -> None:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT * 3)
    small = ["--structure", "lowrank", "--ratio", "0.7", "--unit", "4", "--calibration-data", str(text)]
    sizes = ["--calibration-samples", "2", "--sequence-length", "32", "--engine", "ort"]
    assert run_cli(main, ["--model", str(folder), "--out", str(tmp_path / "out"), *small, *sizes]) == 0
    from transformers import AutoTokenizer

    saved, source = AutoTokenizer.from_pretrained(tmp_path / "out" / "checkpoint"), resolve(str(folder)).tokenizer()
    assert saved(tiny.TEXT, verbose=False).input_ids == source(tiny.TEXT, verbose=False).input_ids


def test_without_the_package_that_reads_it(
    folder: Path, sentencepiece_model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'sentencepiece>=0\.2'"):
        resolve(str(folder)).tokenizer()


def test_a_model_in_the_format_of_tiktoken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(MissingDependencyError, match=r"tiktoken's format.*pip install 'procrustes-llm\[tiktoken\]'"):
        resolve(str(folder)).tokenizer()


@pytest.mark.parametrize("kept", [1, 100, 2000, -1])
def test_a_truncated_model(folder: Path, sentencepiece_model: bytes, kept: int) -> None:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model[:kept])
    with pytest.raises(ArtifactError, match=r"tokenizer\.model cannot be read"):
        resolve(str(folder)).tokenizer()


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"])
def test_git_lfs_pointers(folder: Path, sentencepiece_model: bytes, file: str) -> None:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    (folder / file).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ArtifactError, match=rf"{file} is a git-lfs pointer"):
        resolve(str(folder)).tokenizer()


def test_custom_code_is_named(folder: Path, sentencepiece_model: bytes) -> None:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="--trust-remote-code"):
        resolve(str(folder)).tokenizer()


def test_custom_code_beside_a_complete_tokenizer_is_not_needed(folder: Path, tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert resolve(str(folder)).tokenizer()(tiny.TEXT, verbose=False).input_ids


# --- a tokenizer that knows more tokens than the model has (Llama-2-13b with an added padding token)

MORE = "<|more|>"


@pytest.fixture
def longer(folder: Path) -> Path:
    """A tiny Llama whose tokenizer has its first token too many."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(tiny.VOCAB_SIZE - len(tokenizer))] + [MORE])
    assert tokenizer.convert_tokens_to_ids(MORE) == tiny.VOCAB_SIZE
    tokenizer.save_pretrained(folder)
    return folder


def data(text: str) -> TextData:
    return TextData("notes", [text], "notes")


def test_calibration(longer: Path) -> None:
    tokenizer = resolve(str(longer)).tokenizer()
    options = {"samples": 2, "length": 16, "seed": 0, "vocab_size": tiny.VOCAB_SIZE}
    assert token_sequences(data(tiny.TEXT), tokenizer, **options).shape == (2, 16)
    with pytest.raises(UsageError, match=r"the calibration text 'notes' holds the token '<\|more\|>' \(id 320\)"):
        token_sequences(data(MORE + tiny.TEXT), tokenizer, **options)


def test_evaluation(longer: Path) -> None:
    tokenizer = resolve(str(longer)).tokenizer()
    with pytest.raises(UsageError, match=r"the text 'notes' holds the token '<\|more\|>' \(id 320\)"):
        make_windows(data(tiny.TEXT + MORE), tokenizer, length=16, vocab_size=tiny.VOCAB_SIZE)


def test_the_whole_road(longer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = ["--model", str(longer), "--out", str(tmp_path / "out"), "--structure", "dense", "--engine", "ort"]
    assert run_cli(main, arguments) == 0
    assert "warning: the tokenizer of" in capsys.readouterr().err
    folder = tmp_path / "out" / "checkpoint"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    runner = OrtRunner(tmp_path / "out" / "onnx" / "model.onnx")
    good, bad = (tokenizer(text, return_tensors="pt") for text in ("The mill", "The mill" + MORE))
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    made = model.generate(**good, **options)[0, good.input_ids.shape[1] :].tolist()
    assert runner.generate(good.input_ids.tolist(), max_new_tokens=2) == [made]
    with pytest.raises(UsageError, match="input_ids hold 320, and this model has the tokens 0 to 319"):
        model.generate(**bad, **options)
    with pytest.raises(UsageError, match=r"token ids must be in 0 \.\.\. 319"):
        runner.generate(bad.input_ids.tolist(), max_new_tokens=2)
    with pytest.raises(UsageError, match="input_ids hold -1"):
        model(torch.tensor([[-1, 3]]))
