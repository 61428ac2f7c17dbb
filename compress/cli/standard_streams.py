"""Standard output and error whose reader may leave before the end (`| head -1`), or that were closed from the start."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """Within the block, writing to sys.stdout and sys.stderr never fails for want of a reader, and to sys.stderr never:
    a log that is full (`2> log` on a full disk) ends neither the work nor the telling of how it went, by the exit code.

    A stream that was closed when the interpreter started (`>&-`), which is None, or since then, leads to /dev/null: its
    descriptor would else be given to the next file that is opened, and a library's chatter be written into that.
    Streams that are not those of the process, as a test puts them there, stay as they are.
    """
    before: dict[str, Any] = {}
    for number in (0, 1, 2):
        if not _is_open(number):
            _lead_to_null(number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        own = stream = getattr(sys, name)
        if stream is None or (stream is getattr(sys, f"__{name}__") and stream.closed):
            _lead_to_null(number)
            stream = None
        elif not isinstance(stream, io.TextIOWrapper) or _descriptor(stream) != number:
            continue
        before[name] = own
        setattr(sys, name, _Unheard.over(number, stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


class _Unheard(io.TextIOWrapper):
    """A text stream that goes on into nothing once its reader has gone."""

    @classmethod
    def over(cls, number: int, stream: io.TextIOWrapper | None) -> _Unheard:
        """In place of `stream` on the descriptor `number`."""
        binary = io.open(number, "wb", closefd=False)  # noqa: SIM115, UP020 (it lives as long as the stream)
        if stream is None:
            return cls(binary, encoding="utf-8", errors="backslashreplace")
        stream.flush()
        # Not strict: a name that the terminal cannot show is no reason to lose the result.
        return cls(binary, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering)

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._silence(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._silence(error)

    def _silence(self, error: OSError) -> None:
        """Drop what is still to be written, so that it fails once only. What was to go to stdout is a result: raise
        unless its reader has gone, or it has been closed."""
        _lead_to_null(self.fileno())
        if self.fileno() == 1 and error.errno not in (errno.EPIPE, errno.EBADF):
            raise error


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:  # EBADF: there is no such descriptor
        return False
    return True


def _lead_to_null(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number, inheritable=True)
        os.close(null)
    os.set_inheritable(number, True)


def _descriptor(stream: io.TextIOWrapper) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):  # none, or closed
        return None
