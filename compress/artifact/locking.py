"""One writer at a time: a lock file that the kernel releases when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import ArtifactError
from compress.progress import log

LOCK = ".lock"
_held: dict[Path, int] = {}  # lock file -> depth of nesting in this process
_guard = threading.Lock()


@contextmanager
def locked(folder: Path, name: str = LOCK, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock `name` of `folder`; yields whether this is the outermost holder in this process.

    The file OUT/.lock names the process for the message only: it is the flock on it that counts, so a lock
    left by a killed process does not hold. Where another process holds it, `wait` for it to end, and log that, or
    raise ArtifactError. Raises ArtifactError, too, where something else has the place of the file.
    """
    key = folder.resolve() / name
    with _guard:
        depth = _held.get(key, 0)
        descriptor = _acquire(folder / name, wait) if depth == 0 else None
        _held[key] = depth + 1
    try:
        yield depth == 0
    finally:
        with _guard:
            _held[key] -= 1
            if descriptor is not None:
                del _held[key]
                # Removed while still held, so that whoever opens it next makes a new one; see _acquire.
                (folder / name).unlink(missing_ok=True)
                os.close(descriptor)


def _acquire(path: Path, wait: bool) -> int:
    said = False
    while True:
        try:
            descriptor = _open(path)
        except FileNotFoundError:  # its last holder was refused, and took the folder that it had made away with it
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
                if not wait:
                    raise ArtifactError(
                        f"{path.parent} is being written by {owner}; wait for it to end or choose another --out"
                    ) from None
                if not said:
                    log(f"waiting for {owner}, which is working in {path.parent}")
                    said = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _same_file(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return descriptor
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError) and error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise ArtifactError(
                    f"The file system of {path.parent} has no file locks; choose an --out on another one"
                ) from error
            raise
        os.close(descriptor)  # its last holder removed the file between our open and our flock: try again


def _open(path: Path) -> int:
    """A descriptor of the lock file, made if need be; nothing else is opened, followed or waited for."""
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _no_lock_file(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_lock_file(path)
    return descriptor


def _no_lock_file(path: Path) -> ArtifactError:
    return ArtifactError(f"{path} is no regular file, where this program keeps its lock: remove it")


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
