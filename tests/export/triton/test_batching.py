"""Requests answered together: text, stops, sampling, cancellation, errors; all through a real model in ONNX Runtime."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from compress.errors import UsageError
from export.runtime.ort import OrtExecutor, OrtRunner
from export.runtime.slots import Slots
from export.triton.batching import DEAD, ENGINE_FAILED, Batcher
from export.triton.failures import A_BUG
from export.triton.settings import Settings, parse_messages
from export.triton.text import TextStream
from tests.export.cases import Case, export, kron
from tests.export.helpers import llama
from tests.export.triton.clients import Client

ALPHABET = "abcdefghijklmnopqrstuvwxyz .,ABCDEFGHIJKLMNOPQRSTUVWXYZ012345é"


class Letters:
    """A tokenizer of single characters, but for é, which is the tokens 59 and 60 together."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        text = "".join("\ufffd" if t >= 59 else ALPHABET[t] for t in token_ids)
        pairs = [(token_ids[i], token_ids[i + 1]) for i in range(len(token_ids) - 1)]
        return text.replace("\ufffd\ufffd", "é") if (59, 60) in pairs else text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(Case(llama(max_positions=160), kron("explicit")), tmp_path_factory.mktemp("model"))[1].path


@pytest.fixture
def batcher(model: Path) -> Iterator[Batcher]:
    made = Batcher(Slots(OrtExecutor(model), 4), Letters(), ends=[2])
    yield made
    made.close()


def ask(batcher: Batcher, ids: Sequence[int], **settings: object) -> Client:
    client = Client()
    batcher.submit(ids, Settings(**settings), client)  # type: ignore[arg-type]
    return client


def test_many_clients_get_what_each_gets_alone(batcher: Batcher, model: Path) -> None:
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 59, random.integers(1, 30)).tolist() for _ in range(16)]
    lengths = [int(n) for n in random.integers(1, 40, 16)]
    clients = [ask(batcher, ids, max_tokens=n) for ids, n in zip(prompts, lengths, strict=True)]
    for client, ids, length in zip(clients, prompts, lengths, strict=True):
        client.wait()
        (expected,) = OrtRunner(model).generate([ids], max_new_tokens=length, eos=[2])
        assert client.tokens == expected
        assert client.finish == ("stop" if expected[-1] == 2 else "length")
    assert batcher.steps < sum(lengths)  # they were decoded together


