"""Every value of a JSON document replaced by what nobody expects there."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "minus one": -1,
    "a million": 1_000_000,
    "a billion": 1_000_000_000,
    "2^70": 2**70,
    "half": 0.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "empty string": "",
    "string": "8",
    "surrogate": "\ud800",
    "long string": "x" * 100_000,
    "list": [1, "a"],
    "empty list": [],
    "object": {"a": 1},
    "deep": nested(200),
}


def mutations(document: Any) -> Iterator[tuple[str, Any]]:
    """(what was done, the document with one value at any depth replaced or removed), the document's own copy."""
    for path in _paths(document):
        place = "/".join(map(str, path))
        for name, value in VALUES.items():
            changed = copy.deepcopy(document)
            parent = _parent(changed, path)
            parent[path[-1]] = value
            yield f"{place}={name}", changed
        changed = copy.deepcopy(document)
        del _parent(changed, path)[path[-1]]
        yield f"{place} removed", changed


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys and indices that lead to every value but the root; of a long list or object the first three."""
    if isinstance(value, Mapping):
        entries: list[tuple[Any, Any]] = list(value.items())
        entries = entries if len(entries) <= 64 else entries[:3]
    elif isinstance(value, list):
        entries = list(enumerate(value))[:3]
    else:
        return
    for key, child in entries:
        yield (*path, key)
        yield from _paths(child, (*path, key))


def _parent(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        document = document[key]
    return document
