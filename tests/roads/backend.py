"""Triton's python backend in this process: OUT/triton's own model behind a small HTTP server, as clients see it.

`tests/export/triton/test_server.py` has the real server, which takes seconds to start; this one takes none, so that
every cell of the matrix is served. What runs is `export.triton.model`, as config.pbtxt of OUT/triton describes it.
"""

from __future__ import annotations

import json
import queue
import re
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tests.tools import triton_utilities

UTILITIES = "triton_python_backend_utils"
FINAL = 1
STRINGS = ("text_input", "messages", "stop", "stop_words")
KINDS = {bool: np.bool_, int: np.int32, float: np.float32}


class Tensor:
    """An array with a name."""

    def __init__(self, name: str, values: np.ndarray[Any, Any]) -> None:
        self.name, self._values = name, values

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self._values


class TritonError:
    """What is wrong, for the client."""

    def __init__(self, message: str, *code: Any) -> None:
        self._message = message

    def message(self) -> str:
        return self._message


class InferenceResponse:
    """Tensors, or an error."""

    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self.tensors, self.error = {tensor.name: tensor for tensor in output_tensors}, error


class TritonModelException(Exception):  # noqa: N818 (Triton's name)
    """What the server raises in the model."""


class Metric:
    """Counts nothing: the real server's tests look at metrics."""

    def __init__(self, labels: dict[str, str]) -> None:
        self.labels = labels

    def increment(self, value: float) -> None:
        assert value >= 0

    def set(self, value: float) -> None:
        assert value >= 0


class MetricFamily:
    """Of one name."""

    COUNTER, GAUGE = "counter", "gauge"

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name, self.description, self.kind = name, description, kind

    def Metric(self, labels: dict[str, str]) -> Metric:  # noqa: N802
        return Metric(labels)


class Request:
    """Inputs of shape (1, n) by name, and the responses to them."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.inputs = {name: Tensor(name, _values(name, value)) for name, value in body.items()}
        self.responses: queue.Queue[InferenceResponse | None] = queue.Queue()

    def get_response_sender(self) -> Request:
        return self

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if response is not None:
            self.responses.put(response)
        if flags & FINAL:
            self.responses.put(None)

    def is_cancelled(self) -> bool:
        return False

    def answers(self) -> Iterator[dict[str, Any]]:
        """What the client of generate_stream gets; the wait for a next piece is bounded."""
        while (response := self.responses.get(timeout=60)) is not None:
            if response.error is not None:
                yield {"error": response.error.message()}
            else:
                yield {name: _plain(tensor.as_numpy()) for name, tensor in response.tensors.items()}


def _values(name: str, value: Any) -> np.ndarray[Any, Any]:
    listed = value if isinstance(value, list) else [value]
    if name in STRINGS:
        return np.array([[text.encode() for text in listed]], dtype=np.object_)
    return np.array([listed], dtype=KINDS[type(listed[0])])


def _plain(values: np.ndarray[Any, Any]) -> Any:
    found = [value.decode() if isinstance(value, bytes) else value for value in values.reshape(-1).tolist()]
    return found if values.dtype in (np.int32, np.float32) and values.size != 1 else found[0] if found else []


def _utilities() -> ModuleType:
    module = ModuleType(UTILITIES)
    for name in (Tensor, TritonError, InferenceResponse, TritonModelException, MetricFamily):
        setattr(module, name.__name__, name)
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL  # type: ignore[attr-defined]
    module.get_input_tensor_by_name = lambda request, name: request.inputs.get(name)  # type: ignore[attr-defined]
    return module


class Served:
    """The text model of one OUT/triton."""

    def __init__(self, out: Path) -> None:
        with triton_utilities(_utilities()):
            from export.triton.model import TritonPythonModel

        [folder] = (out / "triton" / "repository").iterdir()
        self.name = folder.name
        parameters = re.findall(
            r'key:\s*"(\w+)"\s*value:?\s*\{\s*string_value:\s*"([^"]*)"',
            (folder / "config.pbtxt").read_text(),
        )
        assert parameters, f"{folder}/config.pbtxt has no parameters"
        config = {"parameters": {key: {"string_value": value} for key, value in parameters}}
        self._model = TritonPythonModel()
        self._model.initialize(
            {"model_config": json.dumps(config), "model_repository": str(folder), "model_name": folder.name}
        )

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Pieces as they come."""
        request = Request(body)
        self._model.execute([request])
        return request.answers()

    def close(self) -> None:
        """As when the server unloads the model."""
        self._model.finalize()


@contextmanager
def serving(*outs: Path) -> Iterator[str]:
    """The address of a server with the text models of these artefacts."""
    with ExitStack() as stack:
        models = dict[str, Served]()
        for out in outs:
            model = Served(out)
            stack.callback(model.close)
            models[model.name] = model
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(models))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        yield f"http://127.0.0.1:{server.server_port}"


def ask(url: str, model: str, **body: Any) -> list[dict[str, Any]]:
    """The pieces of one answer of a server, this one or Triton's own."""
    request = urllib.request.Request(f"{url}/v2/models/{model}/generate_stream", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def _handler(models: dict[str, Served]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            known = self.path == "/v2" or any(self.path == f"/v2/models/{name}/ready" for name in models)
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"name": "triton", "version": "in this process"}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            for piece in models[self.path.split("/")[3]].stream(body):
                self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())

    return Handler
