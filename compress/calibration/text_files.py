"""Text files of any size, read as far as they are used: a row at a time, or the beginning of a long one.

A corpus of gigabytes costs one pass that finds where its lines begin, and 8 bytes of memory for each; a line is
decoded and checked when its row is asked for, the first ones at once.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import os
import re
import tempfile
import zlib
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, overload

from compress.artifact.files import sha256_of_open
from compress.artifact.reading import RefusedError, open_file, shown
from compress.errors import ArtifactError, UsageError
from compress.progress import log

_CHUNK = 1 << 20
_CHECKED_ROWS = 1000
_LONGEST_LINE = 256 << 20
MOST_BYTES = 64 << 30
"""Limit of a text, packed or not: what is longer, probably a file with holes, takes hours to read and to hash."""
MOST_ROWS = 1 << 25
_MOST_UNPACKED = 200
"""Times its size that a gzip file may unpack to; text comes to 10, a file of zeros to 1,000."""

_HALF_PAIR = re.compile("[\ud800-\udfff]")
_LINE_FEED, _SPACE = re.compile(rb"\n"), re.compile(rb"\s*")


def open_text(path: Path) -> IO[bytes]:
    """The bytes of a text file, unpacked into a nameless temporary file where its name ends in .gz; seekable.

    Raises UsageError when there is no such file or it has more than MOST_BYTES, ArtifactError when it is not a
    complete gzip file.
    """
    file = _opened(path)
    if path.suffix != ".gz":
        return file
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    with file, gzip.GzipFile(fileobj=file) as packed:
        most = max(64 << 20, _MOST_UNPACKED * os.fstat(file.fileno()).st_size)
        try:
            while chunk := packed.read(_CHUNK):
                unpacked.write(chunk)
                if unpacked.tell() > MOST_BYTES:
                    raise _too_long(path)
                if unpacked.tell() > most:
                    raise ArtifactError(
                        f"{str(path)!r} unpacks to more than {_MOST_UNPACKED} times its size, which no text does; "
                        "if it is one, unpack it with gunzip and give the result"
                    )
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ArtifactError(f"{str(path)!r} is not a complete gzip file ({error})") from error
    unpacked.seek(0)
    return unpacked


def look_for_file(path: Path) -> None:
    """Raise UsageError when there is no such file, or it cannot be one of text; nothing is read."""
    _opened(path).close()


def text_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes as they are. Raises UsageError as `open_text`."""
    with _opened(path) as file:
        return sha256_of_open(file)


def _opened(path: Path) -> IO[bytes]:
    try:
        file = open_file(path)
    except RefusedError as error:
        raise UsageError(f"the text file {str(path)!r} {error}; check the path") from error
    if os.fstat(file.fileno()).st_size > MOST_BYTES:
        file.close()
        raise _too_long(path)
    return file


def _too_long(path: Path) -> UsageError:
    return UsageError(
        f"the text file {str(path)!r} has more than {MOST_BYTES >> 30} GiB, and all of it would be read; give a part "
        "of it (head -c 100M FILE)"
    )


class Rows(Sequence[str]):
    """Rows of text that are read when they are asked for. Raises ArtifactError for a row that is no text."""

    @abstractmethod
    def row(self, index: int) -> str:
        """Row `index`, from 0."""

    def beginning(self, index: int, characters: int) -> tuple[str, bool]:
        """The first `characters` of a row, and whether that is all of it."""
        row = self.row(index)
        return row[:characters], len(row) <= characters

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self.row(i) for i in range(*index.indices(len(self))))
        return self.row(range(len(self))[index])


