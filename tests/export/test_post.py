"""The thread that delivers answers: in order, all of them, with looks in between. No test here depends on speed."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

from export.triton.post import Post

PATIENCE = 60.0  # seconds until a test gives up


class Parcel:
    """Complete after some deliveries; keeps when it was looked at, and by which thread."""

    def __init__(self, deliveries: int, seen: list[Parcel] | None = None, gate: threading.Event | None = None) -> None:
        self.left, self.seen, self.gate = deliveries, [] if seen is None else seen, gate
        self.looks, self.threads = list[float](), set[str]()
        self.complete, self.looked_at = threading.Event(), threading.Semaphore(0)

    def deliver(self) -> bool:
        if self.gate is not None:
            assert self.gate.wait(PATIENCE)
        self.threads.add(threading.current_thread().name)
        self.seen.append(self)
        self.left -= 1
        if self.left <= 0:
            self.complete.set()
        return self.left <= 0

    def look(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.looks.append(time.monotonic())
        self.looked_at.release()

    def wait_for_looks(self, count: int) -> None:
        for _ in range(count):
            assert self.looked_at.acquire(timeout=PATIENCE)


def test_what_is_put_is_delivered_in_order_before_the_end() -> None:
    post, seen, gate = Post(10.0), list[Parcel](), threading.Event()
    parcels = [Parcel(3, seen, gate) for _ in range(5)]
    order = parcels * 3
    for parcel in order:
        post.put(parcel)
    assert not seen  # who puts does not wait for a delivery: none can happen yet
    gate.set()
    post.close()
    assert seen == order
    assert {name for parcel in parcels for name in parcel.threads} == {"post"}


def test_parcels_under_way_are_looked_at_until_they_are_complete() -> None:
    every = 0.02
    post, quick, slow, other = Post(every), Parcel(1), Parcel(2), Parcel(2)
    for parcel in (quick, slow):
        post.put(parcel)
    slow.wait_for_looks(3)
    assert not quick.looks
    post.put(slow)
    assert slow.complete.wait(PATIENCE)
    looks = len(slow.looks)
    post.put(other)
    other.wait_for_looks(3)
    assert len(slow.looks) == looks
    post.close()
    for looked in (slow.looks, other.looks):
        assert all(b - a >= every for a, b in pairwise(looked))  # no more often than asked for


def test_looks_are_not_put_off_by_deliveries() -> None:
    class Lasting(Parcel):
        def deliver(self) -> bool:
            time.sleep(0.005)
            return super().deliver()

    post, waiting = Post(0.02), Parcel(1000)
    post.put(waiting)
    for _ in range(60):
        post.put(Lasting(1))
    post.close()
    assert len(waiting.looks) >= 5  # a look falls due with every fourth delivery at the latest
