"""GGUF headers: parsed as the gguf package does, once; every damaged or forged one refused before it costs anything."""

from __future__ import annotations

import shutil
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from compress.errors import ArtifactError
from compress.source.gguf import header as module
from compress.source.gguf import read_header
from compress.source.resolve import resolve
from tests import tiny


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of quantised linears."""
    return tiny.write_gguf("tiny_llama", tmp_path_factory.mktemp("gguf") / "m.gguf", quantize="Q8_0")


def test_the_same_as_the_gguf_package_reads(file: Path) -> None:
    found, expected = read_header(file), gguf.GGUFReader(file)
    fields = {key: f.contents() for key, f in expected.fields.items() if not key.startswith("GGUF.")}
    metadata = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in found.metadata.items()}
    assert metadata == fields
    for tensor in expected.tensors:
        entry = found.tensors[tensor.name]
        assert entry.shape == tuple(reversed(tensor.shape.tolist()))
        assert (entry.kind, entry.offset, entry.size) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
    assert len(found.tensors) == len(expected.tensors)


def test_parsed_once_a_process_and_anew_when_the_file_changes(file: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(file, tmp_path / "m.gguf"))
    source = resolve(str(path))
    source.config(), source.tokenizer(), source.reader().names()
    assert read_header(path) is read_header(path) is resolve(str(path))._gguf_header
    tiny.write_gguf("tiny_qwen2", path)
    assert read_header(path).architecture == "qwen2"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Paths of the headers that were parsed, not taken from memory."""
    seen: list[Path] = []
    plain = module._Parser.header

    def spy(self: module._Parser) -> module.GgufHeader:
        seen.append(self.path)
        return plain(self)

    monkeypatch.setattr(module._Parser, "header", spy)
    return seen


def test_one_parse_for_everything(file: Path, tmp_path: Path, parsed: list[Path]) -> None:
    source = resolve(str(shutil.copy(file, tmp_path / "m.gguf")))
    source.config(), source.tokenizer(), source.reader().names()
    resolve(source.name).config()
    assert len(parsed) == 1


def test_every_truncation_is_told(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    first = min(tensor.offset for tensor in read_header(file).tensors.values())
    path = tmp_path / "m.gguf"
    for kept in [*range(4, 400), *range(400, first, 97), first, first + 1, len(content) - 1]:
        path.write_bytes(content[:kept])
        with pytest.raises(ArtifactError, match="truncated or damaged"):
            read_header(path)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def forged() -> Iterator[tuple[str, bytes, str]]:
    """Name, content behind the magic and what the message says."""
    head = struct.pack("<IQQ", 3, 0, 1)
    yield "version-1", struct.pack("<III", 1, 0, 0), "of version 1"
    yield "version-99", struct.pack("<IQQ", 99, 0, 0), "of version 99"
    yield "big-endian", struct.pack(">IQQ", 3, 0, 0), "big-endian"
    yield "tensors", struct.pack("<IQQ", 3, 1 << 60, 0), "1,152,921,504,606,846,976 tensors"
    yield "keys", struct.pack("<IQQ", 3, 0, 1 << 63), "metadata keys"
    yield "key-length", head + struct.pack("<Q", 1 << 62) + bytes(8), "a metadata key is said to have"
    yield "value-length", head + text(b"a") + struct.pack("<IQ", 8, 1 << 62), "the value of 'a' is said to have"
    yield "array-length", head + text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 61), "entries in 'a'"
    yield "strings", head + text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 61), "entries in 'a'"
    yield "string-in-array", head + text(b"a") + struct.pack("<IIQQ", 9, 8, 1, 1 << 63), "behind the last byte"
    yield "nested", head + text(b"a") + struct.pack("<IIQ", 9, 9, 1) * 3, "array of the type 9"
    yield "type", head + text(b"a") + struct.pack("<I", 77), "unknown type 77"
    yield "utf-8", head + text(b"\xff\xfe") + struct.pack("<I", 4), "not UTF-8"
    yield "utf-8-entry", head + text(b"a") + struct.pack("<IIQ", 9, 8, 1) + text(b"\xff"), "not UTF-8"
    key = text(b"a") + struct.pack("<IB", 0, 1)
    yield "twice", struct.pack("<IQQ", 3, 0, 2) + key + key, "'a' stands in it twice"
    alignment = text(b"general.alignment") + struct.pack("<II", 4, 3)
    yield "alignment", head + alignment, "no power of two"
    split = text(b"split.count") + struct.pack("<IH", 2, 4)
    yield "split", head + split, "one of 4 parts; merge"

    def one(
        *, axes: int = 1, shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0, name: bytes = b"t"
    ) -> bytes:
        return text(name) + struct.pack(f"<I{len(shape)}QIQ", axes, *shape, kind, offset)

    def tensors(*entries: bytes) -> bytes:
        return struct.pack("<IQQ", 3, len(entries), 0) + b"".join(entries) + bytes(200)

    yield "no-axes", tensors(one(axes=0, shape=())), "0 axes"
    yield "many-axes", tensors(one(axes=1 << 30)), "1073741824 axes"
    yield "huge", tensors(one(axes=3, shape=(1 << 60, 1 << 60, 1 << 60))), "ends at byte"
    yield "offset", tensors(one(offset=1 << 62)), "ends at byte"
    yield "unaligned", tensors(one(offset=7)), "rows of 8 values at byte 7"
    yield "part-of-a-block", tensors(one(shape=(33,), kind=8)), "rows of 33 values"
    yield "tensor-twice", tensors(one(), one()), "'t' stands in it twice"
    yield "storage-type", tensors(one(kind=999)), "type 999"


@pytest.mark.parametrize(("content", "says"), [pytest.param(c, s, id=i) for i, c, s in forged()])
def test_forged_headers(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + content)
    tracemalloc.start()
    with pytest.raises(ArtifactError, match=says) as caught:
        read_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert peak < 4 << 20


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not a GGUF file"),
        (b"GGML", "is not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git-lfs pointer"),
    ],
)
def test_files_that_are_none(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=says):
        resolve(str(path))
