"""Real files only: hashing, flushing and checking what an artifact holds."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from compress.artifact.manifest import FileEntry
from compress.errors import ArtifactError, ProcrustesError

_CHUNK = 1 << 20
_OS_ERROR = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")


def named(error: OSError, path: Path) -> None:
    """A failed write() does not know its file: name the one, or at least the folder, that it was for."""
    if error.errno is not None and error.filename is None:
        error.filename = str(path)


def os_error_of(error: Exception, path: Path | None) -> Exception:
    """The operating system's error that a Rust library (safetensors, tokenizers) or `shutil.copytree`, which goes on
    after the first, gives only in its text; or `error`."""
    known = isinstance(error, OSError) and error.errno is not None
    if not known and (code := _OS_ERROR.search(str(error))):
        number = int(code.group(1) or code.group(2))
        return OSError(number, os.strerror(number), *([] if path is None else [str(path)]))
    return error


def located(error: Exception, folder: Path) -> Exception:
    """A failure of what was written to `folder`, as the operating system's error with a place where it is one."""
    if isinstance(error, ProcrustesError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        named(error, folder)
        return error
    return os_error_of(error, folder)


def files_below(path: Path) -> Iterator[Path]:
    """Everything at or below `path` that is not a folder, in order of name; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        yield path
        return
    for child in sorted(path.iterdir()):
        yield from files_below(child)


def seal(root: Path, stage: str) -> dict[str, FileEntry]:
    """Flush a stage's files to the disk and return their manifest entries. Raises ArtifactError for links.

    All get the permissions that the umask allows: temporary files of libraries are for their owner alone.
    """
    entries: dict[str, FileEntry] = {}
    for path in files_below(root):
        refuse_links(path, root.parent)
        open_to_umask(path)
        fsync(path)
        name = stage if path == root else f"{stage}/{path.relative_to(root).as_posix()}"
        entries[name] = {"size": path.lstat().st_size, "sha256": sha256_of(path)}
    if not entries:
        raise ArtifactError(f"nothing was written for {stage}; this is a bug in the step that makes it")
    if root.is_dir():
        for folder in [root, *(p for p in root.rglob("*") if p.is_dir())]:
            open_to_umask(folder)
            fsync(folder)
    return entries


def open_to_umask(path: Path) -> None:
    """Give a file or folder the permissions that the umask allows, no fewer and no more; an executable stays one."""
    mask = os.umask(0o077)
    os.umask(mask)
    mode = stat.S_IMODE(path.lstat().st_mode)
    wanted = (0o777 if mode & 0o111 else 0o666) & ~mask | mode & ~0o777
    if wanted != mode:
        path.chmod(wanted)


def refuse_links(path: Path, top: Path) -> None:
    """Raise ArtifactError unless `path` is a regular file with one name, reached through real folders."""
    for parent in [p for p in reversed(path.parents) if p != top and top in p.parents]:
        if parent.is_symlink():
            raise ArtifactError(f"{parent} is a symbolic link; an artifact holds real files only")
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{path} is missing; build it again") from None
    if stat.S_ISLNK(status.st_mode):
        raise ArtifactError(f"{path} is a symbolic link; an artifact holds real files only")
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{path} is not a regular file; an artifact holds real files only")
    if status.st_nlink > 1:
        raise ArtifactError(f"{path} is a hard link (it has {status.st_nlink} names); copy it instead")


def may_be_folder(path: Path) -> bool:
    """True if `path` is a folder, or can be made as one: what is there of it and above it is no file."""
    return next(part for part in (path, *path.absolute().parents) if part.exists()).is_dir()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return sha256_of_open(file)


def sha256_of_open(file: IO[bytes]) -> str:
    """SHA-256 of what is left to read of an open file, in hex."""
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot fsync a folder
            named(error, path)
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder; that it is not there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
