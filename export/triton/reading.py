"""What a client sent, as a question for the batcher. Everything it can send is either understood or refused by a
sentence; nothing of Triton is needed here but the tensors, as arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from compress.errors import UsageError
from export.triton.settings import LARGEST_PROMPT, MOST_STOPS, Settings, parse_messages
from export.triton.text import Decodes

Inputs = Callable[[str], "npt.NDArray[Any] | None"]
"""A request: name of an input -> its values, None where it was not sent."""
NUMBERS = {
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


class Tokenizer(Decodes, Protocol):
    """The part of a Hugging Face tokenizer that reading and answering need."""

    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        """{"input_ids": token ids, ...} of a text."""
        ...

    def apply_chat_template(self, conversation: Any, *, add_generation_prompt: bool, tokenize: bool) -> Any:
        """Messages to text."""
        ...


@dataclass(frozen=True)
class Question:
    """Tokens, settings, whether to stream, and what the text begins with: the prompt, where that is asked for."""

    ids: tuple[int, ...]
    settings: Settings
    stream: bool
    before: str


class Reader:
    """Reads requests for a tokenizer. longest: tokens of prompt and answer together."""

    def __init__(self, tokenizer: Tokenizer, longest: int) -> None:
        self._tokenizer, self._longest = tokenizer, longest

    def read(self, inputs: Inputs) -> Question:
        """Raises UsageError for everything that makes no sense."""
        text, messages = _text(inputs, "text_input"), _text(inputs, "messages")
        if (text is None) == (messages is None):
            raise UsageError("give text_input, or messages for the chat template, and not both")
        if len(text or messages or "") > LARGEST_PROMPT:
            raise UsageError(f"the prompt has more than {LARGEST_PROMPT} characters")
        settings = _settings(inputs)
        stream, echo = flag(inputs, "stream"), flag(inputs, "exclude_input_in_output") is False
        if text is not None:
            ids = self._tokenizer(text)["input_ids"]
        else:
            ids = self._tokenizer(self._conversation(str(messages)), add_special_tokens=False)["input_ids"]
        settings.setdefault(
            "max_tokens", max(1, settings.get("min_tokens", 0), min(Settings.max_tokens, self._longest - len(ids)))
        )
        return Question(tuple(ids), Settings(**settings), bool(stream), text if text is not None and echo else "")

    def _conversation(self, messages: str) -> str:
        """The text that the chat template makes of messages. What it makes of things that the tokenizer's makers did
        not think of, such as a number where a list belongs, is the client's to mend as much as the roles are."""
        if self._tokenizer.chat_template is None:
            raise UsageError("the tokenizer of this model has no chat template; give text_input")
        from jinja2 import TemplateError

        conversation = parse_messages(messages)
        try:
            made = self._tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:  # such as roles that do not take turns
            raise UsageError(f"the chat template of this model refuses these messages: {error}") from error
        except RecursionError as error:
            raise UsageError("messages are nested too deeply") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UsageError(f"the chat template of this model cannot read these messages ({error})") from error
        text = str(made)
        if len(text) > LARGEST_PROMPT:
            raise UsageError(f"the messages make a prompt of more than {LARGEST_PROMPT} characters")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start].encode("utf-16-be", "surrogatepass").hex()
            raise UsageError(f"messages hold half of a character: \\u{half}, without its other half") from error
        return text


def flag(inputs: Inputs, name: str) -> bool | None:
    """An input of one truth value. Raises UsageError."""
    values = inputs(name)
    return None if values is None else bool(_single(name, values))


def _settings(inputs: Inputs) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, kind in NUMBERS.items():
        values = inputs(name)
        if values is not None:
            given[name] = kind(_single(name, values))
    for name in ("stop", "stop_words"):
        stops = inputs(name)
        if stops is not None:
            if stops.size > MOST_STOPS:
                raise UsageError(f"{name} has {stops.size} strings; at most {MOST_STOPS} are looked for")
            given["stop"] = (*given.get("stop", ()), *(_decoded(name, item) for item in stops.reshape(-1)))
    Settings(**{"max_tokens": max(1, given.get("min_tokens", 0)), **given})  # refused before any text is read
    return given


def _text(inputs: Inputs, name: str) -> str | None:
    values = inputs(name)
    return None if values is None else _decoded(name, _single(name, values))


def _single(name: str, values: npt.NDArray[Any]) -> Any:
    if values.size != 1:
        raise UsageError(f"{name} must have one value, not {values.size}")
    return values.reshape(-1)[0]


def _decoded(name: str, value: Any) -> str:
    try:
        return bytes(value).decode() if not isinstance(value, (str, np.str_)) else str(value)
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 ({error})") from error
