"""Progress on stderr: a bar on a terminal, lines anywhere else."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 1.0


def log(message: str) -> None:
    """Print one line on stderr, above a bar where there is one; stdout is for results."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(message, file=sys.stderr)
    else:
        print(message, file=sys.stderr, flush=True)


def track(iterable: Iterable[T], *, description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items and show how far we are.

    On a terminal this is a tqdm bar. Elsewhere (CI, a log file) a finished item prints one line,
    `description 3/30 (12.4 s)`, where the seconds are those since the first item was asked for: the first and the last
    one, and of the others those that come a second after the last line.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
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
