"""The thread that delivers answers: in order, all of them, with looks in between."""

from __future__ import annotations

import threading
import time

from export.triton.post import Post


class Parcel:
    """Complete after some deliveries; keeps when it was looked at, and by which thread."""

    def __init__(self, deliveries: int, seen: list[Parcel] | None = None, wait: float = 0.0) -> None:
        self.left, self.seen, self.wait = deliveries, [] if seen is None else seen, wait
        self.looks, self.threads = list[float](), set[str]()

    def deliver(self) -> bool:
        time.sleep(self.wait)
        self.threads.add(threading.current_thread().name)
        self.seen.append(self)
        self.left -= 1
        return self.left <= 0

    def look(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.looks.append(time.monotonic())


def test_what_is_put_is_delivered_in_order_before_the_end() -> None:
    post, seen = Post(10.0), list[Parcel]()
    parcels = [Parcel(3, seen, wait=0.02) for _ in range(5)]
    order = parcels * 3
    start = time.monotonic()
    for parcel in order:
        post.put(parcel)
    assert time.monotonic() - start < 0.15  # who puts does not wait for 15 x 20 ms
    post.close()
    assert seen == order
    assert {name for parcel in parcels for name in parcel.threads} == {"post"}


def test_parcels_under_way_are_looked_at_until_they_are_complete() -> None:
    post, quick, slow = Post(0.02), Parcel(1), Parcel(2)
    for parcel in (quick, slow):
        post.put(parcel)
    time.sleep(0.25)
    assert not quick.looks
    assert 2 <= len(slow.looks) <= 13
    post.put(slow)
    time.sleep(0.05)
    looks = len(slow.looks)
    time.sleep(0.1)
    assert len(slow.looks) == looks
    post.close()


def test_looks_are_not_put_off_by_deliveries() -> None:
    post, waiting = Post(0.02), Parcel(1000)
    post.put(waiting)
    for _ in range(60):
        post.put(Parcel(1, wait=0.005))
    post.close()
    assert len(waiting.looks) >= 5
