"""Progress on stderr: a bar on a terminal, lines anywhere else; or, from Python, a function that is called with it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 1.0
LARGE = 1 << 30
"""Bytes that take so long to read and hash that progress is shown."""


@dataclass(frozen=True)
class Progress:
    """`done` of `total` items of what `text` describes; both None for a message, `total` None where it is not known."""

    text: str
    done: int | None = None
    total: int | None = None


Listener = Callable[[Progress], None]

_LISTENER: ContextVar[Listener | None] = ContextVar("_LISTENER", default=None)


@contextmanager
def progress_to(listener: Listener | None) -> Iterator[None]:
    """Within the block, call `listener` in place of writing to stderr; with None nothing changes."""
    if listener is None:
        yield
        return
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def log(message: str) -> None:
    """Print one line on stderr, above a bar where there is one; stdout is for results."""
    if (listener := _LISTENER.get()) is not None:
        listener(Progress(message))
    elif sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(message, file=sys.stderr)
    else:
        print(message, file=sys.stderr, flush=True)


def track(iterable: Iterable[T], *, description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items and show how far we are.

    On a terminal this is a tqdm bar. Elsewhere (CI, a log file) a finished item prints one line,
    `description 3/30 (12.4 s)`, where the seconds are those since the first item was asked for: the first and the last
    one, and of the others those that come a second after the last line. A listener (`progress_to`) hears of each.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if (listener := _LISTENER.get()) is not None:
        for count, item in enumerate(iterable, start=1):
            yield item
            listener(Progress(description, count, total))
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(iterable, desc=description, total=total, file=sys.stderr)
        return
    start, said = time.monotonic(), -math.inf
    of_total = "" if total is None else f"/{total}"
    for count, item in enumerate(iterable, start=1):
        yield item
        now = time.monotonic()
        if count == total or now - said >= SECONDS_BETWEEN_LINES:
            log(f"{description} {count}{of_total} ({now - start:.1f} s)")
            said = now
