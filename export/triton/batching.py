"""Requests for text, answered together: continuous batching over `export.engines.slots`, one thread for all of them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from compress.errors import ProcrustesError, UsageError
from export.engines.sampling import Sampler
from export.engines.slots import Slots
from export.triton.settings import Settings
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


class Listener(Protocol):
    """Whoever asked. Called from the thread that decodes."""

    def tell(self, piece: Piece) -> None:
        """The next piece; the last one has `finish`."""
        ...

    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
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
    """Answers requests until `close`. Raises UsageError at once for a request that can never be answered."""

    def __init__(
        self,
        slots: Slots,
        tokenizer: Decodes,
        ends: Sequence[int],
        *,
        most_waiting: int = 1024,
    ) -> None:
        """ends: tokens that end an answer. most_waiting: requests beyond it are refused until others are answered."""
        self._slots, self._tokenizer, self._ends = slots, tokenizer, frozenset(ends)
        self._waiting: queue.Queue[_Answer | None] = queue.Queue(most_waiting)
        self._running: dict[int, _Answer] = {}
        self._closing = threading.Event()
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

    def submit(self, ids: Sequence[int], settings: Settings, listener: Listener) -> None:
        """Answer a prompt; pieces go to the listener. UsageError: it is empty or too long, or too many wait."""
        slots = self._slots
        if not ids:
            raise UsageError("the prompt is empty")
        if len(ids) > slots.longest_prompt:
            raise UsageError(f"the prompt has {len(ids)} tokens; this model takes at most {slots.longest_prompt}")
        if len(ids) + settings.max_tokens > slots.longest:
            raise UsageError(
                f"the prompt has {len(ids)} tokens and max_tokens is {settings.max_tokens}; together they may be at "
                f"most {slots.longest} here"
            )
        if self._closing.is_set():
            raise UsageError("the model is being unloaded")
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

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._running or not self._closing.is_set():
                self._admit()
                if self._running:
                    self._step()
        finally:  # also where this thread fails: nobody may wait for ever
            self._closing.set()
            for answer in self._running.values():
                answer.listener.tell(Piece("", finish="error", error="the model has failed; see the server's log"))
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
            try:
                answer.handle, logits = self._slots.admit(answer.ids)
            except (ProcrustesError, RuntimeError, MemoryError) as error:
                answer.listener.tell(Piece("", finish="error", error=str(error)))
                continue
            self._running[answer.handle] = answer
            self._take(answer, logits)

    def _step(self) -> None:
        for answer in list(self._running.values()):
            if answer.listener.cancelled():
                self._end(answer, Piece("", finish="cancelled"))
        if not self._running:
            return
        order = [self._running[handle] for handle in self._slots.active]
        try:
            logits = self._slots.step([answer.made[-1] for answer in order])
        except (ProcrustesError, RuntimeError, MemoryError) as error:  # nobody's answer can go on from here
            for answer in order:
                self._end(answer, Piece("", finish="error", error=str(error)))
            return
        self.steps += 1
        for answer, row in zip(order, logits, strict=True):
            self._take(answer, row)

    def _take(self, answer: _Answer, logits: npt.NDArray[np.float32]) -> None:
        """Choose the next token and tell it."""
        settings = answer.settings
        if not np.isfinite(logits).all():
            self._end(answer, Piece("", finish="error", error="the model gave logits that are not finite"))
            return
        steered = self._steered(answer, logits)
        token = int(answer.sampler(steered[None])[0])
        answer.made.append(token)
        logprobs, likeliest = self._logprobs(logits, token, settings.logprobs)
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
        piece = Piece(text, (token,), logprobs, likeliest, finish)
        if finish is None:
            answer.listener.tell(piece)
        else:
            self._end(answer, piece)

    def _steered(self, answer: _Answer, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        settings = answer.settings
        early = len(answer.made) < settings.min_tokens and self._ends
        additive = bool(answer.made) and (settings.frequency_penalty != 0 or settings.presence_penalty != 0)
        if settings.repetition_penalty == 1.0 and not early and not additive:
            return logits
        steered: npt.NDArray[np.float32] = logits.copy()
        if settings.repetition_penalty != 1.0:
            there = np.unique(np.array(answer.ids + answer.made))
            values, r = steered[there], settings.repetition_penalty
            steered[there] = np.where(values > 0, values / r, values * r)
        if additive:
            there, counts = np.unique(np.array(answer.made), return_counts=True)
            steered[there] -= settings.frequency_penalty * counts + settings.presence_penalty
        if early:
            steered[list(self._ends)] = -np.inf
        return steered

    @staticmethod
    def _logprobs(
        logits: npt.NDArray[np.float32], token: int, count: int | None
    ) -> tuple[tuple[float, ...], tuple[dict[int, float], ...]]:
        """Of the model itself, before temperature and penalties."""
        if count is None:
            return (), ()
        wide = logits.astype(np.float64)
        log = wide - wide.max()
        log -= np.log(np.exp(log).sum())
        best = np.argsort(-log, kind="stable")[:count]
        return (float(log[token]),), ({int(i): float(log[i]) for i in best},)

    def _end(self, answer: _Answer, piece: Piece) -> None:
        del self._running[answer.handle]
        self._slots.release(answer.handle)
        answer.listener.tell(piece)

    def _refuse_the_rest(self) -> None:
        while True:
            try:
                answer = self._waiting.get_nowait()
            except queue.Empty:
                return
            if answer is not None:
                answer.listener.tell(Piece("", finish="error", error="the model is being unloaded"))
