"""OUT/triton on a real Triton server (2.51, CPU, python backend), in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.artifact.store import Artifact
from compress.checkpoint.loading import load_model
from compress.errors import ArtifactError
from export.triton.batching import DEAD
from export.triton.served import sound_tokenizer
from tests.serve import SERVE, free_ports
from tests.served import MODEL, PATIENCE, Server, build, start
from tests.tools import require_server
from validate.serving import http_client, one_round

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("triton"))


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
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=600)
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
        ({"messages": "no"}, "messages are not JSON"),
        ({"messages": '[{"role": "user", "content": "\\ud800"}]'}, "half of a character"),
        ({"messages": "[" * 100_000 + "]" * 100_000}, "nested too deeply"),
        ({"messages": '[{"role": "user", "content": "x", "tool_calls": 5}]'}, "cannot read these messages"),
        ({"messages": '[{"role": "robot", "content": "x"}]'}, "no such role here"),
        ({"text_input": "a", "temperature": 1e38, "top_p": 1e-30}, "temperature must be"),
        ({"text_input": "a", "repetition_penalty": 1e-40}, "repetition_penalty must be"),
    ],
)
def test_malformed_requests_get_errors_and_the_server_lives_on(
    server: Server, body: dict[str, Any], message: str
) -> None:
    answer = server.ask(**body)
    assert answer["status"] >= 400
    assert message in answer["error"]
    assert "\n" not in answer["error"]  # one sentence: no traceback, and no paths of the server
    assert "/lib/" not in answer["error"]
    assert server.process.poll() is None
    assert server.ask(text_input="a", max_tokens=2)["status"] == 200


def test_requests_that_are_refused_beside_others_that_are_answered(server: Server) -> None:
    """Both end in threads of their own, which once sent metrics at the same time and brought the server down."""
    expected = server.ask(text_input="The quick brown", max_tokens=4)["tokens"]

    bad = '[{"role": "user", "content": "\\ud800"}]'

    def client(number: int) -> list[dict[str, Any]]:
        bodies = [{"text_input": "The quick brown", "max_tokens": 4}, {"messages": bad}]
        return [server.ask(**bodies[(number + i) % 2]) for i in range(40)]

    with ThreadPoolExecutor(8) as pool:
        answers = [answer for found in pool.map(client, range(8)) for answer in found]
    assert [a["tokens"] for a in answers if a["status"] == 200] == [expected] * 160
    assert server.process.poll() is None


def test_cancellation_frees_the_slot(server: Server) -> None:
    """Four clients take all rows and leave after their first tokens: what they asked for is not made to the end.

    Where the model is done before the server hears that a client has left, nothing is cancelled: then they come again.
    """
    name = 'procrustes_requests_total{finish="cancelled",}'
    before, rounds, others, cancelled = server.counted(), 0, 0, 0.0
    options = {"max_tokens": 110, "min_tokens": 110, "stream": True}
    while not cancelled:
        rounds += 1
        assert rounds <= 30
        with ThreadPoolExecutor(4) as pool:
            bodies = [json.dumps({"text_input": f"client {i}", **options}) for i in range(4)]
            found = list(pool.map(lambda body: by_grpc(server, body, "1"), bodies))
        assert all(len(f["pieces"]) == 1 and f["error"] is None for f in found)
        assert server.ask(text_input="a", max_tokens=2)["status"] == 200
        others += 2
        deadline = time.monotonic() + 30
        while server.counted()["procrustes_running"] and time.monotonic() < deadline:
            time.sleep(0.1)
            others += 1
            server.ask(text_input="a", max_tokens=1)  # the gauges are those of the last request that ended
        after = server.counted()
        assert after["procrustes_running"] == after["procrustes_waiting"] == 0
        cancelled = after.get(name, 0.0) - before.get(name, 0.0)
    made = after["procrustes_generated_tokens_total"] - before["procrustes_generated_tokens_total"]
    assert made < rounds * 4 * 110 + others


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
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens"] == greedy("The quick brown", 5)
    assert "past_key_values.0.key must be (1, heads, 0, head_dim)" in found["refused"]  # a mask against the cache
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


def stop_hard(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_a_killed_model_is_seen_and_started_again(built: Path, tmp_path: Path) -> None:
    """Triton itself goes on calling it ready, and would answer every request with an error for ever."""
    require_server()
    server = start(built, tmp_path)
    try:
        expected = server.ask(text_input="The quick", max_tokens=6)["tokens"]
        assert server.probe().returncode == 0
        before = server.processes()
        stop_hard(before[MODEL])
        probed = server.probe()
        assert probed.returncode == 1
        assert f"not ready: {MODEL}: " in probed.stderr or "no answer" in probed.stderr  # when launch.sh was quicker
        assert server.answers(than=before["tritonserver"])
        assert server.ask(text_input="The quick", max_tokens=6)["tokens"] == expected
        assert "the server is ended, for its model does not answer" in server.said()
    finally:
        assert server.stop() == 0


@pytest.mark.slow
def test_the_network_and_the_server_are_started_again(built: Path, tmp_path: Path) -> None:
    """The process of the network by itself, which Triton does not start again either, and tritonserver."""
    require_server()
    server = start(built, tmp_path, network=True)
    try:
        for victim in (f"{MODEL}_lm", "tritonserver"):
            before = server.processes()
            stop_hard(before[victim])
            assert server.answers(than=before["tritonserver"])
        assert f"{MODEL}_lm: " in server.said()
        assert "time 2 of 5 in ten minutes" in server.said()
        before = server.processes()
    finally:
        server.stop(signal.SIGKILL)  # launch.sh itself: what it started does not go on without it
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in before.values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [name for name, pid in before.items() if Path(f"/proc/{pid}").exists()]


FAULTY = """
import export.triton.model as model

