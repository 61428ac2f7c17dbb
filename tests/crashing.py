"""Death at any moment: a piece of work in a process of its own that ends, with no clean-up, at its n-th change of the
file system; with or without what was not flushed to the disk."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHANGES = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync", "posix_fallocate")
KILLED = 9


def died(work: Callable[[], object], root: Path, moment: int, *, power: bool = False) -> bool:
    """Run `work` in a child that dies just before its change number `moment`, counted from 1; False where it ended
    before. power: the machine dies, and files below `root` that were not flushed lose the second half of themselves.

    Raises AssertionError when the work fails in any other way.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _arm(root, moment, power)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED), f"the work failed with exit code {code} before change {moment}"
    return code == KILLED


def deaths(work: Callable[[Path], object], folder: Path, *, power: bool, step: int = 1) -> Iterator[Path]:
    """The folder that each death of `work(root)` leaves, for every `step`-th change until it ends by itself, which
    comes last."""
    moment = 1
    while True:
        root = folder / str(moment)
        root.mkdir()
        alive = not died(lambda root=root: work(root), root, moment, power=power)  # type: ignore[misc]
        yield root
        if alive:
            return
        moment += step


def _arm(root: Path, moment: int, power: bool) -> None:
    count, flushed = 0, {path.lstat().st_ino for path in root.rglob("*")}
    truncate = os.truncate

    def dying(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            nonlocal count
            count += 1
            if count == moment:
                if power:
                    for path in root.rglob("*"):
                        status = path.lstat()
                        if path.is_file() and status.st_ino not in flushed and not path.name.startswith(".lock"):
                            truncate(path, status.st_size // 2)
                os._exit(KILLED)
            if name == "fsync":
                flushed.add(os.fstat(arguments[0]).st_ino)
            return call(*arguments, **keywords)

        return wrapped

    for name in CHANGES:
        setattr(os, name, dying(name, getattr(os, name)))
