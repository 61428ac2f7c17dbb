"""Text from the web, whatever it holds: any bytes and any JSON give a text that UTF-8 can hold, or a sentence."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from compress.artifact.reading import _NotWaiting
from compress.calibration import text_files as textfiles
from compress.calibration.text import TextData, load_text
from compress.calibration.text_files import Lines
from compress.calibration.tokens import token_sequences
from compress.errors import ArtifactError, MissingDependencyError, ProcrustesError, UsageError
from tests import tiny
from validate.perplexity.windows import make_windows
from validate.tasks.data import TASKS

quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)
"""Half surrogate pairs included, as JSON can hold them."""
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT | st.just("text"), inner, max_size=3),
    max_leaves=6,
)
NAMES = ["a.txt", "a.jsonl", "a.jsonl.gz", "wikitext:a.raw"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


def outcome(folder: Path, name: str, content: bytes) -> TextData | ProcrustesError:
    """What `load_text` makes of a file, every row of it read; its error when that is one for the user."""
    path = folder / name.removeprefix("wikitext:")
    path.write_bytes(content)
    given_name = f"{name[: -len(path.name)]}{path}"
    try:
        data = load_text(given_name)
        data.text().encode()
    except (UsageError, ArtifactError) as error:
        message = str(error)
        assert str(path) in message
        assert len(message) < 500 + len(str(path))
        assert message.isprintable()
        return error
    return data


def used(data: TextData, tokenizer: Any) -> None:
    """A text that was read can be hashed, cut and tokenised."""
    text = data.text()
    assert data.sha256 == hashlib.sha256(text.encode()).hexdigest()
    for characters in (1, 7, len(text), len(text) + 1):
        part, whole = data.beginning(characters)
        assert part == text[:characters]
        assert whole == (len(text) <= characters)
    try:
        tokens = token_sequences(data, tokenizer, samples=1, length=2, seed=0, vocab_size=tiny.VOCAB_SIZE)
        windows = make_windows(data, tokenizer, length=2, max_windows=1, vocab_size=tiny.VOCAB_SIZE)
    except UsageError as error:
        assert "token" in str(error)  # noqa: PT017 (too short is right as well)
    else:
        assert tokens.shape == (1, 2)
        assert windows.count == 1


@quick
@given(content=st.binary(max_size=60), name=st.sampled_from(NAMES), packed=st.booleans())
def test_any_bytes(content: bytes, name: str, packed: bool, tmp_path: Path, tokenizer: Any) -> None:
    data = outcome(tmp_path, name, gzip.compress(content) if packed and name.endswith("gz") else content)
    if isinstance(data, TextData):
        used(data, tokenizer)


@quick
@given(content=ANY_TEXT, name=st.sampled_from(NAMES))
@example(content="0\n\r", name="wikitext:a.raw")  # it ends where the last row, an empty one, begins
@example(content="\n0", name="wikitext:a.raw")  # the beginning ends inside of what separates rows
def test_any_text(content: str, name: str, tmp_path: Path, tokenizer: Any) -> None:
    data = outcome(tmp_path, name, content.encode("utf-8", "surrogatepass"))
    if isinstance(data, TextData):
        used(data, tokenizer)


@quick
@given(value=ANY_JSON, ascii_only=st.booleans())
def test_any_json(value: Any, ascii_only: bool, tmp_path: Path, tokenizer: Any) -> None:
    line = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    data = outcome(tmp_path, "a.jsonl", line + b"\n")
    text = value.get("text") if isinstance(value, dict) else None
    assert isinstance(data, TextData) == (isinstance(text, str) and bool(text.strip()))
    if isinstance(data, TextData):
        used(data, tokenizer)


@quick
@given(texts=st.lists(ANY_TEXT.filter(str.strip), min_size=1, max_size=5))
def test_web_text_is_read_with_its_halves_replaced(texts: list[str], tmp_path: Path) -> None:
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    data = outcome(tmp_path, "a.jsonl", content.encode())
    assert isinstance(data, TextData)
    # Two halves that belong together are one character for a JSON reader.
    whole = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    assert [len(row) for row in data.rows] == [len(text) for text in whole]
    assert all((row == text) or "\ufffd" in row for row, text in zip(data.rows, whole, strict=True))


def test_half_a_surrogate_pair_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What JavaScript leaves of an emoji where it cuts a text."""
    lines = [{"text": "fine \ud83d\ude00"}, {"text": "cut \ud83d"}, {"text": "\udc00 cut"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = load_text(str(tmp_path / "a.jsonl"))
    assert data.text() == "fine \U0001f600\n\ncut \ufffd\n\n\ufffd cut"
    assert capsys.readouterr().err.count("line 2 of") == 1


@quick
@given(content=st.binary(max_size=40), number=st.integers(-2, 50), length=st.integers(0, 9))
def test_sizes_that_do_not_fit(content: bytes, number: int, length: int, tmp_path: Path, tokenizer: Any) -> None:
    data = TextData("x", (content.decode("latin-1"),), "")
    for cut in (
        lambda: token_sequences(data, tokenizer, samples=number, length=length, seed=0, vocab_size=320),
        lambda: make_windows(data, tokenizer, length=length, stride=number, max_windows=number, vocab_size=320),
    ):
        try:
            cut()
        except UsageError as error:
            assert str(error).isprintable()  # noqa: PT017 (either outcome is right)


@quick
@given(record=st.dictionaries(st.sampled_from(["text", "goal", "label", "request"]), ANY_JSON, max_size=4))
def test_a_record_that_is_no_example(record: dict[str, Any]) -> None:
    """The package's files are held against their hashes, so that this is the record of a newer version at most."""
    for task in TASKS.values():
        with pytest.raises(ArtifactError, match=f"record 3 of the task {task.name}"):
            task.read(record, 3)


def test_a_long_text_is_read_as_far_as_it_is_used(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    """8 MB of text for 64 tokens: neither read nor tokenised as a whole."""
    path = tmp_path / "long.txt"
    path.write_text(tiny.TEXT * 4000)
    seen: list[int] = []

    def counting(text: str, **options: Any) -> Any:
        seen.append(len(text))
        return tokenizer(text, **options)

    monkeypatch.setattr("compress.calibration.tokens.CHARACTERS", 1 << 12)
    monkeypatch.setattr("validate.perplexity.windows.CHARACTERS", 1 << 12)
    data = load_text(str(path))
    tokens = token_sequences(data, counting, samples=2, length=32, seed=0, vocab_size=320)  # type: ignore[arg-type]
    windows = make_windows(data, counting, length=32, max_windows=2, vocab_size=320)
    expected = tokenizer(tiny.TEXT * 2)["input_ids"][:64]
    assert tokens.flatten().tolist() == expected
    assert windows.ids[:64].tolist() == expected
    assert not windows.whole
    assert max(seen) <= (1 << 12) + 2
    assert data.rows.beginning(0, 10) == (tiny.TEXT[:10], False)  # type: ignore[attr-defined]


def test_long_runs_of_one_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer whose tokens are longer than the estimate: more of the text is read until there are enough."""
    monkeypatch.setattr("compress.calibration.tokens.CHARACTERS", 64)
    (tmp_path / "a.txt").write_text("a" * 100_000)
    pairs = [0]

    def hundreds(text: str, **options: Any) -> dict[str, list[int]]:
        pairs.append(len(text))
        return {"input_ids": [1] * (len(text) // 100)}

    data = load_text(str(tmp_path / "a.txt"))
    tokens = token_sequences(data, hundreds, samples=1, length=9, seed=0, vocab_size=2)  # type: ignore[arg-type]
    assert tokens.shape == (1, 9)
    assert 1 < len(pairs) < 6
    assert max(pairs) < 10_000
    with pytest.raises(UsageError, match="1,000 tokens"):
        token_sequences(data, hundreds, samples=1, length=2000, seed=0, vocab_size=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file(name: str, tmp_path: Path) -> None:
    """A pipe that nobody writes to, a device, a folder, a broken link: none is waited for."""
    plain = name.removeprefix("wikitext:")
    given_name = name.replace(plain, str(tmp_path / plain))
    os.mkfifo(tmp_path / plain)
    with pytest.raises(UsageError, match="is not a file but a pipe"):
        load_text(given_name)
    for target, says in (("/dev/zero", "a device"), ("nowhere", "a link to 'nowhere'"), (".", "a folder")):
        (tmp_path / plain).unlink()
        (tmp_path / plain).symlink_to(target)
        with pytest.raises(UsageError, match=says):
            load_text(given_name)


@pytest.mark.parametrize("name", NAMES)
def test_one_long_line_is_tokenised_as_far_as_it_is_used(name: str, tmp_path: Path, tokenizer: Any) -> None:
    """2 MB in one line, of which a tokenizer would make half a gigabyte."""
    line = tiny.TEXT.replace("\n", " ") * 1000
    content = (json.dumps({"text": line}) if "json" in name else line).encode()
    path = tmp_path / name.removeprefix("wikitext:")
    path.write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    seen: list[int] = []

    def counting(text: str, **options: Any) -> Any:
        seen.append(len(text))
        return tokenizer(text, **options)

    data = load_text(name.replace(path.name, str(path)))
    tokens = token_sequences(data, counting, samples=2, length=32, seed=0, vocab_size=320)  # type: ignore[arg-type]
    windows = make_windows(data, counting, length=32, max_windows=2, vocab_size=320)
    expected = tokenizer(line[:2000])["input_ids"][:64]
    assert tokens.flatten().tolist() == expected
    assert windows.ids[:64].tolist() == expected
    assert max(seen) <= 1 << 16


def test_a_tokenizer_that_takes_a_whole_line_for_one_token(tmp_path: Path) -> None:
    """An unknown word of 4 MB: refused long before all of it is tokenised."""
    (tmp_path / "a.txt").write_text("x" * (4 << 20))
    seen: list[int] = []

    def one(text: str, **options: Any) -> dict[str, list[int]]:
        seen.append(len(text))
        return {"input_ids": [1]}

    data = load_text(str(tmp_path / "a.txt"))
    with pytest.raises(UsageError, match=r"the calibration text .* give 1 tokens, and 64 are needed"):
        token_sequences(data, one, samples=2, length=32, seed=0, vocab_size=320)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"the text .* give 1 tokens, and 64 are needed"):
        make_windows(data, one, length=32, max_windows=2, vocab_size=320)
    assert max(seen) < 1 << 20


def test_a_whole_text_that_memory_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer without memory ends the process: told before it is called."""
    (tmp_path / "a.txt").write_text("x" * 1000)
    monkeypatch.setattr("validate.perplexity.windows.free_memory", lambda: 200_000)
    with pytest.raises(MissingDependencyError, match=r"1,000 characters of .*a\.txt.* --max-windows"):
        make_windows(load_text(str(tmp_path / "a.txt")), None, length=32)


BLANK = st.sampled_from([b"", b" ", b"\r", b"\t \x0b\x0c", b"   "])


@quick
@given(
    lines=st.lists(BLANK | st.sampled_from([b"a", b" b ", b"\xc2\xa0"]), max_size=12), end=st.sampled_from([b"", b"\n"])
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_the_lines_of_a_file(
    lines: list[bytes], end: bytes, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in pieces of any size, blank lines passed over or not."""
    monkeypatch.setattr("compress.calibration.text_files._CHUNK", chunk)

    class Plain(Lines):
        def row(self, index: int) -> str:
            return self.line(index).decode()

    path = tmp_path / "a"
    path.write_bytes(b"\n".join(lines) + end)
    expected = [(number, line) for number, line in enumerate(path.open("rb"), start=1)]
    for blank in (True, False):
        found = Plain(path, blank=blank)
        assert [(found.number(i), found.line(i)) for i in range(len(found))] == [
            (number, line) for number, line in expected if blank or line.strip()
        ]


def test_blank_lines_are_passed_over_many_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of text after four million blank ones, and not one step for each of these."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" * (4 << 20) + b'{"text": 5}\n')
    steps = 0
    real = textfiles._SPACE

    class Counting:
        def match(self, *arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            return real.match(*arguments)

    monkeypatch.setattr(textfiles, "_SPACE", Counting())
    with pytest.raises(ArtifactError, match=r"entry 1 of .* \(line 4194305\)"):
        load_text(str(path))
    assert 0 < steps < 20


def test_rows_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines beyond number, and lines of white space in JSON, are told before all of them are gone through."""
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n' * 50)
    monkeypatch.setattr("compress.calibration.text.LOOKED_AT", 49)
    with pytest.raises(UsageError, match="is empty: its first 49 rows are white space"):
        load_text(str(tmp_path / "a.jsonl"))
    monkeypatch.setattr("compress.calibration.text_files.MOST_ROWS", 49)
    with pytest.raises(UsageError, match="more than 49 lines"):
        load_text(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_terabytes(name: str, tmp_path: Path) -> None:
    """A terabyte of holes is neither read nor hashed."""
    path = tmp_path / name.removeprefix("wikitext:")
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(UsageError, match="more than 64 GiB"):
        load_text(name.replace(path.name, str(path)))
    with pytest.raises(UsageError, match="more than 64 GiB"):
        textfiles.text_sha256(path)


def test_what_would_be_waited_for(tmp_path: Path) -> None:
    """/proc/kmsg is a regular file, and reading it gives nothing until the kernel says something."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    try:
        file = io.BufferedReader(_NotWaiting(reading, Path("kmsg.txt")))
        os.write(writing, b"one line\n")
        assert file.read1(100) == b"one line\n"
        with pytest.raises(ArtifactError, match=r"kmsg\.txt' has nothing to read yet"):
            file.read(100)
    finally:
        os.close(writing)
        file.close()
