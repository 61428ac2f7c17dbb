"""Requests for text, answered together: continuous batching over `export.runtime.slots`, one thread for all of them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from compress.errors import ProcrustesError, UsageError
from compress.progress import log
from export.runtime.sampling import Sampler
from export.runtime.slots import Slots
from export.triton.failures import Contained
from export.triton.settings import Settings
from export.triton.steering import log_probabilities, steered
from export.triton.text import Decodes, TextStream


@dataclass(frozen=True)
class Piece:
    """What one step adds to an answer. finish: None, "length", "stop" (an end token or a stop string), "cancelled" or
    "error"; logprobs: of each token, and `likeliest` {token: logprob} of each place where that was asked for."""

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    likeliest: tuple[dict[int, float], ...] = ()
    finish: str | None = None
    error: str | None = None


ENGINE_FAILED = "the engine failed while it answered; the server's log has the details"
UNLOADED = "the model is being unloaded"
DEAD = "the model has failed and is about to be started again; the server's log has the details"


class Listener(Protocol):
    """Whoever asked. Called from the thread that decodes."""

    def tell(self, piece: Piece) -> None:
        """The next piece; the last one has `finish`."""
        ...

    def cancelled(self) -> bool:
        """True when no client waits for the answer any more."""
        ...


@dataclass
class _Answer:
    ids: list[int]
    settings: Settings
    listener: Listener
    stream: TextStream
    sampler: Sampler
    handle: int = -1
    made: list[int] = field(default_factory=list)


class Batcher:
    """Answers requests until `close`. Raises UsageError at once for a request that can never be answered.

    A request that fails ends alone. When the engine fails, the requests that were in it end, and it is tried with the
    smallest prompt: an engine that fails at that too, or a defect of this loop, ends the thread, and `failed` is set.
    """

    def __init__(
        self,
        slots: Slots,
        tokenizer: Decodes,
        ends: Sequence[int],
        *,
        most_waiting: int = 1024,
    ) -> None:
        """ends: tokens that end an answer. most_waiting: requests beyond it are refused until others are answered."""
        self._slots, self._tokenizer = slots, tokenizer
        self._vocabulary = slots.executor.vocabulary
        self._ends = frozenset(end for end in ends if 0 <= end < self._vocabulary)
        self._waiting: queue.Queue[_Answer | None] = queue.Queue(most_waiting)
        self._running: dict[int, _Answer] = {}
        self._entering: list[_Answer] = []  # the one whose prompt is being read
        self._closing = threading.Event()
        self._called: float | None = None
        self.failed = False
        self.steps = 0
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return self._waiting.qsize()

    @property
    def engine_seconds(self) -> float:
        """For how long the engine has been at its present step or prompt; 0 between two of them."""
        called = self._called
        return 0.0 if called is None else time.monotonic() - called

    def submit(self, ids: Sequence[int], settings: Settings, listener: Listener) -> None:
        """Answer a prompt; pieces go to the listener. UsageError: it is empty or too long, or too many wait."""
        slots = self._slots
        if not ids:
            raise UsageError("the prompt is empty")
        if not 0 <= min(ids) <= max(ids) < self._vocabulary:
            raise UsageError(
                f"the prompt has a token that this model lacks: number {max(ids)} of {self._vocabulary}, counted from 0"
            )
        if len(ids) > slots.longest_prompt:
            raise UsageError(f"the prompt has {len(ids)} tokens; this model takes at most {slots.longest_prompt}")
        if len(ids) + settings.max_tokens > slots.longest:
            raise UsageError(
                f"the prompt has {len(ids)} tokens and max_tokens is {settings.max_tokens}; together they may be at "
                f"most {slots.longest} here"
            )
        if self._closing.is_set():
            raise UsageError(self._ending)
        sampler = Sampler(
            temperature=settings.temperature,
            top_k=settings.top_k or None,
            top_p=settings.top_p,
            seed=settings.seed,
        )
        stream = TextStream(self._tokenizer, settings.stop)
        try:
            self._waiting.put_nowait(_Answer(list(ids), settings, listener, stream, sampler))
        except queue.Full:
            raise UsageError("too many requests are waiting; try again later") from None

    def close(self) -> None:
        """Finish what is running, refuse what waits, and end the thread."""
        self._closing.set()
        with suppress(queue.Full):  # a full queue wakes the thread as well
            self._waiting.put_nowait(None)
        self._thread.join()

    def join(self) -> None:
        """Wait until the thread has ended: after `close`, or with `failed`."""
        self._thread.join()

    # -- the thread ----------------------------------------------------------------------------------------

    @property
    def _ending(self) -> str:
        return DEAD if self.failed else UNLOADED

    def _run(self) -> None:
        whole = False
        try:
            while self._running or not self._closing.is_set():
                self._admit()
                if self._running:
                    self._step()
            whole = True
        finally:  # also where this thread fails: no client may wait for ever
            self.failed = not whole
            self._closing.set()
            for answer in [*self._running.values(), *self._entering]:
                answer.listener.tell(Piece("", finish="error", error=DEAD))
            self._refuse_the_rest()

    def _admit(self) -> None:
        """Take what waits into free rows; wait for something where nothing runs."""
        while len(self._running) < self._slots.rows and not self._closing.is_set():
            try:
                answer = self._waiting.get(block=not self._running)
            except queue.Empty:
                return
            if answer is None:
                return
            if answer.listener.cancelled():
                answer.listener.tell(Piece("", finish="cancelled"))
                continue
            self._entering = [answer]
            try:
                with self._engine():
                    answer.handle, logits = self._slots.admit(answer.ids)
            except (ProcrustesError, RuntimeError, MemoryError) as error:
                self._entering = []
                answer.listener.tell(Piece("", finish="error", error=_reason(error)))
                if not self._running:  # those that run find out by their next step
                    self._try_engine()
                continue
            self._running[answer.handle], self._entering = answer, []
            self._take(answer, logits)

    def _step(self) -> None:
        for answer in list(self._running.values()):
            if answer.listener.cancelled():
                self._end(answer, Piece("", finish="cancelled"))
        if not self._running:
            return
        order = [self._running[handle] for handle in self._slots.active]
        try:
            with self._engine():
                logits = self._slots.step([answer.made[-1] for answer in order])
        except (ProcrustesError, RuntimeError, MemoryError) as error:  # no answer can go on from here
            for answer in order:
                self._end(answer, Piece("", finish="error", error=_reason(error)))
            self._try_engine()
            return
        self.steps += 1
        for answer, row in zip(order, logits, strict=True):
            self._take(answer, row)

    def _try_engine(self) -> None:
        """After a failure, and with free rows: an engine that cannot read the smallest prompt answers none."""
        with self._engine():
            handle, _ = self._slots.admit([0] * max(1, self._slots.executor.spans.prompt.least))
        self._slots.release(handle)

    @contextmanager
    def _engine(self) -> Iterator[None]:
        self._called = time.monotonic()
        try:
            yield
        finally:
            self._called = None

    def _take(self, answer: _Answer, logits: npt.NDArray[np.floating[Any]]) -> None:
        """Choose the next token and pass it on."""
        with Contained(lambda reason: self._fail(answer, reason)):
            piece = self._next(answer, logits)
            if piece.finish is None:
                answer.listener.tell(piece)
            else:
                self._end(answer, piece)

    def _next(self, answer: _Answer, logits: npt.NDArray[np.floating[Any]]) -> Piece:
        settings = answer.settings
        if not np.isfinite(logits).all():
            return Piece("", finish="error", error="the model gave logits that are not finite")
        changed = steered(logits, settings, prompt=answer.ids, made=answer.made, ends=self._ends)
        token = int(answer.sampler(changed[None])[0])
        answer.made.append(token)
        logprobs, likeliest = log_probabilities(logits, token, settings.logprobs)
        ended = token in self._ends
        text = "" if ended else answer.stream.add(token)
        finish = None
        if ended or answer.stream.stopped:
            finish = "stop"
        elif len(answer.made) == settings.max_tokens:
            finish = "length"
        if finish is not None:
            text += answer.stream.finish()
            finish = "stop" if answer.stream.stopped else finish
        return Piece(text, (token,), logprobs, likeliest, finish)

    def _end(self, answer: _Answer, piece: Piece) -> None:
        del self._running[answer.handle]
        self._slots.release(answer.handle)
        answer.listener.tell(piece)

    def _fail(self, answer: _Answer, reason: str) -> None:
        if answer.handle in self._running:  # else it had its last piece, and failed at that
            self._end(answer, Piece("", finish="error", error=reason))

    def _refuse_the_rest(self) -> None:
        while True:
            try:
                answer = self._waiting.get_nowait()
            except queue.Empty:
                return
            if answer is not None:
                answer.listener.tell(Piece("", finish="error", error=self._ending))


def _reason(error: Exception) -> str:
    """Message to a client about a failing engine. What is no UsageError is for the operator, and may name files."""
    if isinstance(error, UsageError):
        return str(error)
    log(f"the engine failed: {error}")
    return ENGINE_FAILED
