"""The model that Triton's python backend runs: text in, text out, decoupled. Its 1/model.py imports this."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import triton_python_backend_utils as pb_utils

from compress.artifact import Artifact
from compress.errors import UsageError
from export.engines.slots import Slots
from export.triton.batching import Batcher, Piece
from export.triton.settings import LARGEST_PROMPT, Settings, parse_messages
from export.triton.text import Decodes

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
SCALARS = {
    "max_tokens": int,
    "min_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "repetition_penalty": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "seed": int,
    "logprobs": int,
}


class TritonPythonModel:
    """See the interface of Triton's python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine and answer one request, so that the first client waits for nothing."""
        parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        artifact = Artifact((Path(args["model_repository"]) / parameters["artifact"]).resolve())
        slots = Slots(_executor(artifact, parameters), int(parameters["sequences"]))
        from transformers import AutoTokenizer

        folder = artifact.require_stage("checkpoint")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ends = slots.executor.metadata["eos_token_id"]
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        handle, _ = slots.admit([0] * max(1, slots.executor.spans.prompt.least))
        slots.step([0])
        slots.release(handle)
        self.longest = slots.longest
        self.batcher = Batcher(slots, cast(Decodes, self.tokenizer), ends)
        self.metrics = Metrics(args["model_name"], self.batcher)

    def execute(self, requests: list[Any]) -> None:
        """Put requests into the batch; answers go out from its thread."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                ids, settings, stream, before = self._read(request)
                self.batcher.submit(ids, settings, _Client(sender, self.metrics, len(ids), stream, before))
            except UsageError as error:
                self.metrics.ended("refused")
                _fail(sender, str(error))

    def finalize(self) -> None:
        """Finish what is running."""
        self.batcher.close()

    def _read(self, request: Any) -> tuple[list[int], Settings, bool, str]:
        """Tokens, settings, whether to stream, and what the text begins with: the prompt, where that is asked for."""
        text, messages = _text(request, "text_input"), _text(request, "messages")
        if (text is None) == (messages is None):
            raise UsageError("give text_input, or messages for the chat template, and not both")
        if len(text or messages or "") > LARGEST_PROMPT:
            raise UsageError(f"the prompt has more than {LARGEST_PROMPT} characters")
        before = ""
        if text is not None:
            ids = self.tokenizer(text)["input_ids"]
            before = text if _flag(request, "exclude_input_in_output") is False else ""
        elif self.tokenizer.chat_template is None:
            raise UsageError("the tokenizer of this model has no chat template; give text_input")
        else:
            from jinja2 import TemplateError

            conversation = parse_messages(str(messages))
            try:
                found = self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
            except TemplateError as error:  # such as roles that do not take turns
                raise UsageError(f"the chat template of this model refuses these messages: {error}") from error
            ids = self.tokenizer(found, add_special_tokens=False)["input_ids"]
        given: dict[str, Any] = {}
        for name, kind in SCALARS.items():
            value = pb_utils.get_input_tensor_by_name(request, name)
            if value is not None:
                given[name] = kind(_single(name, value.as_numpy()))
        for name in ("stop", "stop_words"):
            stops = pb_utils.get_input_tensor_by_name(request, name)
            if stops is not None:
                given["stop"] = (
                    *given.get("stop", ()),
                    *(_decoded(name, item) for item in stops.as_numpy().reshape(-1)),
                )
        given.setdefault("max_tokens", max(1, min(Settings.max_tokens, self.longest - len(ids))))
        return list(ids), Settings(**given), bool(_flag(request, "stream")), before


class Metrics:
    """What Triton's own metrics do not say, beside them on its metrics port: tokens, ends, waiting, first tokens."""

    def __init__(self, model: str, batcher: Batcher) -> None:
        self._labels, self._batcher, self._families = {"model": model}, batcher, dict[str, Any]()
        self._metrics = dict[tuple[str, str], Any]()
        self._lock = threading.Lock()
        for name, kind, what in (
            ("requests", "COUNTER", "Requests by how they ended: stop, length, cancelled, error, refused"),
            ("prompt_tokens", "COUNTER", "Tokens of prompts that were answered"),
            ("generated_tokens", "COUNTER", "Tokens of answers"),
            ("first_token_seconds", "COUNTER", "From request to first token, summed over the requests that ended"),
            ("running", "GAUGE", "Requests that are being decoded"),
            ("waiting", "GAUGE", "Requests that wait for a place in the batch"),
        ):
            counter = kind == "COUNTER"
            self._families[name] = pb_utils.MetricFamily(
                name=f"procrustes_{name}{'_total' if counter else ''}",
                description=what,
                kind=pb_utils.MetricFamily.COUNTER if counter else pb_utils.MetricFamily.GAUGE,
            )
        self.ended("stop", 0)

    def ended(self, how: str, requests: int = 1, *, prompt: int = 0, made: int = 0, first: float = 0.0) -> None:
        """Requests ended. Once a request and not once a token: each value is a message to the server."""
        # Requests end in two threads, and two that send metrics at once bring the whole server down (Triton 2.51).
        with self._lock:
            self._of("requests", finish=how).increment(requests)
            self._of("prompt_tokens").increment(prompt)
            self._of("generated_tokens").increment(made)
            self._of("first_token_seconds").increment(first)
            self._of("running").set(self._batcher.running)
            self._of("waiting").set(self._batcher.waiting)

    def _of(self, name: str, **labels: str) -> Any:
        key = (name, json.dumps(labels))
        if key not in self._metrics:
            self._metrics[key] = self._families[name].Metric(labels={**self._labels, **labels})
        return self._metrics[key]


