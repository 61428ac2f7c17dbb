"""The header of a GGUF file: metadata and the table of tensors, parsed once a process, every count checked first.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The file is
untrusted: no length or count is believed before it is held against the bytes that are left, so that a forged header
costs neither memory nor time. Whatever does not add up is an ArtifactError (exit 5) that names the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from compress.artifact.reading import refuse_pointer
from compress.errors import ArtifactError
from compress.lazy import require

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where general.alignment is absent

# Type number -> struct format of the scalars; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# More than any model has, and few enough to be walked at once.
_MOST_KEYS = 1 << 16
_MOST_TENSORS = 1 << 20
_MOST_STRINGS = 1 << 22
_LONGEST_NAME = 1 << 16
_MOST_AXES = 4

# Keys that are read here or by transformers, the model's own aside -> what they hold where they are given.
_HELD: dict[str, str] = {
    **dict.fromkeys(("general.type", "general.name", "tokenizer.chat_template"), "a string"),
    **dict.fromkeys((f"tokenizer.ggml.{key}" for key in ("model", "pre")), "a string"),
    **dict.fromkeys(("general.alignment", "general.quantization_version", "split.count"), "a whole number"),
    **dict.fromkeys(
        (
            f"tokenizer.ggml.{key}_token_id"
            for key in ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "separator", "cls", "mask")
        ),
        "a whole number",
    ),
    **dict.fromkeys(
        (f"tokenizer.ggml.{key}" for key in ("add_bos_token", "add_eos_token", "add_space_prefix")), "true or false"
    ),
    **dict.fromkeys((f"tokenizer.ggml.{key}" for key in ("tokens", "merges")), "an array of strings"),
    **dict.fromkeys((f"tokenizer.ggml.{key}" for key in ("token_type", "eos_token_ids")), "an array of whole numbers"),
    "tokenizer.ggml.scores": "an array of numbers",
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` in PyTorch's order, number of its storage type, first byte in the file and bytes."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """`metadata`: key -> int, float, bool, str, list of str, or array of numbers. `tensors`: name -> where it is.

    Raises ArtifactError for a known key of another type than it can have. The model's own keys, under the name of its
    architecture, are `compress.source.gguf.config`'s.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def __post_init__(self) -> None:
        for key, wanted in _HELD.items():
            if key in self.metadata and not _holds(self.metadata[key], wanted):
                raise ArtifactError(
                    f"The GGUF file {self.path} has {key} = {self.metadata[key]!r:.100}, but {wanted} is needed; it is "
                    "damaged: download it again."
                )

    @property
    def architecture(self) -> str:
        """`general.architecture`, the prefix of the model's own keys; ArtifactError when the file has none."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str) or not name:
            raise ArtifactError(
                f"The GGUF file {self.path} has no general.architecture in its metadata, so nothing says what model "
                "it is; convert the model again."
            )
        return name


def _holds(value: Any, wanted: str) -> bool:
    """True if `value` is of the type that is `wanted`, in the words of `_HELD`. true is not a number."""
    if wanted == "a string":
        return isinstance(value, str)
    if wanted == "a whole number":
        return type(value) is int
    if wanted == "true or false":
        return isinstance(value, bool)
    if not isinstance(value, list | np.ndarray):
        return False
    if len(value) == 0:  # of whatever type: it holds nothing that could be misread
        return True
    if wanted == "an array of strings":
        return isinstance(value, list)
    kinds = "iu" if wanted == "an array of whole numbers" else "iuf"
    return isinstance(value, np.ndarray) and value.dtype.kind in kinds


def read_header(path: Path) -> GgufHeader:
    """The header of `path`, read once per process and version of the file.

    Raises ArtifactError when the file is no GGUF file of version 2 or 3, truncated, damaged, or one part of several.
    """
    stat = path.stat()
    return _read(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4)
def _read(path: Path, inode: int, size: int, mtime_ns: int) -> GgufHeader:
    """`read_header` under the file's identity, so that a changed file is read anew."""
    refuse_pointer(path)
    with path.open("rb") as file:
        start = file.read(4)
        if start != MAGIC:
            raise ArtifactError(
                f"The file {path} is not a GGUF file (it begins with {start!r}, not {MAGIC!r}); download it again."
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Parser(path, content).header()


class _Parser:
    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.end, self.at = path, content, len(content), 4

    def header(self) -> GgufHeader:
        (version,) = self._unpack("I", "the version")
        if version & 0xFFFF == 0:
            raise ArtifactError(
                f"The GGUF file {self.path} is big-endian (its version reads {version}); convert the model for a "
                "little-endian machine."
            )
        if version not in _VERSIONS:
            raise ArtifactError(
                f"The GGUF file {self.path} is of version {version}, and versions {_VERSIONS[0]} and {_VERSIONS[1]} "
                "are read; convert the model again with a recent llama.cpp."
            )
        tensors, keys = self._unpack("QQ", "the counts of tensors and keys")
        self._within(tensors, _MOST_TENSORS, 8 + 4 + 4 + 8, "tensors")
        self._within(keys, _MOST_KEYS, 8 + 4 + 1, "metadata keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._name("a metadata key")
            if key in metadata:
                raise self._damaged(f"the key {key!r} stands in it twice")
            (kind,) = self._unpack("I", f"the type of {key!r}")
            metadata[key] = self._value(key, kind)
        parts = metadata.get("split.count", 0)
        if type(parts) is int and parts > 1:
            raise ArtifactError(
                f"The GGUF file {self.path} is one of {parts} parts; merge them first: llama-gguf-split --merge "
                "FIRST-PART MERGED.gguf"
            )
        return GgufHeader(self.path, metadata, self._tensors(tensors, self._alignment(metadata)))

    def _value(self, key: str, kind: int) -> Any:
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind], f"the value of {key!r}")[0]
        if kind == _STRING:
            return self._text(f"the value of {key!r}", self.end)
        if kind != _ARRAY:
            raise self._damaged(f"the key {key!r} is of the unknown type {kind}")
        of, count = self._unpack("IQ", f"the length of {key!r}")
        if of == _STRING:
            self._within(count, _MOST_STRINGS, 8, f"entries in {key!r}")
            return self._strings(key, count)
        if of not in _SCALARS:
            raise self._damaged(f"the key {key!r} is an array of the type {of}, which is not read")
        width = struct.calcsize("<" + _SCALARS[of])
        self._within(count, self.end, width, f"entries in {key!r}")
        array = np.frombuffer(self.content, np.dtype(_SCALARS[of]).newbyteorder("<"), count, self.at).copy()
        self.at += width * count
        return array

    def _strings(self, key: str, count: int) -> list[str]:
        """An array of strings; the two lookups of the loop are all that a vocabulary of 280,000 tokens can afford."""
        unpack, content, at, end = struct.Struct("<Q").unpack_from, self.content, self.at, self.end
        found = []
        for _ in range(count):
            if at + 8 > end or (after := at + 8 + (length := unpack(content, at)[0])) > end:
                raise self._damaged(f"an entry of {key!r} ends behind the last byte")
            try:
                found.append(content[after - length : after].decode())
            except UnicodeDecodeError as error:
                raise self._damaged(f"entry {len(found)} of {key!r} is not UTF-8 ({error.reason})") from error
            at = after
        self.at = at
        return found

    def _tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        gguf = require("gguf", pip="'gguf>=0.17'", purpose="read GGUF files")
        sizes: dict[int, tuple[int, int]] = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._name("the name of a tensor")
            if name in entries:
                raise self._damaged(f"the tensor {name!r} stands in it twice")
            (axes,) = self._unpack("I", f"the shape of {name!r}")
            if not 1 <= axes <= _MOST_AXES:
                raise self._damaged(f"the tensor {name!r} has {axes} axes")
            shape = self._unpack(f"{axes}Q", f"the shape of {name!r}")
            kind, offset = self._unpack("IQ", f"the place of {name!r}")
            entries[name] = (tuple(reversed(shape)), kind, offset)
        start = -(-self.at // alignment) * alignment
        tensors = {}
        for name, (shape, kind, offset) in entries.items():
            if kind not in sizes:
                raise ArtifactError(
                    f"The tensor {name!r} in {self.path} is stored as type {kind}, which this version of gguf "
                    "does not know; update it (pip install --upgrade gguf), or convert the model to another type "
                    "such as Q8_0."
                )
            block, size = sizes[kind]
            if shape[-1] % block or offset % alignment:
                raise self._damaged(f"the tensor {name!r} has rows of {shape[-1]} values at byte {offset}")
            extent = math.prod(shape) // block * size
            if start + offset + extent > self.end:
                raise self._damaged(
                    f"the tensor {name!r} ends at byte {start + offset + extent:,}, the file at {self.end:,}"
                )
            tensors[name] = GgufTensor(name, shape, kind, start + offset, extent)
        return tensors

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r}, which is no power of two")
        return alignment

    def _name(self, what: str) -> str:
        return self._text(what, _LONGEST_NAME)

    def _text(self, what: str, longest: int) -> str:
        (length,) = self._unpack("Q", what)
        if length > min(longest, self.end - self.at):
            raise self._damaged(f"{what} is said to have {length:,} bytes, and {self.end - self.at:,} are left")
        self.at += length
        try:
            return self.content[self.at - length : self.at].decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is not UTF-8 ({error.reason})") from error

    def _unpack(self, form: str, what: str) -> tuple[Any, ...]:
        size = struct.calcsize("<" + form)
        if self.at + size > self.end:
            raise self._damaged(f"it ends before {what}")
        self.at += size
        return struct.unpack_from("<" + form, self.content, self.at - size)

    def _within(self, count: int, most: int, least: int, what: str) -> None:
        """Refuse a count of things of `least` bytes each that cannot be there."""
        if count > min(most, (self.end - self.at) // least):
            raise self._damaged(f"it is said to have {count:,} {what}, and {self.end - self.at:,} bytes are left")

    def _damaged(self, why: str) -> ArtifactError:
        return ArtifactError(
            f"The GGUF file {self.path} cannot be read ({why}); it is truncated or damaged: download it again."
        )
