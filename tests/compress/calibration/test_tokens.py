"""Calibration text to token sequences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.calibration.text import TextData
from compress.calibration.tokens import token_sequences
from compress.errors import UsageError
from tests import tiny

ROWS = tuple(row for row in tiny.TEXT.split("\n\n") if row)
TOKENIZER = tiny.tokenizer()


def sequences(*rows: str, samples: int = 4, length: int = 16, seed: int = 0, vocab: int = tiny.VOCAB_SIZE) -> Tensor:
    text = TextData("a test", rows, "")
    return token_sequences(text, TOKENIZER, samples=samples, length=length, seed=seed, vocab_size=vocab)


def test_one_row_is_cut_into_sequences() -> None:
    found = sequences(tiny.TEXT, samples=5, length=20)
    assert found.shape == (5, 20)
    assert found.dtype == torch.int64
    assert found.flatten().tolist() == TOKENIZER(tiny.TEXT, add_special_tokens=False)["input_ids"][:100]


def test_rows_are_shuffled_by_the_seed_and_joined_by_blank_lines() -> None:
    count = sum(len(TOKENIZER(row + "\n\n")["input_ids"]) for row in ROWS)
    texts = {seed: TOKENIZER.decode(sequences(*ROWS, samples=1, length=count - 8, seed=seed)[0]) for seed in range(4)}
    assert texts[0] == TOKENIZER.decode(sequences(*ROWS, samples=1, length=count - 8, seed=0)[0])
    assert len(set(texts.values())) > 1
    for text in texts.values():
        parts = text.split("\n\n")
        assert all(part.strip() in {row.strip() for row in ROWS} for part in parts[: len(ROWS) - 1])
        assert len(set(parts)) == len(parts)  # each row once


def test_long_corpora_are_read_only_as_far_as_needed() -> None:
    class Recording:
        def __init__(self) -> None:
            self.pieces: list[list[str]] = []

        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            self.pieces.append(text.split())
            return {"input_ids": [3] * 600}

    recording = Recording()
    text = TextData("a test", tuple(f"row{i}" for i in range(5000)), "")
    token_sequences(text, recording, samples=2, length=500, seed=0, vocab_size=10)  # type: ignore[arg-type]
    assert len(recording.pieces) == 2
    assert len({*recording.pieces[0], *recording.pieces[1]}) == 2 * len(recording.pieces[0])  # no row twice


def test_no_warning_about_long_text(capfd: pytest.CaptureFixture[str]) -> None:
    tiny.tokenizer()
    fresh = tiny.tokenizer()  # transformers warns once per tokenizer
    text = TextData("a test", (tiny.TEXT,), "")
    token_sequences(text, fresh, samples=1, length=4, seed=0, vocab_size=tiny.VOCAB_SIZE)
    assert "longer than" not in capfd.readouterr().err


def test_too_short() -> None:
    with pytest.raises(UsageError, match=r"'a test' has \d+ tokens, 100 x 16 = 1,600 are asked for: lower"):
        sequences("a few words", samples=100)


@pytest.mark.parametrize(("samples", "length"), [(0, 16), (4, 1), (4, 0)])
def test_nothing_to_calibrate_on(samples: int, length: int) -> None:
    with pytest.raises(UsageError, match="cannot calibrate anything"):
        sequences(tiny.TEXT, samples=samples, length=length)


def test_tokenizer_of_another_model() -> None:
    with pytest.raises(UsageError, match="the model, of 100 tokens, does not"):
        sequences(tiny.TEXT, vocab=100)
