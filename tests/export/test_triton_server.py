"""OUT/triton on a real Triton server (2.51, CPU, python backend), in an environment of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
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
from tests.serve import SERVE, free_ports, ready, running
from tests.tools import require_server
from validate.serving import http_client, one_round

HERE = Path(__file__).parent
MODEL = "tiny-text"
CHAT = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no such role here') }}{% endif %}"
    "{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}answer: {% endif %}"
)


@dataclass
class Server:
    """A running server; `tokenizer` is that of the model."""

    out: Path
    http: int
    grpc: int
    metrics: int
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

    def counted(self) -> dict[str, float]:
        """Our metrics, by name and labels without the model's."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=30) as answer:
            lines = [line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if "procrustes_" in line[:12]]
        return {name.replace(f'model="{MODEL}"', "").replace("{}", ""): float(value) for name, value in lines}

    def stop(self, how: int = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(60)


def start(out: Path, folder: Path, network: bool = False) -> Server:
    http, grpc, metrics = free_ports(3)
    log = folder / f"server-{http}.log"
    process = running([out], folder, http=http, grpc=grpc, metrics=metrics, network=network, log=log)
    server = Server(out, http, grpc, metrics, process, log)
    deadline = time.monotonic() + 120
    while not ready(http):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-6000:]}")
        time.sleep(0.2)
    return server


