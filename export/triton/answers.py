"""Answers on their way to Triton: from pieces to responses, refusals, and metrics. Runs inside the python backend."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from compress.progress import log
from export.triton.batching import DEAD, Batcher, Piece
from export.triton.failures import sendable
from export.triton.post import Post

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
STUCK = 600
"""Seconds after which one step, or one prompt, is taken for an engine that will not come back."""


class Metrics:
    """What Triton's own metrics do not say, beside them on its metrics port: tokens, ends, waiting, first tokens.

    For the thread of `Post` alone, but for the constructor.
    """

    def __init__(self, model: str, batcher: Batcher) -> None:
        self._labels, self._batcher, self._families = {"model": model}, batcher, dict[str, Any]()
        self._metrics = dict[tuple[str, str], Any]()
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


class Refusal:
    """The answer to a request that is never answered. See `post.Parcel`."""

    def __init__(self, sender: Any, metrics: Metrics, reason: str) -> None:
        self._sender, self._metrics, self._reason = sender, metrics, reason

    def deliver(self) -> bool:
        """An error."""
        self._metrics.ended("refused")
        _send(self._sender, _error(self._reason), last=True)
        return True

    def look(self) -> None:
        """Nothing to find out."""

    def fail(self, reason: str) -> None:
        """See `post.Parcel`."""
        _send(self._sender, _error(reason), last=True)


class Health:
    """The answer to a request that asks for nothing but whether others would be answered. See `post.Parcel`."""

    def __init__(self, sender: Any, batcher: Batcher) -> None:
        self._sender, self._batcher = sender, batcher

    def deliver(self) -> bool:
        """`ready`, or an error; without an entry in the metrics, for no text was asked for."""
        reason = unwell(self._batcher)
        if reason is None:
            response = pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("text_output", _words("ready"))])
        else:
            response = _error(reason)
        _send(self._sender, response, last=True)
        return True

    def look(self) -> None:
        """Nothing to find out."""

    def fail(self, reason: str) -> None:
        """See `post.Parcel`."""
        _send(self._sender, _error(reason), last=True)


def unwell(batcher: Batcher) -> str | None:
    """Why a request would not be answered now; None where it would."""
    if batcher.failed:
        return DEAD
    if batcher.engine_seconds > STUCK:
        return f"the engine has been at one step for more than {STUCK} seconds"
    return None


class Client:
    """A listener of the batcher whose pieces go out by post: all in one response, or in a stream of those that have
    come since the last one. told: log-probabilities are wanted; before: what the text begins with."""

    def __init__(
        self, sender: Any, metrics: Metrics, post: Post, *, prompt: int, stream: bool, told: bool, before: str
    ) -> None:
        self._sender, self._metrics, self._post = sender, metrics, post
        self._prompt, self._stream, self._told, self._before = prompt, stream, told, before
        self._lock, self._pieces = threading.Lock(), list[Piece]()
        self._since, self._first, self._made = time.monotonic(), 0.0, 0
        self._cancelled = self._complete = False

    # -- for the batcher -----------------------------------------------------------------------------------

    def tell(self, piece: Piece) -> None:
        """See `batching.Listener`."""
        if not self._made:
            self._first = time.monotonic() - self._since
        self._made += len(piece.tokens)
        with self._lock:
            self._pieces.append(piece)
        if self._stream or piece.finish is not None:
            self._post.put(self)

    def cancelled(self) -> bool:
        """The result of the last look."""
        return self._cancelled

    # -- for the post --------------------------------------------------------------------------------------

    def look(self) -> None:
        """See `post.Parcel`."""
        self._cancelled = bool(self._sender.is_cancelled())

    def deliver(self) -> bool:
        """See `post.Parcel`."""
        if self._complete:  # it failed, and the batcher did not know yet
            return True
        with self._lock:
            pieces = self._pieces if self._stream or (self._pieces and self._pieces[-1].finish is not None) else []
            self._pieces = self._pieces[len(pieces) :]
        if not pieces:
            return self._complete
        finish = pieces[-1].finish
        self._complete = finish is not None
        if finish is not None:
            self._metrics.ended(finish, prompt=self._prompt, made=self._made, first=self._first)
        if finish == "error":
            response = _error(str(pieces[-1].error))
        elif finish == "cancelled":
            response = None
        else:
            response, self._before = _response(pieces, self._prompt, self._told, self._before), ""
        if not _send(self._sender, response, last=self._complete):
            self._cancelled = True
        return self._complete

    def fail(self, reason: str) -> None:
        """See `post.Parcel`. The batcher finds it cancelled."""
        self._cancelled = self._complete = True
        _send(self._sender, _error(reason), last=True)


def _send(sender: Any, response: Any, *, last: bool) -> bool:
    """Send; True if the server took it."""
    try:
        if response is None:
            sender.send(flags=FINAL)
        else:
            sender.send(response, flags=FINAL if last else 0)
    except pb_utils.TritonModelException as error:  # a client that is gone is no reason to leave the others
        log(f"a response was not sent: {error}")
        return False
    return True


def _error(reason: str) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(sendable(reason)))


def _response(pieces: list[Piece], prompt: int, told: bool, before: str) -> Any:
    """One response with the outputs that were asked for: each tensor has its price, and every token has a response."""
    tokens = [token for piece in pieces for token in piece.tokens]
    values = {
        "text_output": _words(before + "".join(piece.text for piece in pieces)),
        "tokens": np.array([tokens], dtype=np.int32),
        "finish_reason": _words(pieces[-1].finish or ""),
        "num_input_tokens": np.array([[prompt]], dtype=np.int32),
        "num_output_tokens": np.array([[len(tokens)]], dtype=np.int32),
    }
    if told:
        logprobs = [value for piece in pieces for value in piece.logprobs]
        values["logprobs_output"] = np.array([logprobs], dtype=np.float32)
        values["top_logprobs"] = _words(json.dumps([place for piece in pieces for place in piece.likeliest]))
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(name, value) for name, value in values.items()])


def _words(text: str) -> Any:
    return np.array([[text.encode()]], dtype=np.object_)
