"""A sentencepiece model (tokenizer.model) written byte by byte: the package that trains them is not needed."""

from __future__ import annotations

import struct
from pathlib import Path

from tests import tiny

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
BPE = 2


def write_pieces(path: Path) -> None:
    """Llama's kind: byte-pair merges with every byte as a fallback. The letters and pairs of the tests' text follow the
    bytes, up to as many pieces as the tiny models have rows for."""
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    letters = sorted(set(tiny.TEXT) - {"\n", " "})
    found = ["▁", *letters, *(f"▁{letter}" for letter in "taswbiof"), "th", "he", "in", "er", "an"]
    found = list(dict.fromkeys(found))[: tiny.VOCAB_SIZE - 8 - len(pieces)]
    pieces += [(piece, -float(rank), NORMAL) for rank, piece in enumerate(found)]
    message = b"".join(_bytes(1, _bytes(1, p.encode()) + _float(2, score) + _int(3, kind)) for p, score, kind in pieces)
    trainer = _int(3, BPE) + _int(4, len(pieces)) + _int(35, 1)  # model_type, vocab_size, byte_fallback
    trainer += _int(40, 0) + _int(41, 1) + _int(42, 2)  # unk, bos, eos
    normalizer = _bytes(1, b"identity") + _int(3, 1) + _int(4, 0) + _int(5, 1)  # dummy prefix, keep spaces, escape them
    path.write_bytes(message + _bytes(2, trainer) + _bytes(3, normalizer))


# Protocol buffers: a varint key (field << 3 | wire type), then the value.


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
