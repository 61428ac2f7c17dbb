"""OUT/triton on a real Triton server (2.51, CPU, python backend), in an environment of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.checkpoint import load_model
from compress.errors import run_cli
from export.build import main
from tests import tiny
from tests.serve import SERVE, free_ports, installed, running
from tests.tools import unavailable

HERE = Path(__file__).parent
MODEL = "tiny-text"


@dataclass
class Server:
    """A running server; `tokenizer` is that of the model."""

    out: Path
    http: int
    grpc: int
    process: subprocess.Popen[bytes]
    log: Path

    def ask(self, **body: Any) -> dict[str, Any]:
        return self.post(json.dumps(body).encode())

    def post(self, body: bytes, way: str = "generate") -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.http}/v2/models/{MODEL}/{way}"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            return {"status": error.code, **json.loads(error.read())}
        if way == "generate":
            return {"status": 200, **json.loads(text)}
        return {
            "status": 200,
            "pieces": [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")],
        }

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/v2/health/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self, how: int = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(60)


def start(out: Path, folder: Path) -> Server:
    http, grpc, metrics = free_ports(3)
    log = folder / f"server-{http}.log"
    process = running(out, folder, http=http, grpc=grpc, metrics=metrics, log=log)
    server = Server(out, http, grpc, process, log)
    deadline = time.monotonic() + 120
    while not server.ready():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-6000:]}")
        time.sleep(0.2)
    return server


@pytest.fixture(scope="module")
def built(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact as `export.build --engine ort` leaves it."""
    root = tmp_path_factory.mktemp("triton")
    (root / "text.txt").write_text(tiny.TEXT * 3)
    arguments = ["--model", str(tiny_model("tiny_llama")), "--out", str(root / "out"), "--structure", "pifa"]
    arguments += ["--ratio", "0.8", "--unit", "4", "--calibration-data", str(root / "text.txt"), "--serve-as", MODEL]
    arguments += ["--calibration-samples", "2", "--sequence-length", "32", "--sequences", "4"]
    assert run_cli(main, arguments) == 0
    return root / "out"


@pytest.fixture(scope="module")
def server(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not installed():
        unavailable(f"{SERVE} is not there: make test makes it, with a Triton server from a package")
    started = start(built, tmp_path_factory.mktemp("server"))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def greedy(built: Path) -> Callable[[str, int], list[int]]:
    """Greedy tokens by PyTorch, without a cache."""
    from transformers import AutoTokenizer

    model, tokenizer = load_model(built / "checkpoint"), AutoTokenizer.from_pretrained(built / "checkpoint")
    ends = model.config.eos_token_id

    def tokens(text: str, count: int) -> list[int]:
        ids, made = tokenizer(text)["input_ids"], list[int]()
        while len(made) < count and (not made or made[-1] != ends):
            with torch.no_grad():
                made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
        return made

    return tokens


def test_text_is_that_of_pytorch(server: Server, greedy: Callable[[str, int], list[int]]) -> None:
    for text in ("The quick brown", "a", "Numbers: 1 2 3 4 5 6 7"):
        answer = server.ask(text_input=text, max_tokens=12)
        assert answer["tokens"] == greedy(text, 12)
        assert answer["finish_reason"] == ("length" if len(answer["tokens"]) == 12 else "stop")


def test_without_max_tokens_an_answer_fills_what_there_is(server: Server) -> None:
    answer = server.ask(text_input="word")
    assert answer["status"] == 200
    assert answer["finish_reason"] == "stop" or len(answer["tokens"]) >= 100


def test_streams_say_the_same(server: Server) -> None:
    whole = server.ask(text_input="The quick brown", max_tokens=12)
    body = {"text_input": "The quick brown", "max_tokens": 12, "stream": True}
    pieces = server.post(json.dumps(body).encode(), "generate_stream")["pieces"]
    assert len(pieces) == len(whole["tokens"])
    assert "".join(piece["text_output"] for piece in pieces) == whole["text_output"]
    assert [piece["finish_reason"] for piece in pieces] == [""] * (len(pieces) - 1) + [whole["finish_reason"]]


def by_grpc(server: Server, *arguments: str) -> dict[str, Any]:
    command = [str(SERVE / "bin" / "python"), str(HERE / "grpc_client.py"), f"127.0.0.1:{server.grpc}", MODEL]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_grpc_streams_say_the_same(server: Server) -> None:
    whole = server.ask(text_input="The quick brown", max_tokens=12)
    found = by_grpc(server, "The quick brown", "12")
    assert found["error"] is None
    assert found["tokens"] == whole["tokens"]
    assert "".join(found["pieces"]) == whole["text_output"]


def test_sixteen_clients_get_what_each_gets_alone(server: Server) -> None:
    texts = [f"{'word ' * (i % 5)}number {i}" for i in range(16)]
    alone = [server.ask(text_input=text, max_tokens=5 + i)["tokens"] for i, text in enumerate(texts)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda i: server.ask(text_input=texts[i], max_tokens=5 + i)["tokens"], range(16)))
    assert together == alone


