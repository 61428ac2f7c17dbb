"""A tiny model on a real Triton server: how it is made, started, asked, looked at from outside, and stopped."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.cli.entry import run_cli
from export.build import main
from tests import tiny
from tests.serve import free_ports, ready, running

MODEL = "tiny-text"
PATIENCE = 300.0
"""Seconds for a server to load and to start again, on a machine that has other work."""
CHAT = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no such role here') }}{% endif %}"
    "{{ m.role + ': ' + m.content + '\\n' }}{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}answer: {% endif %}"
)


def build(root: Path) -> Path:
    """ROOT/out: an artefact of a tiny model as `export.build --engine ort` leaves it, with a chat template."""
    from transformers import AutoTokenizer

    (root / "text.txt").write_text(tiny.TEXT * 3)
    tiny.write("tiny_llama", root / "model")
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(root / "model")
    arguments = ["--model", str(root / "model"), "--out", str(root / "out"), "--structure", "pifa"]
    arguments += ["--ratio", "0.8", "--unit", "4", "--calibration-data", str(root / "text.txt"), "--serve-as", MODEL]
    arguments += ["--calibration-samples", "2", "--sequence-length", "32", "--sequences", "4"]
    if run_cli(main, arguments) != 0:
        raise RuntimeError("the tiny model was not built")
    return root / "out"


@dataclass
class Server:
    """A running server. process: that of launch.sh, of which tritonserver is a child, of which the models are."""

    out: Path
    http: int
    grpc: int
    metrics: int
    process: subprocess.Popen[bytes]
    log: Path

    def ask(self, **body: Any) -> dict[str, Any]:
        return self.post(json.dumps(body).encode())

    def post(self, body: bytes, way: str = "generate", timeout: float = 120) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.http}/v2/models/{MODEL}/{way}"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            return {"status": error.code, **json.loads(error.read())}
        if way == "generate":
            return {"status": 200, **json.loads(text)}
        return {
            "status": 200,
            "pieces": [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")],
        }

    def get(self, path: str) -> int:
        """The status of a GET; 0 where nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def probe(self) -> subprocess.CompletedProcess[str]:
        """What a container's probe runs."""
        command = [sys.executable, str(self.out / "triton" / "probe.py"), "--url", f"http://127.0.0.1:{self.http}"]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    def counted(self) -> dict[str, float]:
        """Our metrics, by name and labels without the model's."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=30) as answer:
            lines = [line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if "procrustes_" in line[:12]]
        return {name.replace(f'model="{MODEL}"', "").replace("{}", ""): float(value) for name, value in lines}

    def processes(self) -> dict[str, int]:
        """Process ids of "tritonserver" and, by their names, of the models that have one."""
        found = dict[str, int]()
        for pid, command in _descendants(self.process.pid):
            if "triton_python_backend_stub" in command[0]:
                found[Path(command[1]).parent.parent.name] = pid
            elif command[0].endswith("tritonserver"):
                found["tritonserver"] = pid
        return found

    def answers(self, than: int | None = None) -> bool:
        """Waits until a probe succeeds, of another tritonserver than that process; false when launch.sh ends before."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            if self.processes().get("tritonserver") != than and self.probe().returncode == 0:
                return True
            time.sleep(0.2)
        return False

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, how: int = signal.SIGTERM) -> int:
        """The exit code of launch.sh."""
        self.process.send_signal(how)
        return self.process.wait(120)


def start(out: Path, folder: Path, network: bool = False, **environment: str) -> Server:
    """A server that has loaded its models. Raises RuntimeError with what it said."""
    http, grpc, metrics = free_ports(3)
    log = folder / f"server-{http}.log"
    process = running(
        [out], folder, http=http, grpc=grpc, metrics=metrics, network=network, log=log, variables=environment
    )
    server = Server(out, http, grpc, metrics, process, log)
    deadline = time.monotonic() + PATIENCE
    while not ready(http):
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()
            raise RuntimeError(f"the server did not start:\n{server.said()[-20_000:]}")
        time.sleep(0.2)
    return server


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def handles(pid: int) -> int:
    """Open file handles of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _descendants(root: int) -> Iterator[tuple[int, list[str]]]:
    """(process id, command line) of the children of a process and of theirs."""
    parents, commands = dict[int, int](), dict[int, list[str]]()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(stat[1])
            commands[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
    for pid, command in commands.items():
        if command[0] and root in (parents[pid], parents.get(parents[pid])):
            yield pid, command