class WholeFile(Rows):
    """One row: a UTF-8 file as it is, without its byte order mark."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, open_text(path)
        self.beginning(0, _CHUNK)

    def __len__(self) -> int:
        return 1

    def row(self, index: int) -> str:
        return "".join(self._pieces())

    def beginning(self, index: int, characters: int) -> tuple[str, bool]:
        parts: list[str] = []
        length = 0
        for piece in self._pieces():
            if length + len(piece) > characters:
                return "".join((*parts, piece[: characters - length])), False
            parts.append(piece)
            length += len(piece)
        return "".join(parts), True

    def is_blank(self) -> bool:
        """True if the first 64 MiB are white space only."""
        return not any(piece.strip() for piece in islice(self._pieces(), 64))

    def sha256(self) -> str:
        """SHA-256 of the text in UTF-8."""
        digest = hashlib.sha256()
        for piece in self._pieces():
            digest.update(piece.encode())
        return digest.hexdigest()

    def _pieces(self) -> Iterator[str]:
        """The text in pieces of at most a chunk."""
        decoder, at = codecs.getincrementaldecoder("utf-8-sig")(), 0
        self._file.seek(0)
        while True:
            self._file.seek(at)
            chunk = self._file.read(_CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                piece = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(self._path, error, at - pending) from error
            if piece:
                yield piece
            if not chunk:
                return
            at += len(chunk)


class Lines(Rows):
    """One row for each line of a file; lines end with a line feed and nothing else."""

    def __init__(self, path: Path, *, blank: bool) -> None:
        """`blank`: whether lines of white space are rows too."""
        self._path, self._file = path, open_text(path)
        self._at = array("Q")
        start = len(codecs.BOM_UTF8) if self._file.read(3) == codecs.BOM_UTF8 else 0
        for at in _beginnings(self._file, start) if blank else _beginnings_of_text(self._file, start):
            if len(self) == MOST_ROWS:
                raise UsageError(
                    f"the text file {str(path)!r} has more than {MOST_ROWS:,} lines; give a part of it "
                    "(head -n 1000000 FILE)"
                )
            self._at.append(at)
            if len(self) <= _CHECKED_ROWS:
                self.row(len(self) - 1)

    def __len__(self) -> int:
        return len(self._at)

    def number(self, index: int) -> int:
        """The line of a row in the file, from 1: what stands before it is read to count it."""
        number, end = 1, self._at[index]
        for at, chunk in _chunks(self._file, 0):
            number += chunk.count(b"\n", 0, max(0, end - at))
            if at + len(chunk) >= end:
                break
        return number

    def line(self, index: int) -> bytes:
        """The line as it is in the file, its line feed included."""
        self._file.seek(self._at[index])
        line = self._file.readline(_LONGEST_LINE + 1)
        if len(line) > _LONGEST_LINE:
            raise ArtifactError(
                f"line {self.number(index):,} of {str(self._path)!r} has more than {_LONGEST_LINE:,} bytes; is it a "
                "file of lines?"
            )
        return line


class WikitextLines(Lines):
    """The hub's rows of a file in WikiText's raw layout: each line with its newline, a blank line as ''."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, blank=True)

    def row(self, index: int) -> str:
        try:
            line = self.line(index).decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(self._path, error, self._at[index]) from error
        return f"{line.removesuffix(chr(10))}\n" if line.strip() else ""

    def beginning(self, index: int, characters: int) -> tuple[str, bool]:
        self._file.seek(self._at[index])
        part = self._file.readline(4 * (characters + 1))  # UTF-8 takes 4 bytes at most
        try:
            text = codecs.getincrementaldecoder("utf-8")().decode(part)
        except UnicodeDecodeError as error:
            raise _not_utf8(self._path, error, self._at[index]) from error
        if len(text) > characters and text[:characters].strip():  # else it may be blank, or the whole of it
            return text[:characters], False
        return super().beginning(index, characters)


class JsonTexts(Lines):
    """The field `text` of each line's JSON object. Half a surrogate pair, which text from the web has where it was cut
    in UTF-16, becomes U+FFFD, and the first one is logged."""

    def __init__(self, path: Path) -> None:
        self._told = False
        super().__init__(path, blank=False)

    def row(self, index: int) -> str:
        try:
            entry = json.loads(self.line(index))
        except (ValueError, RecursionError) as error:
            raise _not_json(self.number(index), self._path, error) from error
        text = entry.get("text") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise ArtifactError(
                f"entry {index + 1} of {str(self._path)!r} (line {self.number(index)}) is not an object with a string "
                f"`text` but {shown(entry)}"
            )
        if text.isascii() or not (half := _HALF_PAIR.search(text)):
            return text
        if not self._told:
            self._told = True
            log(
                f"warning: line {self.number(index)} of {str(self._path)!r} has half a surrogate pair "
                f"({half[0]!a}), which is no character: it is read as U+FFFD, as are others"
            )
        return _HALF_PAIR.sub("\ufffd", text)


def json_lines(path: Path) -> Iterator[Any]:
    """The values of a JSON-lines file, gzipped or not. Raises UsageError, and ArtifactError naming the line."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise _not_json(number, path, error) from error


def _beginnings(file: IO[bytes], start: int) -> Iterator[int]:
    """Where each line begins. The file may be read elsewhere in the meantime."""
    begins = True
    for at, chunk in _chunks(file, start):
        if begins:
            yield at
        yield from (at + feed.end() for feed in _LINE_FEED.finditer(chunk) if feed.end() < len(chunk))
        begins = chunk.endswith(b"\n")


def _beginnings_of_text(file: IO[bytes], start: int) -> Iterator[int]:
    """Where each line begins that is more than white space. Blank lines are passed over many at a time."""
    line, within = start, False
    for at, chunk in _chunks(file, start):
        here = 0
        while here < len(chunk):
            if within:
                feed = chunk.find(b"\n", here)
                if feed < 0:
                    break
                here, line, within = feed + 1, at + feed + 1, False
            space = _SPACE.match(chunk, here)
            end = here if space is None else space.end()
            feed = chunk.rfind(b"\n", here, end)
            line = line if feed < 0 else at + feed + 1
            here = end
            if here < len(chunk):
                yield line
                within = True


def _chunks(file: IO[bytes], at: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) from the offset `at` to the end of the file."""
    while True:
        file.seek(at)
        chunk = file.read(_CHUNK)
        if not chunk:
            return
        yield at, chunk
        at += len(chunk)


def _not_json(number: int, path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"line {number} of {str(path)!r} is not JSON ({error})")


def _not_utf8(path: Path, error: UnicodeDecodeError, offset: int) -> ArtifactError:
    return ArtifactError(
        f"{str(path)!r} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset {offset + error.start}; "
        "convert it with iconv"
    )
