"""Throughput tables: pairing, medians, gates and errors, against a small HTTP server that answers like Triton's."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from compress.artifact.store import Artifact
from compress.cli.entry import run_cli
from compress.errors import ArtifactError, UsageError
from export.stages import BUILD_INFO, write_json
from validate.serving import Answer, Round, case, cut_prompts, http_client, main, one_round, table

TRITON = {"engine": "ort", "sequences": 16, "threads": 1}
PAUSE = {"dense": 0.04, "small": 0.02}  # seconds a token


class Handler(BaseHTTPRequestHandler):
    """generate_stream of two models that are as slow as `PAUSE` says, and of one that fails half-way."""

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        known = self.path == "/v2" or any(f"/models/{name}/ready" in self.path for name in PAUSE)
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(json.dumps({"name": "triton", "version": "2.51.0"}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model = self.path.split("/")[3]
        assert body["stream"]
        assert body["min_tokens"] == body["max_tokens"]
        self.send_response(200)
        self.end_headers()
        for number in range(body["max_tokens"]):
            time.sleep(PAUSE.get(model, 0))
            piece = {"text_output": "x", "num_output_tokens": 1}
            if model == "failing" and number:
                piece = {"error": "no memory"}
            self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())
            if model == "short":
                return


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def outs(tmp_path: Path) -> list[str]:
    """Artefacts that are served as small and as dense."""
    for name in ("small", "dense"):
        artifact = Artifact(tmp_path / name)
        with artifact.stage("checkpoint") as folder:
            (folder / "config.json").write_text("{}")
        with artifact.stage("triton") as folder:
            write_json(folder / BUILD_INFO, {**TRITON, "name": name})
    return [str(tmp_path / "small"), "--baseline", str(tmp_path / "dense")]


def test_each_model_is_timed_under_its_own_name(url: str, outs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--url", url, "--clients", "1,3", "--tokens", "6", "--rounds", "2", "--requests", "1"]
    assert run_cli(main, [*outs, *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads((Path(outs[0]) / "reports" / "serving.json").read_text()) == report
    assert (report["dense"], report["compressed"], report["server"]["version"]) == ("dense", "small", "2.51.0")
    assert [c["clients"] for c in report["cases"]] == [1, 3]
    for found in report["cases"]:
        for name in ("dense", "small"):  # a sleep is never shorter than asked for, and as much longer as others work
            field = "dense" if name == "dense" else "compressed"
            assert found[f"between_tokens_seconds_{field}"] > 0
            assert found[f"first_token_seconds_{field}"] > 0.9 * PAUSE[name]
            assert 0 < found[f"tokens_per_second_{field}"] < 1.1 * found["clients"] / PAUSE[name]
        assert found["speedup"] > 0
    assert run_cli(main, [*outs, *options, "--min-speedup", "1000000"]) == 3
    printed = capsys.readouterr()
    assert printed.out.count("\n| ") == 2
    assert "FAILED min-speedup-1-clients: " in printed.err


def test_figures_of_a_case() -> None:
    def rounds(*seconds: float) -> list[Round]:
        return [Round(s, (Answer(0.1 * s, (0.2 * s, 0.4 * s), 3), Answer(0.3 * s, (0.2 * s,), 2))) for s in seconds]

    found = case(2, rounds(1.0, 2.0, 4.0), rounds(0.5, 2.0, 1.0))
    assert found["speedup"] == 2.0  # of 2, 1 and 4
    assert found["speedup_quartiles"] == [1.5, 3.0]
    assert found["tokens_per_second_dense"] == 2.5
    assert found["first_token_seconds_dense"] == pytest.approx(0.35)
    assert found["between_tokens_seconds_compressed"] == pytest.approx(0.2)
    one = case(1, [Round(1.0, (Answer(0.5, (), 1),))], [Round(1.0, (Answer(0.5, (), 1),))])
    assert one["between_tokens_seconds_dense"] is None
    assert table({"cases": [found, one]}).count("\n") == 3


def test_clients_have_prompts_of_their_own_and_the_same_each_time() -> None:
    asked = list[tuple[str, str]]()

    def ask(model: str, prompt: str, tokens: int) -> Answer:
        asked.append((model, prompt))
        return Answer(0.0, (), tokens)

    one_round(ask, "m", [f"p{i}" for i in range(6)], 3, 2, 4)
    assert sorted(asked) == [("m", f"p{i}") for i in range(6)]


def test_prompts_are_cut_from_a_text() -> None:
    text = " ".join(f"w{i}" for i in range(200))
    found = cut_prompts(text, 32)
    assert found == cut_prompts(text, 32)
    assert len(set(found)) == 32
    assert {16, 96} >= {min(16, *(len(p.split()) for p in found)), max(96, *(len(p.split()) for p in found))}
    assert all(prompt in text for prompt in found)
    with pytest.raises(UsageError, match="at least 96 words"):
        cut_prompts("too short", 1)


def test_answers_that_are_none_are_errors(url: str) -> None:
    for model, message in (("failing", "no memory"), ("short", "answered with 1 tokens where 4")):
        with pytest.raises(ArtifactError, match=message):
            http_client(url)(model, "a", 4)
    with pytest.raises(ArtifactError, match="broke off"):
        http_client("http://127.0.0.1:9")("dense", "a", 4)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"--url": "http://127.0.0.1:9"}, 4, "no Triton server answers"),
        ({"--clients": "1,x"}, 2, "--clients '1,x' is not a list of different positive numbers"),
        ({"--clients": "0"}, 2, "--clients '0' is not a list of different positive numbers"),
        ({"--min-speedup": "fast"}, 2, "--min-speedup 'fast' is not a limit"),
        ({"--tokens": "0"}, 2, "--tokens must be at least 1"),
        ({"--prompts": "nowhere.txt"}, 2, "cannot be read"),
    ],
)
def test_mistakes_are_explained(
    url: str, outs: list[str], change: dict[str, str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"--url": url, "--clients": "1", "--tokens": "1", "--rounds": "1", **change}
    assert run_cli(main, [*outs, *(word for pair in options.items() for word in pair)]) == code
    assert message in capsys.readouterr().err


def test_models_must_differ_and_be_served(url: str, outs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(main, [outs[0], "--baseline", outs[0], "--url", url]) == 2
    assert "both models are served as 'small'" in capsys.readouterr().err
    with Artifact(Path(outs[0])).stage("triton") as folder:
        write_json(folder / BUILD_INFO, {**TRITON, "name": "absent"})
    assert run_cli(main, [*outs, "--url", url]) == 4
    assert "has no model 'absent' that is ready" in capsys.readouterr().err
