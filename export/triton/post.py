"""One thread for all that goes to the server: responses, metrics, and looks whether a request is cancelled.

Each of these is a message to the server's process and back, half a millisecond and more: sent by the thread that
decodes, the responses of sixteen streams would take longer than a step of a fast engine. And Triton 2.51 goes down as a
whole when two threads of a model send metrics at once.
"""

from __future__ import annotations

import queue
import threading
import time
from functools import partial
from typing import Protocol

from compress.progress import log
from export.triton.failures import Contained


class Parcel(Protocol):
    """An answer on its way. Its methods are called by the thread of `Post`."""

    def deliver(self) -> bool:
        """Send what there is to send, which may be nothing; whether it was the last."""
        ...

    def look(self) -> None:
        """Find out whether anybody still waits for it."""
        ...

    def fail(self, reason: str) -> None:
        """End it with an error, after a delivery or a look that failed."""
        ...


class Post:
    """Delivers what is put, in order, and every `every` seconds looks at each parcel that is not yet complete.

    A parcel that fails ends alone.
    """

    def __init__(self, every: float) -> None:
        self._every = every
        self._queue: queue.SimpleQueue[Parcel | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="post", daemon=True)
        self._thread.start()

    def put(self, parcel: Parcel) -> None:
        """It has something to deliver, or is new and has to be looked at."""
        self._queue.put(parcel)

    def close(self) -> None:
        """Deliver what is there, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def join(self) -> None:
        """Wait until the thread has ended: after `close`, or by a defect of its own."""
        self._thread.join()

    def _run(self) -> None:
        under_way: dict[int, Parcel] = {}
        looked = time.monotonic()
        while True:
            try:
                wait = max(0.0, looked + self._every - time.monotonic()) if under_way else None
                parcel = self._queue.get(timeout=wait)
            except queue.Empty:
                pass
            else:
                if parcel is None:
                    return
                complete = True
                with Contained(partial(self._fail, parcel)):
                    complete = parcel.deliver()
                if complete:
                    under_way.pop(id(parcel), None)
                else:
                    under_way[id(parcel)] = parcel
            if time.monotonic() >= looked + self._every:
                for parcel in list(under_way.values()):
                    sound = False
                    with Contained(partial(self._fail, parcel)):
                        parcel.look()
                        sound = True
                    if not sound:
                        del under_way[id(parcel)]
                looked = time.monotonic()

    @staticmethod
    def _fail(parcel: Parcel, reason: str) -> None:
        with Contained(lambda again: log(f"an error could not be sent: {again}")):
            parcel.fail(reason)
