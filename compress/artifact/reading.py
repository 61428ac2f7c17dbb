"""Small files from elsewhere, read with bounds: regular files, of a size that their kind can have, not nested deeply.

A config, an index, a manifest or a recipe may come from anybody. A pipe that never answers, /dev/zero, a gigabyte of
brackets: each is refused here, before memory or time is spent on it. `RefusedError` says why as a clause that goes on
from the file's name ("is not JSON (...)"); what to do next is for the caller, who knows what the file is.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import stat
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from compress.errors import ArtifactError

T = TypeVar("T")


MAX_JSON_BYTES = 16 << 20
"""Limit of config.json, an index, a manifest. Parsed, a hostile file takes some 25 times its size."""
MAX_YAML_BYTES = 1 << 20
"""Limit of a recipe: a model of 200 layers takes a quarter. PyYAML reads some 100 kB a second."""
MAX_DEPTH = 64
MAX_VALUES = 1 << 20
"""Values of a YAML document, aliases followed: nine lines of aliases stand for a billion."""

_LFS = b"version https://git-lfs"

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class RefusedError(ValueError):
    """Why a file is not taken, as a clause that follows its name."""


def open_regular(path: Path) -> int:
    """A descriptor of `path` for reading, links followed; never waits for the other end of a pipe.

    Raises RefusedError when it is not there, is a broken link or anything but a regular file, OSError when the
    operating system does not let us read it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        broken = os.path.islink(path)
        raise RefusedError(
            f"is a link to {os.readlink(path)!r}, which is not there" if broken else "is missing"
        ) from None
    except ValueError:
        raise RefusedError("has a null character in its name, and so cannot be there") from None
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, a device that has no driver
            raise RefusedError("is not a file but a socket or a device") from None
        if error.errno == errno.ELOOP:
            raise RefusedError("is a link that leads back to itself") from None
        raise
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise RefusedError(f"is not a file but {_KINDS.get(kind, 'something else')}")
    return descriptor


class _NotWaiting(io.FileIO):
    """Refuses where there is nothing to read yet: reading a file of the system such as /proc/kmsg gives None then."""

    def __init__(self, descriptor: int, path: Path) -> None:
        super().__init__(descriptor)
        self._path = path

    def readinto(self, buffer: Any) -> int:
        count: int | None = super().readinto(buffer)
        if count is None:
            raise ArtifactError(
                f"The file {shown(str(self._path), 4096)} has nothing to read yet and would be waited for, as files of "
                "the system are; give an ordinary file."
            )
        return count


def open_file(path: Path) -> io.BufferedReader:
    """The bytes of a regular file. Raises RefusedError and OSError, as `open_regular`; where a read would have to wait
    it raises ArtifactError."""
    return io.BufferedReader(_NotWaiting(open_regular(path), path))


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises RefusedError and OSError, as `open_regular`."""
    with open_file(path) as file:
        data = file.read(limit + 1)  # not st_size: files of /proc have none
    if len(data) > limit:
        raise RefusedError(f"has more than the {limit:,} bytes that such a file can need")
    return data


def fault_of(path: Path) -> str | None:
    """Why `path` is no regular file that we may read, as a clause that follows its name; None when it is one."""
    try:
        os.close(open_regular(path))
    except RefusedError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def read_json(path: Path, limit: int = MAX_JSON_BYTES, *, unique: bool = True, finite: bool = False) -> Any:
    """The value of a JSON file; options as of `parse_json`. Raises RefusedError and OSError."""
    return parse_json(read_bytes(path, limit), unique=unique, finite=finite)


def read_artefact_json(path: Path, kind: type[T], advice: str) -> T:
    """The list or object in a JSON file of an artifact. Raises ArtifactError, which ends with `advice`."""
    try:
        value = read_json(path, finite=True)
    except RefusedError as error:
        raise ArtifactError(f"{path} {error}; {advice}") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); {advice}") from error
    if not isinstance(value, kind):
        raise ArtifactError(f"{path} is not a JSON {'list' if kind is list else 'object'} but {shown(value)}; {advice}")
    return value


def parse_json(data: bytes, *, unique: bool = True, finite: bool = False) -> Any:
    """The value of a JSON document in UTF-8.

    Raises RefusedError when it is not one, or one that no honest program writes: a key twice in one object (where
    `unique`), values nested more than MAX_DEPTH deep, half a surrogate pair, which UTF-8 cannot hold; where `finite`,
    as our own files are, NaN or infinity.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique if unique else None)
    except UnicodeDecodeError as error:
        raise RefusedError(f"is not UTF-8 text (byte {data[error.start]:#04x} at offset {error.start})") from error
    except RecursionError as error:
        raise RefusedError(_TOO_DEEP) from error
    except RefusedError:
        raise
    except ValueError as error:  # also an integer of more digits than Python converts
        raise RefusedError(f"is not JSON ({error})") from error
    _check_values(value, finite)
    return value