def test_sampling_is_seeded_and_independent_of_company(batcher: Batcher) -> None:
    options = {"max_tokens": 20, "temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 7}
    alone = ask(batcher, [5, 6, 7], **options).wait().tokens
    clients = [ask(batcher, [5, 6, 7], **options), *(ask(batcher, [9], max_tokens=30) for _ in range(5))]
    assert clients[0].wait().tokens == alone
    assert all(client.wait().finish for client in clients)
    assert ask(batcher, [5, 6, 7], **{**options, "seed": 8}).wait().tokens != alone


def test_repetition_penalty_and_min_tokens(batcher: Batcher, model: Path) -> None:
    plain = ask(batcher, [5, 6, 7], max_tokens=30).wait().tokens
    steered = ask(batcher, [5, 6, 7], max_tokens=30, repetition_penalty=5.0).wait().tokens
    assert len(set(steered)) > len(set(plain))
    ends = Batcher(Slots(OrtExecutor(model), 1), Letters(), ends=[plain[3]])
    try:
        assert ask(ends, [5, 6, 7], max_tokens=30).wait().tokens == plain[: plain.index(plain[3]) + 1]
        late = ask(ends, [5, 6, 7], max_tokens=30, min_tokens=12).wait().tokens
        assert plain[3] not in late[:12]
    finally:
        ends.close()


def test_frequency_and_presence_penalties(batcher: Batcher) -> None:
    """Against greedy decoding by hand: n frequency + presence off the logit of what the answer has n times already."""
    ids, plain = [5, 6, 7], ask(batcher, [5, 6, 7], max_tokens=30).wait().tokens
    assert len(set(plain)) < len(plain)
    for frequency, presence in ((0.7, 0.0), (0.0, 1.5), (-1.0, 0.3), (2.0, 2.0)):
        options = {"frequency_penalty": frequency, "presence_penalty": presence}
        found = ask(batcher, ids, max_tokens=20, **options).wait().tokens
        made = list[int]()
        for _ in found:
            (step,) = ask(batcher, ids + made, max_tokens=1, logprobs=20).wait().pieces
            values = {t: p - made.count(t) * frequency - (t in made) * presence for t, p in step.likeliest[0].items()}
            made.append(max(values, key=lambda token: values[token]))
        assert found == made
    assert found != plain


def test_log_probabilities_are_those_of_the_model(batcher: Batcher, model: Path) -> None:
    client = ask(batcher, [5, 6, 7], max_tokens=4, logprobs=3, temperature=2.0, seed=1).wait()
    ids = np.array([[5, 6, 7, *client.tokens]])
    logits = OrtRunner(model).run_full(ids)[0, 2:-1].astype(np.float64)
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for piece, row in zip(client.pieces, log, strict=True):
        assert piece.logprobs[0] == pytest.approx(row[piece.tokens[0]], abs=1e-4)
        assert list(piece.likeliest[0]) == np.argsort(-row)[:3].tolist()


def test_stop_strings_end_the_answer_before_them(batcher: Batcher) -> None:
    whole = ask(batcher, [5, 6, 7], max_tokens=30).wait().text
    stop = whole[6:9]
    client = ask(batcher, [5, 6, 7], max_tokens=30, stop=(stop,)).wait()
    assert client.text == whole[: whole.index(stop)]
    assert client.finish == "stop"


def test_cancellation_frees_the_row(model: Path) -> None:
    batcher = Batcher(Slots(OrtExecutor(model), 1), Letters(), ends=[])
    try:
        leaving, staying = Client(leave_after=3), Client()
        batcher.submit([5], Settings(max_tokens=150), leaving)
        batcher.submit([6], Settings(max_tokens=5), staying)
        assert leaving.wait().finish == "cancelled"
        assert len(leaving.pieces) == 4
        assert len(staying.wait().tokens) == 5
    finally:
        batcher.close()


@pytest.mark.parametrize(
    ("ids", "max_tokens", "message"),
    [
        ([], 1, "the prompt is empty"),
        ([1] * 161, 1, "the prompt has 161 tokens; this model takes at most 160"),
        ([1] * 100, 61, "together they may be at most 160"),
        ([1, 61], 1, "a token that this model lacks: number 61 of 61"),
        ([-1], 1, "a token that this model lacks"),
    ],
)
def test_prompts_that_cannot_be_answered(batcher: Batcher, ids: list[int], max_tokens: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ask(batcher, ids, max_tokens=max_tokens)
    assert len(ask(batcher, [1], max_tokens=2).wait().tokens) <= 2  # and it lives on


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be 1"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens must be 0 to max_tokens"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be"),
        ({"stop": ("",)}, "must not be empty"),
        ({"stop": ("x",) * 17}, "at most 16 stop strings"),
        ({"logprobs": 21}, "logprobs must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings(**settings)  # type: ignore[arg-type]


class Broken(Slots):
    """An engine that fails at its fifth step."""

    calls = 0

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        self.calls += 1
        if self.calls == 5:
            raise RuntimeError("out of memory")
        return super().step(tokens)


def test_a_failing_step_is_told_and_the_next_request_is_answered(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batcher = Batcher(Broken(OrtExecutor(model), 2), Letters(), ends=[])
    try:
        clients = [ask(batcher, [5], max_tokens=20), ask(batcher, [6], max_tokens=20)]
        assert {client.wait().finish for client in clients} == {"error"}
        assert clients[0].pieces[-1].error == ENGINE_FAILED
        assert "out of memory" in capsys.readouterr().err  # for the operator
        assert len(ask(batcher, [5], max_tokens=20).wait().tokens) == 20
    finally:
        batcher.close()


class Buggy(Slots):
    """An engine with a defect that nobody thought of, which shows once both clients are there."""

    both = threading.Event()

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        assert self.both.wait(60)
        raise KeyError("a bug")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_ever_when_the_thread_fails(model: Path) -> None:
    batcher = Batcher(Buggy(OrtExecutor(model), 1), Letters(), ends=[])
    clients = [ask(batcher, [5], max_tokens=20), ask(batcher, [6], max_tokens=20)]
    Buggy.both.set()
    assert [client.wait().finish for client in clients] == ["error", "error"]
    assert {client.pieces[-1].error for client in clients} == {DEAD}
    batcher.join()  # its exception would otherwise be told in the next test
    assert batcher.failed
    with pytest.raises(UsageError, match="is about to be started again"):
        ask(batcher, [7])


class Unreadable(Slots):
    """An engine with a defect that shows while a prompt is read."""

    def admit(self, ids: Sequence[int]) -> tuple[int, np.ndarray]:
        raise KeyError("a bug")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_request_whose_prompt_ends_the_thread_is_told_too(model: Path) -> None:
    batcher = Batcher(Unreadable(OrtExecutor(model), 1), Letters(), ends=[])
    assert ask(batcher, [5], max_tokens=20).wait().pieces[-1].error == DEAD
    batcher.join()
    assert batcher.failed


class Dead(Slots):
    """An engine that fails for good, as after an error of a GPU."""

    alive = True

    def admit(self, ids: Sequence[int]) -> tuple[int, np.ndarray]:
        if not self.alive:
            raise RuntimeError("CUDA error")
        return super().admit(ids)

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        self.alive = False
        raise RuntimeError("CUDA error")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_for_good_ends_the_thread(model: Path) -> None:
    """Once it cannot even read one token; until then a failure is that of the requests that were in the engine."""
    batcher = Batcher(Dead(OrtExecutor(model), 1), Letters(), ends=[])
    assert ask(batcher, [5], max_tokens=20).wait().finish == "error"
    batcher.join()
    assert batcher.failed


def test_a_prompt_that_does_not_fit_the_memory_leaves_the_others_alone(model: Path) -> None:
    class Small(Slots):
        def admit(self, ids: Sequence[int]) -> tuple[int, np.ndarray]:
            if len(ids) > 20:
                raise MemoryError
            return super().admit(ids)

    batcher = Batcher(Small(OrtExecutor(model), 2), Letters(), ends=[])
    try:
        clients = [ask(batcher, [5] * n, max_tokens=30) for n in (3, 25, 4, 30, 31, 32, 5)]
        assert [client.wait().finish for client in clients] == [
            *("length", "error", "length", "error", "error", "error", "length")
        ]
        assert not batcher.failed
    finally:
        batcher.close()


def test_one_request_that_fails_ends_alone(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a tokenizer that cannot decode a token of its answer: a defect that nobody thought of."""

    class Choosy(Letters):
        def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
            if bad in token_ids:
                raise LookupError("/srv/tokenizer.json lacks one")
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    plain = Batcher(Slots(OrtExecutor(model), 3), Letters(), ends=[])
    expected = [ask(plain, [first], max_tokens=20).wait().tokens for first in range(3, 13)]
    plain.close()
    made = [token for tokens in expected for token in set(tokens)]
    bad = next(token for token in made if 0 < made.count(token) < 8)  # in some of the answers
    batcher = Batcher(Slots(OrtExecutor(model), 3), Choosy(), ends=[])
    try:
        clients = [ask(batcher, [first], max_tokens=20) for first in range(3, 13)]
        failed = [bad in tokens for tokens in expected]
        for client, tokens, fails in zip(clients, expected, failed, strict=True):
            assert client.wait().finish == ("error" if fails else "length")
            assert client.tokens == (tokens[: tokens.index(bad)] if fails else tokens)
            assert client.pieces[-1].error == (A_BUG if fails else None)
        assert "/srv/tokenizer.json lacks one" in capsys.readouterr().err
        assert batcher.running == 0
    finally:
        batcher.close()


def test_what_onnx_runtime_reports_is_a_failure_of_the_engine(model: Path) -> None:
    """Its exceptions are no RuntimeError by themselves, and ended the thread."""
    slots = Slots(OrtExecutor(model), 1)
    with pytest.raises(RuntimeError, match="out of data bounds"):
        slots.admit([10_000])


def test_end_tokens_beyond_the_vocabulary_are_none(model: Path) -> None:
    batcher = Batcher(Slots(OrtExecutor(model), 1), Letters(), ends=[2, 500, -1])
    try:
        assert len(ask(batcher, [5], max_tokens=4, min_tokens=4).wait().tokens) == 4
    finally:
        batcher.close()


def test_closing_answers_everybody(model: Path) -> None:
    batcher = Batcher(Slots(OrtExecutor(model), 1), Letters(), ends=[], most_waiting=2)
    first = ask(batcher, [5], max_tokens=100)
    while not first.pieces:
        assert not first.done.wait(0.001)
    others = [ask(batcher, [6], max_tokens=100) for _ in range(2)]
    with pytest.raises(UsageError, match="too many requests are waiting"):
        ask(batcher, [6])
    batcher.close()
    assert first.wait().finish == "length"  # what runs is finished
    assert [client.wait().pieces[-1].error for client in others] == ["the model is being unloaded"] * 2
    with pytest.raises(UsageError, match="being unloaded"):
        ask(batcher, [5])


def test_text_comes_in_whole_characters() -> None:
    stream = TextStream(Letters())
    assert [stream.add(token) for token in (0, 59, 60, 1)] == ["a", "", "é", "b"]
    assert stream.finish() == ""
    stream = TextStream(Letters())
    assert [stream.add(token) for token in (0, 59)] == ["a", ""]
    assert stream.finish() == "\ufffd"  # half a character at the very end is told as what it is


@pytest.mark.parametrize("stop", ["cde", "e", "abc", "efx", "zz"])
def test_stop_strings_are_found_wherever_tokens_part(stop: str) -> None:
    stream, text = TextStream(Letters(), [stop]), ""
    for token in range(7):  # abcdefg
        text += stream.add(token)
        assert stop not in text
        if stream.stopped:
            break
    text += stream.finish()
    assert text == "abcdefg".partition(stop)[0]


def test_messages() -> None:
    assert parse_messages('[{"role": "user", "content": "hi"}]') == [{"role": "user", "content": "hi"}]
    for text in ("", "{}", "[]", '[{"role": "user"}]', '[{"role": 1, "content": "x"}]'):
        with pytest.raises(UsageError, match="messages"):
            parse_messages(text)
