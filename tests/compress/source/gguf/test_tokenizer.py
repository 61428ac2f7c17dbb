"""The tokenizer of a GGUF file: that of transformers' own loading, and a sentence for what does not add up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.errors import ArtifactError, UsageError
from compress.source.gguf import GgufHeader, check_tokenizer, read_header
from compress.source.resolve import resolve
from tests import tiny


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> GgufHeader:
    return read_header(tiny.write_gguf("tiny_llama", tmp_path_factory.mktemp("gguf") / "m.gguf"))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2", "tiny_qwen3"])
def test_the_same_as_through_auto_tokenizer(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = tiny.write_gguf(name, tmp_path / "m.gguf")
    found = resolve(str(path)).tokenizer()
    expected = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=path.name)
    assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert found.special_tokens_map == expected.special_tokens_map
    assert found(tiny.TEXT, verbose=False).input_ids == expected(tiny.TEXT, verbose=False).input_ids


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model", None, "has no tokenizer"),
        ("tokens", None, "has no tokenizer"),
        ("tokens", [], "has no tokenizer"),
        ("tokens", np.arange(3), "an array of strings is needed"),
        ("merges", np.arange(3), "an array of strings is needed"),
        ("merges", ["ab"], "the merge 'ab' is not a pair"),
        ("merges", ["a b c"], "is not a pair"),
        ("merges", [" b"], "is not a pair"),
        ("token_type", np.ones(3, np.int32), "token types for 3"),
        ("eos_token_id", 320, "tokenizer.ggml.eos_token_id is 320, and there are 320 tokens"),
        ("bos_token_id", "x", "bos_token_id = 'x'"),
    ],
)
def test_tokenizers_that_do_not_add_up(header: GgufHeader, key: str, value: Any, says: str) -> None:
    metadata = header.metadata | {f"tokenizer.ggml.{key}": value}
    metadata = {k: v for k, v in metadata.items() if v is not None}
    with pytest.raises(ArtifactError, match=says):
        check_tokenizer(replace(header, metadata=metadata))


NUMBERS = "In  1962 it took 7 hours, x2 + 12."


@pytest.mark.parametrize(
    ("pre", "alone", "warns"),
    [(None, False, False), ("llama-bpe", False, False), ("smollm", True, False), ("new", False, True)],
)
def test_how_text_is_split(
    pre: str | None, alone: bool, warns: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def add(writer: Any) -> None:
        if pre is not None:
            writer.add_tokenizer_pre(pre)

    tokenizer = resolve(str(tiny.write_gguf("tiny_llama", tmp_path / "m.gguf", add))).tokenizer()
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(NUMBERS)]
    assert all(not any(c.isdigit() for c in piece) or len(piece) == 1 for piece in pieces) == alone
    assert ("warning: " in capsys.readouterr().err) == warns
    assert tokenizer.decode(tokenizer(NUMBERS, add_special_tokens=False).input_ids) == NUMBERS


def test_a_tokenizer_of_another_kind(header: GgufHeader) -> None:
    with pytest.raises(UsageError, match="'bert'"):
        check_tokenizer(replace(header, metadata=header.metadata | {"tokenizer.ggml.model": "bert"}))