class _Client:
    """A listener that answers in one response, or in one for each piece. before: what the text begins with."""

    def __init__(self, sender: Any, metrics: Metrics, prompt: int, stream: bool, before: str) -> None:
        self._sender, self._metrics, self._prompt, self._stream = sender, metrics, prompt, stream
        self._before, self._kept, self._made = before, list[Piece](), 0
        self._since, self._first = time.monotonic(), 0.0

    def cancelled(self) -> bool:
        """Whether Triton has cancelled the request."""
        return bool(self._sender.is_cancelled())

    def tell(self, piece: Piece) -> None:
        """Send what there is to send."""
        if not self._made:
            self._first = time.monotonic() - self._since
        self._made += len(piece.tokens)
        if piece.finish is not None:
            self._metrics.ended(piece.finish, prompt=self._prompt, made=self._made, first=self._first)
        if piece.finish == "error":
            _fail(self._sender, str(piece.error))
        elif piece.finish == "cancelled":
            self._sender.send(flags=FINAL)
        else:
            self._kept.append(piece)
            if self._stream or piece.finish is not None:
                response = _response(self._kept, self._prompt, self._before)
                self._sender.send(response, flags=0 if piece.finish is None else FINAL)
                self._kept, self._before = [], ""


def _executor(artifact: Artifact, parameters: dict[str, str]) -> Any:
    if parameters["engine"] == "trt":
        from export.engines.trt_runner import load_engine

        return load_engine(artifact).executor
    from export.engines.ort import OrtExecutor

    artifact.verify(["onnx"])
    return OrtExecutor(artifact.require_stage("onnx") / "model.onnx", threads=int(parameters["threads"]))


def _response(pieces: list[Piece], prompt: int, before: str) -> Any:
    tokens = [token for piece in pieces for token in piece.tokens]
    logprobs = [value for piece in pieces for value in piece.logprobs]
    likeliest = [place for piece in pieces for place in piece.likeliest]
    values = {
        "text_output": _words(before + "".join(piece.text for piece in pieces)),
        "tokens": np.array([tokens], dtype=np.int32),
        "logprobs_output": np.array([logprobs], dtype=np.float32),
        "top_logprobs": _words(json.dumps(likeliest)),
        "finish_reason": _words(pieces[-1].finish or ""),
        "num_input_tokens": np.array([[prompt]], dtype=np.int32),
        "num_output_tokens": np.array([[len(tokens)]], dtype=np.int32),
    }
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(name, value) for name, value in values.items()])


def _words(text: str) -> Any:
    return np.array([[text.encode()]], dtype=np.object_)


def _fail(sender: Any, reason: str) -> None:
    sender.send(pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(reason)), flags=FINAL)


def _text(request: Any, name: str) -> str | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else _decoded(name, _single(name, tensor.as_numpy()))


def _flag(request: Any, name: str) -> bool | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else bool(_single(name, tensor.as_numpy()))


def _single(name: str, values: Any) -> Any:
    if values.size != 1:
        raise UsageError(f"{name} must have one value, not {values.size}")
    return values.reshape(-1)[0]


def _decoded(name: str, value: Any) -> str:
    try:
        return bytes(value).decode() if not isinstance(value, str) else value
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 ({error})") from error
