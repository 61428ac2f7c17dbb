"""One writer to a folder: a lock file that the kernel releases when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import ArtifactError

LOCK = ".lock"
_held: dict[Path, int] = {}  # folder -> depth of nesting in this process
_guard = threading.Lock()


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold `folder`'s lock; yields whether this is the outermost holder in this process.

    The file OUT/.lock names the process for the message only: it is the flock on it that counts, so a lock
    left by a killed process does not hold. Raises ArtifactError when another process holds it.
    """
    key = folder.resolve()
    with _guard:
        depth = _held.get(key, 0)
        descriptor = _acquire(folder / LOCK) if depth == 0 else None
        _held[key] = depth + 1
    try:
        yield depth == 0
    finally:
        with _guard:
            _held[key] -= 1
            if descriptor is not None:
                del _held[key]
                # Removed while still held, so that whoever opens it next makes a new one; see _acquire.
                (folder / LOCK).unlink(missing_ok=True)
                os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BlockingIOError:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise ArtifactError(
                f"{path.parent} is being written by {owner}; wait for it to end or choose another --out"
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise ArtifactError(
                    f"The file system of {path.parent} has no file locks; choose an --out on another one"
                ) from error
            raise
        os.close(descriptor)  # its last holder removed the file between our open and our flock: try again


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
