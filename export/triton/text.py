"""From tokens to text as it is made: whole characters only, and nothing that may be the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

INCOMPLETE = "\ufffd"  # what a tokenizer makes of a part of a character
LONGEST_CHARACTER = 4  # tokens that one character may be spread over, as a minimum


class Decodes(Protocol):
    """The part of a Hugging Face tokenizer that is needed here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Token ids to text."""
        ...


class TextStream:
    """Feeds on tokens, yields text. `stopped` is set when one of the `stop` strings has come, which is not yielded."""

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._before = self._read = 0  # tokens[before:read] are sent already, and give the others their context
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        self._tokens.append(token)
        told = self._decode(self._tokens[self._before : self._read])
        text = self._decode(self._tokens[self._before :])
        waiting = len(self._tokens) - self._read
        if len(text) <= len(told) or (text.endswith(INCOMPLETE) and waiting <= LONGEST_CHARACTER):
            return ""
        self._before, self._read = self._read, len(self._tokens)
        return self._pass(text[len(told) :])

    def finish(self) -> str:
        """What was held back, now that no more tokens come."""
        if self.stopped:
            return ""
        told = self._decode(self._tokens[self._before : self._read])
        text = self._pass(self._decode(self._tokens[self._before :])[len(told) :])
        self._before = self._read = len(self._tokens)
        held, self._held = ("" if self.stopped else self._held), ""
        return text + held

    def _pass(self, text: str) -> str:
        text, self._held = self._held + text, ""
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        keep = max((self._overlap(text, stop) for stop in self._stop), default=0)
        if keep:
            text, self._held = text[:-keep], text[-keep:]
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Characters at the end of `text` that are a beginning of `stop`."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""
