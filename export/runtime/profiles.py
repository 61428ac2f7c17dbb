"""Which sizes a TensorRT engine takes: one optimisation profile for prefill, one for decode. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compress.errors import UsageError

Axes = Mapping[str, Sequence[int | str]]
"""Input -> its axes: sizes, and names of those that vary."""
Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]
"""Input -> its smallest, best and largest shape."""


@dataclass(frozen=True)
class Span:
    """The smallest, the usual and the largest of a size; an engine is fastest at the usual one."""

    least: int
    best: int
    most: int

    def __str__(self) -> str:
        return f"{self.least},{self.best},{self.most}"


@dataclass(frozen=True)
class Spans:
    """batch: sequences; prompt: new tokens of a prefill; cache: tokens in the cache when one more is decoded."""

    batch: Span = Span(1, 1, 8)
    prompt: Span = Span(1, 256, 1024)
    cache: Span = Span(1, 512, 2048)

    @classmethod
    def parse(cls, batch: str | None, prompt: str | None, cache: str | None, positions: int) -> Spans:
        """From MIN,OPT,MAX; None: the default, as far as the model's `positions` allow. Raises UsageError."""
        default = cls()
        return cls(
            default.batch if batch is None else _span("--batch", batch),
            _within(default.prompt, positions) if prompt is None else _span("--prompt", prompt, positions),
            _within(default.cache, positions - 1) if cache is None else _span("--cache", cache, positions - 1),
        )

    def flags(self) -> list[str]:
        """What `parse` takes, as flags of export.build."""
        return ["--batch", str(self.batch), "--prompt", str(self.prompt), "--cache", str(self.cache)]

    def profiles(self, axes: Axes) -> list[Profile]:
        """[prefill, decode] for the inputs of an exported graph.

        A prefill may also go on from a cache, of any size up to the largest; it is fastest from an empty one. A decode
        step has one new token a sequence.
        """
        batches, past = _sizes(self.batch), (0, 0, self.cache.most)
        prefill = list(zip(batches, _sizes(self.prompt), past, strict=True))
        decode = list(zip(batches, (1, 1, 1), _sizes(self.cache), strict=True))
        return [_profile(axes, points) for points in (prefill, decode)]


PREFILL, DECODE = 0, 1
"""Which profile is which."""


def shape_at(axes: Sequence[int | str], batch: int, new: int, past: int) -> Shape:
    """The shape of an input of an exported graph for so many sequences, new tokens and tokens in the cache."""
    named = {"batch": batch, "sequence": new, "past_sequence": past, "total_sequence": past + new}
    return tuple(axis if isinstance(axis, int) else named[axis] for axis in axes)


def _profile(axes: Axes, points: Sequence[tuple[int, int, int]]) -> Profile:
    least, best, most = points
    return {name: (shape_at(a, *least), shape_at(a, *best), shape_at(a, *most)) for name, a in axes.items()}


def _sizes(span: Span) -> tuple[int, int, int]:
    return span.least, span.best, span.most


def _within(span: Span, most: int) -> Span:
    return Span(span.least, min(span.best, most), min(span.most, most))


def _span(flag: str, text: str, limit: int | None = None) -> Span:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise UsageError(f"{flag} {text!r} is not MIN,OPT,MAX: give three numbers, as in 1,8,64")
    least, best, most = map(int, parts)
    if not 1 <= least <= best <= most:
        raise UsageError(f"{flag} {text!r} must rise from 1 or more: MIN <= OPT <= MAX")
    if limit is not None and most > limit:
        raise UsageError(f"{flag} {text!r} goes beyond the model's positions, which allow {limit}")
    return Span(least, best, most)
