"""Where a request's own failure stops: at that request."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from types import TracebackType

from compress.errors import ProcrustesError
from compress.progress import log

A_BUG = "this request met a defect of the model's code; the server's log has the details"
LONGEST_REASON = 500
"""Characters of a reason that go to a client: some quote what the client sent."""


class Contained:
    """A context manager: a failure inside it ends one request, and neither the thread nor the requests beside it.

    `end` is called with a sentence for the client: that of a ProcrustesError, and `A_BUG` for whatever was not
    foreseen, whose traceback goes to the server's log. What is no Exception, such as KeyboardInterrupt, passes through.
    """

    def __init__(self, end: Callable[[str], None]) -> None:
        self._end = end

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        if isinstance(error, ProcrustesError):
            self._end(str(error))
        else:
            log("".join(traceback.format_exception(error)))
            self._end(A_BUG)
        return True


def sendable(reason: str) -> str:
    """A reason as a client can be sent it: of a bounded length, in UTF-8 whatever it quotes."""
    short = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]} ..."
    return short.encode("utf-8", "backslashreplace").decode()