class Faulty(model.Slots):
    def admit(self, ids):
        if len(ids) == 19:
            raise KeyError("/srv/a defect")
        return super().admit(ids)

model.Slots = Faulty
"""


@pytest.mark.slow
def test_a_thread_that_dies_ends_the_model(built: Path, tmp_path: Path) -> None:
    """A defect of the loop that decodes: all are told, the process ends, probes see it. Containers restart the rest."""
    from transformers import AutoTokenizer

    require_server()
    out = tmp_path / "out"
    shutil.copytree(built, out)
    code = out / "triton" / "repository" / MODEL / "1" / "model.py"
    code.write_text(code.read_text() + FAULTY)
    tokenizer = AutoTokenizer.from_pretrained(out / "checkpoint")
    text = next(text for n in range(1, 99) if len(tokenizer(text := "0" * n)["input_ids"]) == 19)
    server = start(out, tmp_path, RESTARTS="0")
    try:
        assert server.ask(text_input="a", max_tokens=6)["status"] == 200
        before = server.processes()
        answer = server.ask(text_input=text)
        assert answer["status"] >= 400
        assert answer["error"] == DEAD
        assert server.process.wait(PATIENCE) == 1
        assert not Path(f"/proc/{before['tritonserver']}").exists()
        said = server.said()
        assert "KeyError: '/srv/a defect'" in said
        assert "the thread that decodes has failed" in said
        assert "is started again" not in said
    finally:
        if server.process.poll() is None:
            server.stop()


@pytest.mark.parametrize("file", ["tokenizer.json", "chat_template.jinja", "added.json"])
def test_a_changed_tokenizer_is_refused(built: Path, tmp_path: Path, file: str) -> None:
    """By its hashes, before anything is loaded; the weights, which the server does not read, are not hashed again."""
    out = tmp_path / "out"
    shutil.copytree(built, out)
    for shard in (out / "checkpoint").glob("*.safetensors"):
        shard.unlink()
    assert sound_tokenizer(Artifact(out)) == out / "checkpoint"
    with (out / "checkpoint" / file).open("a") as changed:
        changed.write(" ")
    with pytest.raises(ArtifactError, match=file):
        sound_tokenizer(Artifact(out))


@pytest.mark.slow
def test_a_server_with_a_changed_tokenizer_does_not_start(built: Path, tmp_path: Path) -> None:
    require_server()
    shutil.copytree(built, tmp_path / "out")
    (tmp_path / "out" / "checkpoint" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(RuntimeError, match=r"chat_template\.jinja is truncated"):
        start(tmp_path / "out", tmp_path)
