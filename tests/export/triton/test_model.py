"""The models of OUT/triton in this process, with a stand-in for what Triton's python backend gives them.

A server hands over one request at a time, so that only here can many come in one call: what fails among them must leave
the others alone.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.triton.batching import DEAD
from export.triton.failures import A_BUG
from tests.served import MODEL, build
from tests.tools import triton_utilities

FINAL = 1
WAIT = 60.0
STRINGS = ("text_input", "messages", "stop")


class TritonModelException(Exception):  # noqa: N818 (the name is Triton's)
    pass


class Tensor:
    def __init__(self, name: str, values: Any) -> None:
        self.tensor_name, self.values = name, values

    def as_numpy(self) -> Any:
        if isinstance(self.values, Exception):
            raise self.values
        return self.values


class Response:
    def __init__(self, output_tensors: list[Tensor], error: Any = None) -> None:
        self.outputs = {tensor.tensor_name: tensor.values for tensor in output_tensors}
        self.error = error


class Metric:
    def increment(self, value: float) -> None:
        assert value >= 0

    def set(self, value: float) -> None:
        assert value >= 0


class MetricFamily:
    COUNTER, GAUGE = 0, 1

    def __init__(self, **options: Any) -> None:
        pass

    def Metric(self, labels: dict[str, str]) -> Metric:  # noqa: N802 (the name is Triton's)
        return Metric()


class Request:
    """And the sender of its responses. broken: the server takes no response of it."""

    def __init__(self, broken: bool = False, **inputs: Any) -> None:
        self.inputs, self.broken = inputs, broken
        self.responses, self.done = list[Response](), threading.Event()

    def get_response_sender(self) -> Request:
        return self

    def is_cancelled(self) -> bool:
        return False

    def requested_output_names(self) -> list[str]:
        return ["logits"]

    def send(self, response: Response | None = None, flags: int = 0) -> None:
        assert not self.done.is_set()
        if self.broken:
            self.done.set()
            raise RuntimeError("a response of this kind cannot be sent")
        if response is not None:
            if response.error is not None:
                response.error.encode()
            self.responses.append(response)
        if flags == FINAL:
            self.done.set()

    @property
    def outcome(self) -> Any:
        """The only response: its error, or its text."""
        assert self.done.wait(WAIT)
        (response,) = self.responses
        return response.error if response.error is not None else response.outputs["text_output"][0, 0].decode()


def tensor_of(request: Request, name: str) -> Tensor | None:
    if name not in request.inputs:
        return None
    value = request.inputs[name]
    if isinstance(value, (Exception, np.ndarray)):
        return Tensor(name, value)
    return Tensor(name, np.array([[value.encode()]] if name in STRINGS else [[value]]))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("triton"))


@pytest.fixture
def triton() -> Iterator[None]:
    fake = types.ModuleType("triton_python_backend_utils")
    fake.__dict__.update(
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
        TritonModelException=TritonModelException,
        TritonError=str,
        Tensor=Tensor,
        InferenceResponse=Response,
        MetricFamily=MetricFamily,
        get_input_tensor_by_name=tensor_of,
    )
    with triton_utilities(fake):
        yield


def loaded(built: Path, module: str, folder: Path, **parameters: str) -> Any:
    given = {"artifact": "../../..", "threads": "1", "engine": "ort", "sequences": "4", **parameters}
    config = {"parameters": {key: {"string_value": value} for key, value in given.items()}}
    model = importlib.import_module(f"export.triton.{module}").TritonPythonModel()
    model.initialize({"model_config": json.dumps(config), "model_repository": str(folder), "model_name": MODEL})
    return model


@pytest.fixture
def model(built: Path, triton: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made, ended = loaded(built, "model", built / "triton" / "repository" / MODEL), list[str]()
    monkeypatch.setattr(sys.modules["export.triton.model"], "_end_process", ended.append)
    yield made
    made.finalize()
    assert not ended


def test_of_many_requests_in_one_call_each_has_its_own_end(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"text_input": "The quick", "max_tokens": np.array([[6]], np.int32)}
    (alone,) = requests = [Request(**good)]
    model.execute(requests)
    bad = [
        Request(messages='[{"role": "user", "content": "\\ud800"}]'),
        Request(messages="[" * 100_000 + "]" * 100_000),
        Request(messages='[{"role": "user", "content": "x", "tool_calls": 5}]'),
        Request(messages='[{"role": "robot", "content": "x"}]'),
        Request(text_input=np.array([[b"\xff"]], np.object_)),
        Request(text_input=KeyError("/srv/a tensor that Triton cannot read")),
        Request(**good, temperature=1e38),
        Request(broken=True, **good),
    ]
    sound = [Request(**good) for _ in bad]
    health = Request(health=True)
    model.execute([request for pair in zip(bad, sound, strict=True) for request in pair] + [health])
    assert [request.outcome for request in sound] == [alone.outcome] * len(sound)
    assert health.outcome == "ready"
    assert model.is_ready() is True
    reasons = [request.outcome for request in bad if not request.broken]
    for found, expected in zip(
        reasons,
        ("half of a character", "nested too deeply", "cannot read", "no such role", "UTF-8", A_BUG, "temperature"),
        strict=True,
    ):
        assert expected in found
    assert not [reason for reason in reasons if "/srv" in reason or "\n" in reason]
    assert "/srv/a tensor that Triton cannot read" in capsys.readouterr().err
    assert bad[-1].done.wait(WAIT)
    (again,) = requests = [Request(**good)]
    model.execute(requests)
    assert again.outcome == alone.outcome


def test_a_reason_that_quotes_half_a_character_is_sent(model: Any) -> None:
    """The template's own words, about a role that is no text; sending them ended the thread that sends."""
    model.reader._tokenizer.chat_template = "{{ raise_exception('no ' + messages[0].role) }}"
    request = Request(messages='[{"role": "\\ud800", "content": "x"}]')
    model.execute([request])
    assert "no \\ud800" in request.outcome
    health = Request(health=True)
    model.execute([health])
    assert health.outcome == "ready"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_fails_makes_the_model_not_ready(
    built: Path, triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = loaded(built, "model", built / "triton" / "repository" / MODEL)
    module, ended = sys.modules["export.triton.model"], threading.Event()
    monkeypatch.setattr(module, "_end_process", lambda reason: ended.set())

    def broken(ids: Any) -> Any:
        raise KeyError("a bug")

    monkeypatch.setattr(made.batcher._slots, "admit", broken)
    request = Request(text_input="The quick")
    made.execute([request])
    assert request.outcome == DEAD
    assert ended.wait(WAIT)  # the process, in a server
    assert made.is_ready() is False


def test_passes_of_many_in_one_call(built: Path, triton: None) -> None:
    model = loaded(built, "network", built / "triton" / "network" / f"{MODEL}_lm")

    def feeds(token: int) -> dict[str, Any]:
        caches = [name for name in model.inputs if name.startswith("past_key_values.")]
        ids = {"input_ids": token, "attention_mask": 1, "position_ids": 0}
        made: dict[str, Any] = {name: np.array([[value]], np.int64) for name, value in ids.items()}
        return {**made, **{name: np.zeros((1, 2, 0, 16), np.float32) for name in caches}}

    broken = Request(**{**feeds(5), "position_ids": KeyError("/srv/secret")})
    answers = model.execute([Request(**feeds(5)), Request(**feeds(-1)), broken, Request(**feeds(5))])
    assert [answer.error for answer in answers[1:3]] == ["input_ids must be 0 to 319; found -1 to -1", A_BUG]
    np.testing.assert_array_equal(answers[0].outputs["logits"], answers[3].outputs["logits"])
    assert answers[0].outputs["logits"].shape[-1] == 320
