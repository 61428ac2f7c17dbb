"""A client of the batcher, in memory."""

from __future__ import annotations

import threading

from export.triton.batching import Piece


class Client:
    """Collects pieces; may leave after some."""

    def __init__(self, leave_after: int | None = None) -> None:
        self.pieces: list[Piece] = []
        self.done = threading.Event()
        self.leave_after = leave_after

    def tell(self, piece: Piece) -> None:
        assert not self.done.is_set()
        self.pieces.append(piece)
        if piece.finish is not None:
            self.done.set()

    def cancelled(self) -> bool:
        return self.leave_after is not None and len(self.pieces) >= self.leave_after

    def wait(self) -> Client:
        assert self.done.wait(60)
        return self

    @property
    def tokens(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish(self) -> str | None:
        return self.pieces[-1].finish