def test_sampling_options_reach_the_model(server: Server) -> None:
    options = {"text_input": "The quick", "max_tokens": 10, "temperature": 1.2, "top_k": 30, "top_p": 0.95, "seed": 5}
    first, again = server.ask(**options, logprobs=2), server.ask(**options)
    assert first["tokens"] == again["tokens"] != server.ask(**{**options, "seed": 6})["tokens"]
    assert len(first["logprobs_output"]) == len(first["tokens"])
    assert all(len(place) == 2 for place in json.loads(first["top_logprobs"]))
    assert np.all(np.array(first["logprobs_output"]) <= 0)
    text = server.ask(text_input="The quick", max_tokens=10)["text_output"]
    stop = text[2:4]
    assert server.ask(text_input="The quick", max_tokens=10, stop=[stop])["text_output"] == text.partition(stop)[0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_tokens": 3}, "give text_input, or messages"),
        ({"text_input": "a", "messages": "[]"}, "give text_input, or messages"),
        ({"text_input": ""}, "the prompt is empty"),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens must be 1"),
        ({"text_input": "a", "max_tokens": "many"}, "signed-integer"),
        ({"text_input": "a", "temperature": -1.0}, "temperature must be"),
        ({"text_input": "a", "top_p": 2.0}, "top_p must be"),
        ({"text_input": ["a", "b"]}, ""),
        ({"text_input": "word " * 500, "max_tokens": 1}, "this model takes at most"),
        ({"text_input": "word " * 2_000_000, "max_tokens": 1}, "characters"),
        ({"messages": "no"}, ""),
    ],
)
def test_malformed_requests_get_errors_and_the_server_lives_on(
    server: Server, body: dict[str, Any], message: str
) -> None:
    answer = server.ask(**body)
    assert answer["status"] >= 400
    assert message in answer["error"]
    assert server.process.poll() is None
    assert server.ask(text_input="a", max_tokens=2)["status"] == 200


def test_cancellation_frees_the_slot(server: Server) -> None:
    """Four clients take all rows and leave early; the next one is answered at once."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: by_grpc(server, f"client {i}", "100", "3"), range(4)))
    assert all(len(f["pieces"]) == 3 for f in found)
    assert server.ask(text_input="a", max_tokens=2)["status"] == 200


def test_configuration_is_read_back_as_protobuf(server: Server) -> None:
    """By the client's own message types: a misspelt field would be an error."""
    code = "import sys; from google.protobuf import json_format, text_format; "
    code += "from tritonclient.grpc import model_config_pb2 as m; "
    code += "print(json_format.MessageToJson(text_format.Parse(open(sys.argv[1]).read(), m.ModelConfig())))"
    path = server.out / "triton" / "repository" / MODEL / "config.pbtxt"
    command = [str(SERVE / "bin" / "python"), "-c", code, str(path)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["name"] == MODEL
    assert found["modelTransactionPolicy"] == {"decoupled": True}
    assert found["instanceGroup"] == [{"count": 1, "kind": "KIND_CPU"}]
    assert {value["name"] for value in found["input"]} >= {"text_input", "stop", "seed", "stream"}
    assert all(value["optional"] for value in found["input"])


def test_a_killed_server_starts_again(server: Server, tmp_path_factory: pytest.TempPathFactory) -> None:
    expected = server.ask(text_input="The quick", max_tokens=6)["tokens"]
    second = start(server.out, tmp_path_factory.mktemp("second"))
    try:
        assert second.ask(text_input="The quick", max_tokens=6)["tokens"] == expected
    finally:
        second.stop(signal.SIGKILL)
    third = start(server.out, second.log.parent)
    try:
        assert third.ask(text_input="The quick", max_tokens=6)["tokens"] == expected
    finally:
        third.stop()
