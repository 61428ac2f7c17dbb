"""supervise.py without Triton: a stand-in for the server that dies, crashes or ends in each way that there is."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from export.triton.deploy import files
from tests.serve import free_ports

SERVER = """
import http.server, json, os, signal, sys, time
count = os.path.join(sys.argv[1], "starts")
starts = int(open(count).read()) + 1 if os.path.exists(count) else 1
open(count, "w").write(str(starts))
kind, asked = sys.argv[2], 0
if kind == "crashes at once":
    sys.exit(7)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200 if "health" in self.path else 400, {"error": "unknown model"})
    def do_POST(self):
        global asked
        asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        if kind == "crashes" and asked == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "ends" and asked == 2:
            os._exit(0)
        if kind == "is stopped" and asked == 2:
            os.kill(os.getppid(), signal.SIGTERM)
        if kind == "is restricted":
            if asked > 1:
                os._exit(9)
            self.answer(403, {"error": "This API is restricted"})
            os.kill(os.getppid(), signal.SIGTERM)
            return
        sound = kind != "dies" and not (kind == "dies once" and starts == 1) and not (kind == "stutters" and asked % 3)
        if kind in ("stutters", "dies once") and asked == 12:
            os.kill(os.getppid(), signal.SIGTERM)
        self.answer(200, {"text_output": "ready"}) if sound else self.answer(400, {"error": "Stub is not healthy."})
    def answer(self, status, body):
        self.send_response(status)
        content = json.dumps(body).replace(": ", ":").encode()
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
    def log_message(self, *arguments):
        pass

if kind != "is stopped":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
else:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(3))
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[4])), Handler).serve_forever()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """supervise.py as it is written to OUT/triton, with waits of next to nothing."""
    made = files("tiny-text", "tiny-text_lm", gpu=False)
    for name in ("probe.py", "supervise.py"):
        (tmp_path / name).write_text(made[name])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "probe", raising=False)
    spec = importlib.util.spec_from_file_location("supervise", tmp_path / "supervise.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    monkeypatch.setattr(found, "EVERY", 0.0)
    yield found
    sys.modules.pop("probe", None)


def supervise(module: ModuleType, folder: Path, kind: str, restarts: int) -> tuple[int, int]:
    """(exit code, how often the server was started)."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    (folder / "server.py").write_text(SERVER)
    (port,) = free_ports(1)
    command = [sys.executable, str(folder / "server.py"), str(folder), kind, "--http-port", str(port)]
    try:
        code = module.Supervisor(command, restarts).run()
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    return code, int((folder / "starts").read_text())


@pytest.mark.parametrize(
    ("kind", "restarts", "expected", "said"),
    [
        ("crashes at once", 5, (7, 1), "tritonserver has ended with status 7"),
        ("ends", 5, (0, 1), "tritonserver has ended with status 0"),
        ("crashes", 2, (1, 3), "the server was started again 2 times in ten minutes, and no more"),
        ("crashes", 0, (1, 1), "tritonserver has ended with status -9"),
        ("dies", 1, (1, 2), "tiny-text: Stub is not healthy. (failure 3 of 3)"),
        ("dies", 0, (1, 1), "the server is ended, for its model does not answer"),
        ("dies once", 5, (0, 2), "the server is started again, time 1 of 5 in ten minutes"),
        ("stutters", 5, (0, 1), "(failure 2 of 3)"),
        ("is stopped", 5, (3, 1), ""),
        ("is restricted", 5, (0, 1), "tiny-text: This API is restricted; so the models are not watched"),
    ],
)
def test_what_becomes_of_a_server(
    module: ModuleType,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    kind: str,
    restarts: int,
    expected: tuple[int, int],
    said: str,
) -> None:
    assert supervise(module, tmp_path, kind, restarts) == expected
    found = capfd.readouterr().err
    assert said in found
    if kind == "stutters":
        assert "failure 3" not in found
    if kind == "is stopped":
        assert "ended" not in found


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        ([], "http://127.0.0.1:8000"),
        (["--http-port", "9000", "--http-address=0.0.0.0"], "http://127.0.0.1:9000"),
        (["--http-port=9000", "--http-address", "10.0.0.7"], "http://10.0.0.7:9000"),
        (["--http-address=::"], "http://[::1]:8000"),
        (["--allow-http=false"], None),
        (["--allow-http", "0"], None),
    ],
)
def test_where_the_models_are_asked(module: ModuleType, arguments: list[str], url: str | None) -> None:
    assert module.url_of(["tritonserver", *arguments]) == url


def test_restarts_must_be_a_number(module: ModuleType) -> None:
    command = [sys.executable, str(module.__file__), "true"]
    environment: dict[str, Any] = {**os.environ, "RESTARTS": "many"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "RESTARTS must be a number, not 'many'" in done.stderr