@pytest.fixture(scope="module")
def built(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact as `export.build --engine ort` leaves it."""
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("triton")
    (root / "text.txt").write_text(tiny.TEXT * 3)
    shutil.copytree(tiny_model("tiny_llama"), root / "model")
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(root / "model")
    arguments = ["--model", str(root / "model"), "--out", str(root / "out"), "--structure", "pifa"]
    arguments += ["--ratio", "0.8", "--unit", "4", "--calibration-data", str(root / "text.txt"), "--serve-as", MODEL]
    arguments += ["--calibration-samples", "2", "--sequence-length", "32", "--sequences", "4"]
    assert run_cli(main, arguments) == 0
    return root / "out"


@pytest.fixture(scope="module")
def server(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    require_server()
    started = start(built, tmp_path_factory.mktemp("server"), network=True)
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
    options = {"text_input": "The quick brown", "max_tokens": 100, "min_tokens": 100}
    whole = server.ask(**options)
    pieces = server.post(json.dumps({**options, "stream": True}).encode(), "generate_stream")["pieces"]
    assert 1 < len(pieces) <= 100  # some may come together where the server lags behind
    assert sum(piece["num_output_tokens"] for piece in pieces) == len(whole["tokens"]) == 100
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
    found = by_grpc(server, json.dumps({"text_input": "The quick brown", "max_tokens": 12, "stream": True}))
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
    assert "top_logprobs" not in again  # nobody asked for them
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


def test_requests_that_are_refused_beside_others_that_are_answered(server: Server) -> None:
    """Both end in threads of their own, which once sent metrics at the same time and brought the server down."""
    expected = server.ask(text_input="The quick brown", max_tokens=4)["tokens"]

    def client(number: int) -> list[dict[str, Any]]:
        return [server.ask(text_input="The quick brown", max_tokens=4 if (number + i) % 2 else -1) for i in range(40)]

    with ThreadPoolExecutor(8) as pool:
        answers = [answer for found in pool.map(client, range(8)) for answer in found]
    assert [a["tokens"] for a in answers if a["status"] == 200] == [expected] * 160
    assert server.process.poll() is None


def test_cancellation_frees_the_slot(server: Server) -> None:
    """Four clients take all rows and leave after their first tokens: what they asked for is not made to the end."""
    name = 'procrustes_requests_total{finish="cancelled",}'
    before = server.counted()
    options = {"max_tokens": 110, "min_tokens": 110, "stream": True}
    with ThreadPoolExecutor(4) as pool:
        bodies = [json.dumps({"text_input": f"client {i}", **options}) for i in range(4)]
        found = list(pool.map(lambda body: by_grpc(server, body, "1"), bodies))
    assert all(len(f["pieces"]) == 1 and f["error"] is None for f in found)
    assert server.ask(text_input="a", max_tokens=2)["status"] == 200
    deadline = time.monotonic() + 30
    while server.counted()["procrustes_running"] and time.monotonic() < deadline:
        time.sleep(0.1)
        server.ask(text_input="a", max_tokens=1)  # the gauges are those of the last request that ended
    after = server.counted()
    assert after["procrustes_running"] == after["procrustes_waiting"] == 0
    assert after[name] - before.get(name, 0) >= 1
    made = after["procrustes_generated_tokens_total"] - before["procrustes_generated_tokens_total"]
    assert made < 4 * 110


def test_messages_go_through_the_chat_template(server: Server) -> None:
    def messages(*pairs: tuple[str, str]) -> str:
        return json.dumps([{"role": role, "content": content} for role, content in pairs])

    answer = server.ask(messages=messages(("system", "be brief"), ("user", "The quick")), max_tokens=6)
    plain = server.ask(text_input="system: be brief\nuser: The quick\nanswer: ", max_tokens=6)
    assert (answer["status"], answer["tokens"]) == (200, plain["tokens"])
    assert answer["num_input_tokens"] in (plain["num_input_tokens"], plain["num_input_tokens"] - 1)  # no second <s>
    refused = server.ask(messages=messages(("robot", "hello")), max_tokens=6)
    assert refused["status"] >= 400
    assert "no such role here" in refused["error"]
    assert server.ask(text_input="a", max_tokens=2)["status"] == 200


def test_what_the_openai_front_end_sends_is_answered(server: Server) -> None:
    """Triton's front end makes such a request for models of the python backend: all of these inputs, each (1, 1)."""
    plain = server.ask(text_input="The quick brown", max_tokens=6)
    sent = {
        "text_input": "The quick brown",
        "stream": False,
        "max_tokens": 6,
        "stop_words": ["never there", "nor this"],
        "top_p": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "seed": 3,
        "temperature": 0.0,
        "exclude_input_in_output": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }
    found = by_grpc(server, json.dumps(sent))
    assert (found["error"], found["pieces"]) == (None, [plain["text_output"]])
    assert found["outputs"]["num_output_tokens"] == [6]
    assert found["outputs"]["num_input_tokens"] == [plain["num_input_tokens"]]
    echo = by_grpc(server, json.dumps({**sent, "exclude_input_in_output": False, "stream": True}))
    assert "".join(echo["pieces"]) == "The quick brown" + plain["text_output"]
    assert sum(echo["outputs"]["num_output_tokens"]) == 6
    assert by_grpc(server, json.dumps({**sent, "frequency_penalty": 2.0}))["tokens"] != plain["tokens"]


def test_the_network_by_itself(server: Server, greedy: Callable[[str, int], list[int]]) -> None:
    """Prefill from an empty cache and steps that give the cache back, over the wire: greedy tokens are PyTorch's."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(server.out / "checkpoint")("The quick brown")["input_ids"]
    command = [str(SERVE / "bin" / "python"), str(HERE / "network_client.py"), f"127.0.0.1:{server.grpc}"]
    command += [f"{MODEL}_lm", json.dumps(ids), "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens"] == greedy("The quick brown", 5)
    assert "rror" in found["refused"]  # a mask that contradicts the cache
    assert server.process.poll() is None


def test_metrics_say_what_was_answered(server: Server) -> None:
    before = server.counted()
    answer = server.ask(text_input="The quick brown", max_tokens=5)
    server.ask(text_input="", max_tokens=5)
    after = server.counted()
    gained = {name: after[name] - before.get(name, 0) for name in after}
    assert gained[f'procrustes_requests_total{{finish="{answer["finish_reason"]}",}}'] == 1
    assert gained['procrustes_requests_total{finish="refused",}'] == 1
    assert gained["procrustes_generated_tokens_total"] == len(answer["tokens"])
    assert gained["procrustes_prompt_tokens_total"] == answer["num_input_tokens"]
    assert 0 < gained["procrustes_first_token_seconds_total"] < 60
    assert after["procrustes_waiting"] == 0


def test_throughput_is_measured_on_it(server: Server) -> None:
    """What `validate.serving` counts is what the server streams; end tokens do not cut an answer short."""
    ask = http_client(f"http://127.0.0.1:{server.http}")
    made = one_round(ask, MODEL, ["The quick brown", "word " * 20, "a", "number 7"], clients=2, requests=2, tokens=30)
    assert [answer.tokens for answer in made.answers] == [30] * 4
    assert all(len(answer.gaps) <= 29 and answer.first > 0 for answer in made.answers)
    assert made.tokens_per_second == pytest.approx(120 / made.seconds)


@pytest.mark.parametrize("more", [[], ["--stream"], ["--grpc"], ["--grpc", "--stream"]])
def test_client_prints_the_answer(server: Server, more: list[str]) -> None:
    expected = server.ask(text_input="The quick brown", max_tokens=6)["text_output"]
    url = f"127.0.0.1:{server.grpc}" if "--grpc" in more else f"http://127.0.0.1:{server.http}"
    command = [str(SERVE / "bin" / "python"), str(server.out / "triton" / "client.py"), "The quick brown"]
    done = subprocess.run(
        [*command, "--max-tokens", "6", "--url", url, *more], capture_output=True, text=True, check=True
    )
    assert done.stdout == expected + "\n"


def test_client_says_what_went_wrong(server: Server) -> None:
    client = [str(SERVE / "bin" / "python"), str(server.out / "triton" / "client.py"), "a", "--max-tokens", "0"]
    for more in ([], ["--stream"], ["--grpc"]):
        url = f"127.0.0.1:{server.grpc}" if "--grpc" in more else f"http://127.0.0.1:{server.http}"
        done = subprocess.run([*client, "--url", url, *more], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "max_tokens must be 1" in done.stderr
    (port,) = free_ports(1)
    done = subprocess.run([*client, "--url", f"http://127.0.0.1:{port}"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no server answers" in done.stderr


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


@pytest.mark.slow
def test_soak(built: Path, tmp_path: Path) -> None:
    """Five minutes of clients that come, go, leave early and err: nobody waits for ever, memory stays what it was."""
    require_server()
    server = start(built, tmp_path)
    expected = server.ask(text_input="The quick brown", max_tokens=8)["tokens"]
    seconds = float(os.environ.get("SOAK_SECONDS", "300"))
    stop, wrong = time.monotonic() + seconds, list[Any]()

    def client(number: int) -> int:
        done = 0
        while time.monotonic() < stop:
            kind = (number + done) % 4
            if kind == 0:
                answer = server.ask(text_input="The quick brown", max_tokens=8)["tokens"]
                wrong.extend([answer] if answer != expected else [])
            elif kind == 1:
                body = {"text_input": f"word {done}", "max_tokens": 1 + done % 90, "temperature": 1.0, "stream": True}
                server.post(json.dumps(body).encode(), "generate_stream")
            elif kind == 2:
                wrong.extend([0] if server.ask(text_input="a", max_tokens=-1)["status"] == 200 else [])
            else:  # leaves in the middle of a stream
                body = json.dumps({"text_input": "leave", "max_tokens": 100, "stream": True}).encode()
                url = f"http://127.0.0.1:{server.http}/v2/models/{MODEL}/generate_stream"
                with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as stream:
                    stream.readline()
            done += 1
        return done

    sizes = list[dict[str, int]]()
    try:
        with ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(client, number) for number in range(8)]
            while time.monotonic() < stop:
                time.sleep(seconds / 30)
                sizes.append(memory_of(server.process.pid))
            done = [c.result() for c in clients]
        assert not wrong
        assert min(done) > seconds / 5
        assert server.ask(text_input="The quick brown", max_tokens=8)["tokens"] == expected
        assert server.counted()["procrustes_running"] == server.counted()["procrustes_waiting"] == 0
        for name, most in (("triton_python_b", 1.01), ("tritonserver", 1.1)):
            figures = [size[name] for size in sizes]
            said = f"{sum(done)} requests; resident memory of {name}, MB: {[round(f / 2**20, 1) for f in figures]}"
            assert max(figures[-6:]) < most * max(figures[3:9]), said
            print(said)
    finally:
        server.stop()


def memory_of(root: int) -> dict[str, int]:
    """Resident bytes of a process and of its children, by name."""
    found = dict[str, int]()
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            facts = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            if root in (int(facts["Pid"]), int(facts["PPid"])):
                found[facts["Name"]] = 1024 * int(facts["VmRSS"].split()[0])
    return found
