"""The model that Triton's python backend runs: text in, text out, decoupled. Its 1/model.py imports this."""

from __future__ import annotations

from typing import Any, cast

import triton_python_backend_utils as pb_utils

from compress.artifact import Artifact
from compress.errors import UsageError
from export.engines.slots import Slots
from export.triton.answers import Client, Metrics, Refusal
from export.triton.batching import Batcher
from export.triton.post import Post
from export.triton.served import configured, sound_graph
from export.triton.settings import LARGEST_PROMPT, Settings, parse_messages
from export.triton.text import Decodes

LOOK = 0.1
"""Seconds between two looks whether requests are cancelled."""
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
        artifact, parameters = configured(args)
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
        self.metrics, self.post = Metrics(args["model_name"], self.batcher), Post(LOOK)

    def execute(self, requests: list[Any]) -> None:
        """Put requests into the batch; answers go out from its thread."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                ids, settings, stream, before = self._read(request)
                told = settings.logprobs is not None
                client = Client(
                    sender, self.metrics, self.post, prompt=len(ids), stream=stream, told=told, before=before
                )
                self.batcher.submit(ids, settings, client)
                self.post.put(client)
            except UsageError as error:
                self.post.put(Refusal(sender, self.metrics, str(error)))

    def finalize(self) -> None:
        """Finish what is running."""
        self.batcher.close()
        self.post.close()

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


def _executor(artifact: Artifact, parameters: dict[str, str]) -> Any:
    if parameters["engine"] == "trt":
        from export.engines.trt_runner import load_engine

        return load_engine(artifact).executor
    from export.engines.ort import OrtExecutor

    return OrtExecutor(sound_graph(artifact), threads=int(parameters["threads"]))


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
