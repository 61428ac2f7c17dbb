"""What a client may ask of a generation, checked before any work is done for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from compress.errors import UsageError

LARGEST_PROMPT = 1 << 20
"""Characters; longer ones are refused before they are tokenised, whatever the model."""
MOST_STOPS, LONGEST_STOP, MOST_LOGPROBS, MOST_PENALTY = 16, 1024, 20, 2
MOST_TEMPERATURE = 100.0
"""Draws almost uniformly."""
LEAST_REPETITION, MOST_REPETITION = 0.1, 10.0


@dataclass(frozen=True)
class Settings:
    """temperature 0 is greedy; top_k 0 and top_p 1 leave every token in; repetition_penalty 1 changes nothing.

    repetition_penalty r divides the positive logits of tokens that were there before, in the prompt or the answer, by r
    and multiplies the negative ones by it (CTRL, arXiv 1909.05858, section 4.1). From the logit of a token that the
    answer has n times already, n frequency_penalty and, where n > 0, presence_penalty are subtracted (as in OpenAI's
    interface). logprobs: so many of the likeliest tokens are sent at each place, beside the one that was taken; None:
    none. Raises UsageError.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        checks = (
            (self.max_tokens >= 1, f"max_tokens must be 1 or more, not {self.max_tokens}"),
            (
                0 <= self.min_tokens <= self.max_tokens,
                f"min_tokens must be 0 to max_tokens ({self.max_tokens}), not {self.min_tokens}",
            ),
            (
                0 <= self.temperature <= MOST_TEMPERATURE,
                f"temperature must be 0 (greedy) to {MOST_TEMPERATURE:g}, not {self.temperature:g}",
            ),
            (self.top_k >= 0, f"top_k must be 0 (all) or more, not {self.top_k}"),
            (0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p:g}"),
            (
                LEAST_REPETITION <= self.repetition_penalty <= MOST_REPETITION,
                f"repetition_penalty must be {LEAST_REPETITION:g} to {MOST_REPETITION:g}, "
                f"not {self.repetition_penalty:g}",
            ),
            *(
                (abs(value) <= MOST_PENALTY, f"{name} must be -{MOST_PENALTY} to {MOST_PENALTY}, not {value:g}")
                for name, value in (
                    ("frequency_penalty", self.frequency_penalty),
                    ("presence_penalty", self.presence_penalty),
                )
            ),
            (0 <= self.seed < 2**64, f"seed must be 0 to 2^64 - 1, not {self.seed}"),
            (all(self.stop), "a stop string must not be empty"),
            (len(self.stop) <= MOST_STOPS, f"at most {MOST_STOPS} stop strings, not {len(self.stop)}"),
            (
                max(map(len, self.stop), default=0) <= LONGEST_STOP,
                f"a stop string has at most {LONGEST_STOP} characters, not {max(map(len, self.stop), default=0)}",
            ),
            (
                self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
                f"logprobs must be 0 to {MOST_LOGPROBS}, not {self.logprobs}",
            ),
        )  # comparisons with NaN are false
        for good, reason in checks:
            if not good:
                raise UsageError(reason)


def parse_messages(text: str) -> list[dict[str, Any]]:
    """[{"role": ..., "content": ...}, ...] from JSON, for the tokenizer's chat template. Raises UsageError."""
    try:
        messages = json.loads(text)
    except ValueError as error:
        raise UsageError(f"messages are not JSON ({error})") from error
    except RecursionError as error:
        raise UsageError("messages are nested too deeply") from error
    if not isinstance(messages, list) or not messages:
        raise UsageError('messages must be a JSON list, and not an empty one, of {"role": ..., "content": ...}')
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UsageError(f'messages[{number}] must be an object with a "role" and a "content"')
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UsageError(f'messages[{number}] must have a "{key}" that is a string')
    return messages
