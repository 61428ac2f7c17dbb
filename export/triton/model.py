"""The model that Triton's python backend runs: text in, text out, decoupled. Its 1/model.py imports this."""

from __future__ import annotations

import json
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

    def execute(self, requests: list[Any]) -> None:
        """Put requests into the batch; answers go out from its thread."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                ids, settings, stream = self._read(request)
                self.batcher.submit(ids, settings, _Client(sender, stream))
            except UsageError as error:
                _fail(sender, str(error))

    def finalize(self) -> None:
        """Finish what is running."""
        self.batcher.close()

    def _read(self, request: Any) -> tuple[list[int], Settings, bool]:
        text, messages = _text(request, "text_input"), _text(request, "messages")
        if (text is None) == (messages is None):
            raise UsageError("give text_input, or messages for the chat template, and not both")
        if len(text or messages or "") > LARGEST_PROMPT:
            raise UsageError(f"the prompt has more than {LARGEST_PROMPT} characters")
        if text is not None:
            ids = self.tokenizer(text)["input_ids"]
        elif self.tokenizer.chat_template is None:
            raise UsageError("the tokenizer of this model has no chat template; give text_input")
        else:
            found = self.tokenizer.apply_chat_template(
                parse_messages(str(messages)), add_generation_prompt=True, tokenize=False
            )
            ids = self.tokenizer(found, add_special_tokens=False)["input_ids"]
        given: dict[str, Any] = {}
        for name, kind in SCALARS.items():
            value = pb_utils.get_input_tensor_by_name(request, name)
            if value is not None:
                given[name] = kind(_single(name, value.as_numpy()))
        stops = pb_utils.get_input_tensor_by_name(request, "stop")
        if stops is not None:
            given["stop"] = tuple(_decoded("stop", item) for item in stops.as_numpy().reshape(-1))
        stream = pb_utils.get_input_tensor_by_name(request, "stream")
        wanted = False if stream is None else bool(_single("stream", stream.as_numpy()))
        given.setdefault("max_tokens", max(1, min(Settings.max_tokens, self.longest - len(ids))))
        return list(ids), Settings(**given), wanted


class _Client:
    """A listener that answers in one response, or in one for each piece."""

    def __init__(self, sender: Any, stream: bool) -> None:
        self._sender, self._stream = sender, stream
        self._kept: list[Piece] = []

    def cancelled(self) -> bool:
        """Whether Triton has cancelled the request."""
        return bool(self._sender.is_cancelled())

    def tell(self, piece: Piece) -> None:
        """Send what there is to send."""
        if piece.finish == "error":
            _fail(self._sender, str(piece.error))
        elif piece.finish == "cancelled":
            self._sender.send(flags=FINAL)
        else:
            self._kept.append(piece)
            if self._stream or piece.finish is not None:
                self._sender.send(_response(self._kept), flags=0 if piece.finish is None else FINAL)
                self._kept = []


def _executor(artifact: Artifact, parameters: dict[str, str]) -> Any:
    if parameters["engine"] == "trt":
        from export.engines.trt_runner import load_engine

        return load_engine(artifact).executor
    from export.engines.ort import OrtExecutor

    artifact.verify(["onnx"])
    return OrtExecutor(artifact.require_stage("onnx") / "model.onnx", threads=int(parameters["threads"]))


def _response(pieces: list[Piece]) -> Any:
    tokens = [token for piece in pieces for token in piece.tokens]
    logprobs = [value for piece in pieces for value in piece.logprobs]
    likeliest = [place for piece in pieces for place in piece.likeliest]
    values = {
        "text_output": np.array(["".join(piece.text for piece in pieces).encode()], dtype=np.object_),
        "tokens": np.array(tokens, dtype=np.int32),
        "logprobs_output": np.array(logprobs, dtype=np.float32),
        "top_logprobs": np.array([json.dumps(likeliest).encode()], dtype=np.object_),
        "finish_reason": np.array([(pieces[-1].finish or "").encode()], dtype=np.object_),
    }
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(name, value) for name, value in values.items()])


def _fail(sender: Any, reason: str) -> None:
    sender.send(pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(reason)), flags=FINAL)


def _text(request: Any, name: str) -> str | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else _decoded(name, _single(name, tensor.as_numpy()))


def _single(name: str, values: Any) -> Any:
    if values.size != 1:
        raise UsageError(f"{name} must have one value, not {values.size}")
    return values.reshape(-1)[0]


def _decoded(name: str, value: Any) -> str:
    try:
        return bytes(value).decode() if not isinstance(value, str) else value
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 ({error})") from error