def parse_yaml(text: str) -> Any:
    """The value of a YAML document of plain values: mappings, lists, strings, numbers, true, false and null.

    Dates stay strings. Raises RefusedError for other tags, a key twice, and what `parse_json` refuses.
    """
    try:
        value = yaml.load(text, Loader=_PlainLoader)
    except RecursionError as error:
        raise RefusedError(_TOO_DEEP) from error
    except yaml.YAMLError as error:
        # Its own message has the place on a line of its own, after what was being read.
        problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise RefusedError(f"is not YAML ({place}{problem or str(error).splitlines()[0]})") from error
    except (ValueError, LookupError) as error:  # `!!int abc`, `!!bool 7`: the constructors convert without a check
        raise RefusedError(f"is not YAML (a value does not have the type of its tag: {error})") from error
    _check_values(value)
    return value


_TOO_DEEP = f"has values nested more than {MAX_DEPTH} deep"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise RefusedError(f"has the key {twice!r} twice in one object")
    return found


def _check_values(value: Any, finite: bool = False) -> None:
    """Bound depth and number of values, and refuse strings that are not Unicode. Not recursive."""
    level, count = [value], 0
    for _ in range(MAX_DEPTH + 1):
        count += len(level)
        if count > MAX_VALUES:
            raise RefusedError(f"has more than {MAX_VALUES:,} values")
        deeper: list[Any] = []
        for entry in level:
            if isinstance(entry, str):
                _check_string(entry)
            elif isinstance(entry, float):
                if finite and not math.isfinite(entry):
                    raise RefusedError(f"has the number {entry}, which is not finite")
            elif isinstance(entry, Mapping):
                for key in entry:
                    if isinstance(key, str):
                        _check_string(key)
                deeper.extend(entry.values())
            elif isinstance(entry, list | tuple | set):
                deeper.extend(entry)
            if len(deeper) > MAX_VALUES:
                raise RefusedError(f"has more than {MAX_VALUES:,} values")
        if not deeper:
            return
        level = deeper
    raise RefusedError(_TOO_DEEP)


def _check_string(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RefusedError(
                f"has half a surrogate pair ({text[error.start]!a}), which is no character, in a string"
            ) from error


class _PlainLoader(yaml.SafeLoader):
    """The types of SafeLoader that a recipe can hold, and no mapping with a key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[Hashable] = set()
        if isinstance(node, yaml.MappingNode):
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, Hashable) and key in keys:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} twice", key_node.start_mark)
                if isinstance(key, Hashable):
                    keys.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> Any:
        if len(node.value) > 100 or ":" in node.value:  # 1:30 is ninety in YAML 1.1, in quadratic time
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value[:20]!r} is no number here; put a text in quotes", node.start_mark
            )
        convert = self.construct_yaml_int if node.tag.endswith(":int") else self.construct_yaml_float
        return convert(node)


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("bool", "int", "float", "null")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("bool", "null", "str", "seq", "map")
}
for _tag in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _PlainLoader.construct_number)


def shown(value: object, limit: int = 60) -> str:
    """A value for a message: its repr, cut where it is long, and without what a terminal would not print."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def reason(error: BaseException) -> str:
    """A library's message in one line without the full stop, or the name of the exception when it says nothing.

    Messages of several lines are joined ("Validation error for field 'hidden_size':" has its reason in the second),
    and cut after 300 characters.
    """
    lines = [line.strip() for line in str(error).splitlines()]
    text = " ".join(line for line in lines if line)
    text = text if len(text) <= 300 else text[:300].rsplit(" ", 1)[0] + " ..."
    return text.rstrip(".") or type(error).__name__


def refuse_pointer(path: Path) -> None:
    """Raise ArtifactError when `path` is what git writes in the place of a large file that git-lfs has not fetched."""
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ArtifactError(
                f"The file {path} is a git-lfs pointer, not the file itself: run `git lfs install` and `git lfs pull` "
                "in that folder, or download the model again."
            )
