"""A Hugging Face hub on localhost, for the parts of its protocol that `snapshot_download` uses."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class FakeHub:
    """`repositories`: name -> folder; `refusals`: name -> (status, the hub's error code)."""

    commit: str = "0123456789abcdef0123456789abcdef01234567"
    repositories: dict[str, Path] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path."""
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        name, action, arguments = "/".join(parts[:2]), parts[2], parts[3:]
        if name in self.refusals:
            status, code = self.refusals[name]
            return status, {"X-Error-Code": code, "X-Error-Message": code}, b"{}"
        if name not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        folder = self.repositories[name]
        if arguments[0] not in ("main", self.commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if is_api:
            files = sorted(p for p in folder.iterdir() if p.is_file())
            if action == "tree":
                tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": git_oid(p)} for p in files]
                return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
            info = {
                "id": name,
                "sha": self.commit,
                "private": False,
                "siblings": [{"rfilename": p.name} for p in files],
            }
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        file = folder / arguments[1]
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit}, b""
        headers = {"X-Repo-Commit": self.commit, "ETag": f'"{git_oid(file)}"'}
        return 200, headers, file.read_bytes()


def git_oid(path: Path) -> str:
    """The hub names small files by their git blob hash."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve() -> Iterator[FakeHub]:
    """Run a hub on a free port of localhost until the block ends."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def respond(self, with_body: bool) -> None:
            status, headers, body = hub.answer(self.path)
            if with_body and status == 200 and "/resolve/" in self.path:
                hub.fetched.append(self.path.rpartition("/")[2])
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def do_GET(self) -> None:
            self.respond(with_body=True)

        def do_HEAD(self) -> None:
            self.respond(with_body=False)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)  # poll interval in s
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
