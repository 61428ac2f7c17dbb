"""The thread that delivers answers: in order, all of them, with looks in between, and each by itself."""

from __future__ import annotations

import threading

import pytest

from compress.errors import UsageError
from export.triton.failures import A_BUG
from export.triton.post import Post

SOON = 60.0
"""Seconds that nothing here takes."""


class Parcel:
    """Complete after some deliveries, each of which waits for `go`; keeps what was called, and by which thread."""

    def __init__(self, deliveries: int, seen: list[Parcel] | None = None, error: Exception | None = None) -> None:
        self.left, self.seen, self.error = deliveries, [] if seen is None else seen, error
        self.looks, self.reasons, self.threads = 0, list[str](), set[str]()
        self.go, self.delivered, self.looked = threading.Event(), threading.Event(), threading.Event()
        self.go.set()

    def deliver(self) -> bool:
        self.threads.add(threading.current_thread().name)
        assert self.go.wait(SOON)
        self.seen.append(self)
        self.left -= 1
        self.delivered.set()
        if self.error is not None:
            raise self.error
        return self.left <= 0

    def look(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.looks += 1
        if self.looks == 3:
            self.looked.set()

    def fail(self, reason: str) -> None:
        self.threads.add(threading.current_thread().name)
        self.reasons.append(reason)


def test_what_is_put_is_delivered_in_order_before_the_end() -> None:
    post, seen = Post(SOON), list[Parcel]()
    parcels = [Parcel(3, seen) for _ in range(5)]
    parcels[0].go.clear()
    order = parcels * 3
    for parcel in order:  # who puts does not wait for the first one
        post.put(parcel)
    assert not seen
    parcels[0].go.set()
    post.close()
    assert seen == order
    assert {name for parcel in parcels for name in parcel.threads} == {"post"}


def test_parcels_under_way_are_looked_at_until_they_are_complete() -> None:
    post, quick, slow = Post(0.001), Parcel(1), Parcel(2)
    for parcel in (quick, slow):
        post.put(parcel)
    assert slow.looked.wait(SOON)
    assert not quick.looks
    slow.delivered.clear()
    post.put(slow)
    assert slow.delivered.wait(SOON)
    other = Parcel(2)
    post.put(other)
    assert other.delivered.wait(SOON)  # after the completion of `slow`
    looks = slow.looks
    assert other.looked.wait(SOON)
    assert slow.looks == looks
    post.close()


def test_looks_are_not_put_off_by_deliveries() -> None:
    post, waiting = Post(0.0), Parcel(1000)
    post.put(waiting)
    for _ in range(60):
        post.put(Parcel(1))
    post.close()
    assert waiting.looks >= 60


@pytest.mark.parametrize(("error", "reason"), [(KeyError("a bug"), A_BUG), (UsageError("no"), "no")])
def test_a_parcel_that_fails_ends_alone(error: Exception, reason: str) -> None:
    post, broken, sound = Post(SOON), Parcel(5, error=error), Parcel(2)
    for parcel in (sound, broken, sound):
        post.put(parcel)
    post.close()
    assert broken.reasons == [reason]
    assert (sound.reasons, sound.left) == ([], 0)


def test_a_look_that_fails_ends_alone() -> None:
    class Unseen(Parcel):
        def look(self) -> None:
            super().look()
            raise KeyError("a bug")

    post, broken, sound = Post(0.0), Unseen(3), Parcel(3)
    for parcel in (broken, sound):
        post.put(parcel)
    assert sound.looked.wait(SOON)
    post.close()
    assert (broken.reasons, broken.looks) == ([A_BUG], 1)
    assert not sound.reasons


def test_a_parcel_that_cannot_even_fail_ends_alone() -> None:
    class Lost(Parcel):
        def fail(self, reason: str) -> None:
            super().fail(reason)
            raise KeyError("a bug")

    post, broken, sound = Post(SOON), Lost(1, error=KeyError("a bug")), Parcel(1)
    for parcel in (broken, sound):
        post.put(parcel)
    post.close()
    assert (broken.reasons, sound.left) == ([A_BUG], 0)
