"""The model that Triton's python backend runs: text in, text out, decoupled. Its 1/model.py imports this."""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import Any, cast

import triton_python_backend_utils as pb_utils

from compress.artifact.store import Artifact
from compress.progress import log
from export.runtime.slots import Slots
from export.triton.answers import Client, Health, Metrics, Refusal, unwell
from export.triton.batching import Batcher
from export.triton.failures import Contained
from export.triton.post import Post
from export.triton.reading import Inputs, Reader, Tokenizer, flag
from export.triton.served import configured, sound_graph, sound_tokenizer

LOOK = 0.1
"""Seconds between two looks whether requests are cancelled."""


class TritonPythonModel:
    """See the interface of Triton's python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine and answer one request, so that the first client waits for nothing."""
        artifact, parameters = configured(args)
        folder = sound_tokenizer(artifact)
        slots = Slots(_executor(artifact, parameters), int(parameters["sequences"]))
        from transformers import AutoTokenizer

        from compress.checkpoint.loading import register

        register()  # the tokenizer's files are beside a config.json of our model type
        tokenizer = cast(Tokenizer, AutoTokenizer.from_pretrained(folder, local_files_only=True))
        ends = slots.executor.metadata["eos_token_id"]
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        handle, _ = slots.admit([0] * max(1, slots.executor.spans.prompt.least))
        slots.step([0])
        slots.release(handle)
        self.reader = Reader(tokenizer, slots.longest)
        self.batcher = Batcher(slots, tokenizer, ends)
        self.metrics, self.post = Metrics(args["model_name"], self.batcher), Post(LOOK)
        self.closing = False
        for watch in (self._end_with_batcher, self._end_with_post):
            threading.Thread(target=watch, name="watch", daemon=True).start()

    def execute(self, requests: list[Any]) -> None:
        """Put requests into the batch; answers go out from its thread. One that fails leaves the others alone."""
        for request in requests:
            sender = request.get_response_sender()
            with Contained(partial(self._refuse, sender)):
                self._take(request, sender)

    def is_ready(self) -> bool:
        """For /v2/models/NAME/ready of the Triton versions that ask (2026 and later)."""
        return unwell(self.batcher) is None

    def finalize(self) -> None:
        """Finish what is running."""
        self.closing = True
        self.batcher.close()
        self.post.close()

    def _take(self, request: Any, sender: Any) -> None:
        inputs = _inputs(request)
        if flag(inputs, "health"):
            self.post.put(Health(sender, self.batcher))
            return
        question = self.reader.read(inputs)
        settings = question.settings
        client = Client(
            sender,
            self.metrics,
            self.post,
            prompt=len(question.ids),
            stream=question.stream,
            told=settings.logprobs is not None,
            before=question.before,
        )
        self.batcher.submit(question.ids, settings, client)
        self.post.put(client)

    def _refuse(self, sender: Any, reason: str) -> None:
        self.post.put(Refusal(sender, self.metrics, reason))

    def _end_with_batcher(self) -> None:
        self.batcher.join()
        if self.batcher.failed:
            self.post.close()  # every client has its answer
            _end_process("the thread that decodes has failed")

    def _end_with_post(self) -> None:
        self.post.join()
        if not self.closing and not self.batcher.failed:
            _end_process("the thread that sends the answers has failed")


def _end_process(reason: str) -> None:
    """Triton answers every request with an error from now on, which launch.sh and the probes see."""
    log(f"{reason}: this process ends, and launch.sh, or whatever watches probe.py, starts the server again")
    os._exit(1)


def _inputs(request: Any) -> Inputs:
    def values(name: str) -> Any:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy()

    return values


def _executor(artifact: Artifact, parameters: dict[str, str]) -> Any:
    if parameters["engine"] == "trt":
        from export.tensorrt.engine import load_engine

        return load_engine(artifact).executor
    from export.runtime.ort import OrtExecutor

    return OrtExecutor(sound_graph(artifact), threads=int(parameters["threads"]))
