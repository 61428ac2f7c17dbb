"""Finished pieces of a long computation, in a folder that says what it holds: what a run that was killed goes on from.

The ledger has the request that the pieces belong to, and the size and SHA-256 of every file. Replacing it is what
makes a piece kept, so that a kill, or a loss of power, at any moment leaves the pieces that are complete:

    1. write the files of a piece                                  FOLDER/block-3.safetensors, ...
    2. flush and hash them
    3. replace the ledger by one that has them, and lacks the files that they make superfluous
    4. remove the superfluous files

`KeptFolder.open` removes files that the ledger does not have. Whatever else does not fit, a file that is missing or
changed, another request, another version, is no ground to go on from: the folder is made anew, and that is said. A
folder is emptied by one rename (FOLDER -> .old-FOLDER), and made by one.

What is kept is used as it is read back, by the run that computes it too: layout and alignment of a matrix in memory
change the last bits of its products, and a resumed run must give the same bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.artifact.files import fsync, named, open_to_umask, refuse_links, remove, sha256_of
from compress.errors import ArtifactError, UsageError
from compress.progress import LARGE, log, track

if TYPE_CHECKING:
    from torch import Tensor

LEDGER = "ledger.json"
SCHEMA = 1
_PIECE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*\.(f32|safetensors|json|partial)")
_FORMER = ("moments", "dense-baseline", "engines")  # folders of earlier versions


class KeptFolder:
    """One folder of kept files, all of them directly in it. Only the process that holds its lock may open it."""

    def __init__(self, folder: Path, request: Mapping[str, Any], files: Mapping[str, list[Any]]) -> None:
        self.folder, self._request, self._files = folder, request, dict(files)

    @classmethod
    def open(cls, folder: Path, request: Mapping[str, Any]) -> KeptFolder:
        """The pieces kept for `request`, a JSON object; an empty folder where there are none, or others.

        Raises ArtifactError for a link or a file in its place, UsageError for a folder of something else.
        """
        request = json.loads(json.dumps(request))
        require_folder(folder)
        remove(_beside(folder, ".old-"))
        remove(_beside(folder, ".tmp-"))
        if folder.exists():
            _refuse_foreign(folder)
            try:
                kept = cls(folder, request, _read_ledger(folder / LEDGER, request))
                kept._verify()
            except _UnfitError as error:
                if any(folder.iterdir()):
                    log(f"{folder} cannot be resumed, {error}: starting anew")
                clear(folder)
            else:
                kept._remove_unlisted()
                if kept._files:
                    log(f"resuming the interrupted run in {folder}")
                return kept
        draft = _beside(folder, ".tmp-")
        draft.mkdir(parents=True)
        cls(draft, request, {})._write()
        os.rename(draft, folder)
        fsync(folder.parent)
        return cls(folder, request, {})

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """Of all files that are kept."""
        return list(self._files)

    def path(self, name: str) -> Path:
        """Where the file of this name is, or is to be written before `keep`."""
        return self.folder / name

    def keep(self, *names: str, drop: Iterable[str] = ()) -> None:
        """Make the files `names`, written before, a finished piece, in place of the files `drop`."""
        for name in names:
            path = self.folder / name
            refuse_links(path, self.folder)
            open_to_umask(path)
            fsync(path)
            self._files[name] = [path.stat().st_size, sha256_of(path)]
        superfluous = [name for name in drop if self._files.pop(name, None) is not None]
        fsync(self.folder)
        self._write()
        for name in superfluous:
            remove(self.folder / name)

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of the piece `name`, on the CPU; computed by `make` where it is not there yet."""
        from safetensors.torch import load_file

        from compress.artifact.state import save_whole

        file = f"{name}.safetensors"
        if file not in self:
            save_whole({key: tensor.cpu() for key, tensor in make().items()}, self.path(file))
            self.keep(file)
        return load_file(self.path(file))

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        """The JSON value of the piece `name`, computed by `make` where it is not there yet. Tuples become lists."""
        file = f"{name}.json"
        if file not in self:
            self.write_value(name, make())
            self.keep(file)
        return self.read_value(name)

    def write_value(self, name: str, value: Any) -> None:
        """Write NAME.json, for `keep`."""
        self.path(f"{name}.json").write_text(json.dumps(value), encoding="utf-8")

    def read_value(self, name: str) -> Any:
        """What `write_value` wrote."""
        return json.loads(self.path(f"{name}.json").read_text(encoding="utf-8"))

    # -- inside --------------------------------------------------------------------------------------------

    def _write(self) -> None:
        draft = self.folder / "ledger.partial"
        try:
            with open(draft, "w", encoding="utf-8") as file:
                json.dump({"schema": SCHEMA, "request": self._request, "files": self._files}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, self.folder / LEDGER)
        except OSError as error:
            named(error, draft)
            raise
        fsync(self.folder)

    def _verify(self) -> None:
        large = sum(size for size, _ in self._files.values() if isinstance(size, int)) > LARGE
        entries = self._files.items()
        for name, (size, digest) in track(entries, description="check kept files") if large else entries:
            path = self.folder / name
            try:
                refuse_links(path, self.folder)
            except ArtifactError as error:
                raise _UnfitError(str(error).partition(";")[0]) from None
            if path.stat().st_size != size or sha256_of(path) != digest:
                raise _UnfitError(f"{path} is not as it was left")

    def _remove_unlisted(self) -> None:
        for path in list(self.folder.iterdir()):
            if path.name != LEDGER and path.name not in self._files:
                remove(path)


class Nowhere:
    """Keeps nothing: for a computation that is not to be resumed."""

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """See `KeptFolder.tensors`."""
        return dict(make())

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        """See `KeptFolder.value`."""
        return make()


Keeper = KeptFolder | Nowhere


def check_folder(folder: Path) -> None:
    """Raise what `KeptFolder.open` would raise there, and change nothing."""
    require_folder(folder)
    if folder.exists():
        _refuse_foreign(folder)


def clear_unused(folder: Path) -> None:
    """Remove a folder in which no piece was kept yet; what its ledger does not list is not kept."""
    try:
        require_folder(folder)
        unused = folder.exists() and _parsed(folder / LEDGER)["files"] == {}
    except (ArtifactError, _UnfitError):
        return
    if unused:
        clear(folder)


def clear(folder: Path) -> None:
    """Remove a kept folder, whole or not at all; that it is not there is fine."""
    require_folder(folder)
    old = _beside(folder, ".old-")
    remove(old)
    if folder.exists():
        os.rename(folder, old)
        fsync(folder.parent)
        remove(old)


def request_of(folder: Path) -> Any:
    """The request that `folder` keeps pieces of; None where there is no such folder or its ledger cannot be read."""
    try:
        require_folder(folder)
        return _parsed(folder / LEDGER)["request"]
    except (ArtifactError, _UnfitError):
        return None


def require_folder(folder: Path) -> None:
    """Raise ArtifactError when something that is no folder has the place of `folder`."""
    if folder.is_symlink() or (os.path.lexists(folder) and not folder.is_dir()):
        kind = "a symbolic link" if folder.is_symlink() else "not a folder"
        raise ArtifactError(f"{folder} is {kind}, where this program keeps a folder of its own: remove it")


class _UnfitError(Exception):
    """Why kept files cannot be gone on from, as a clause."""


def _beside(folder: Path, prefix: str) -> Path:
    return folder.with_name(prefix + folder.name)


def _refuse_foreign(folder: Path) -> None:
    """Without a ledger: remains of an earlier version or of a damaged disk may go, anything else is somebody's."""
    if os.path.lexists(folder / LEDGER):
        return
    for path in folder.iterdir():
        if not (_PIECE.fullmatch(path.name) or path.name in _FORMER):
            raise UsageError(
                f"{folder} exists and {path.name!r} in it was not written by this program, which therefore will not "
                f"remove it; choose another folder or move it away"
            )


def _parsed(path: Path) -> dict[str, Any]:
    """The ledger, its form checked."""
    try:
        refuse_links(path, path.parent)
        content = json.loads(path.read_bytes())
    except ArtifactError:
        raise _UnfitError("it has no ledger of what is in it") from None
    except (ValueError, RecursionError):
        raise _UnfitError("its ledger is damaged") from None
    if (
        not isinstance(content, dict)
        or content.get("schema") != SCHEMA
        or content.keys()
        != {
            "schema",
            "request",
            "files",
        }
    ):
        raise _UnfitError("its ledger is damaged or of another version")
    files = content["files"]
    if not isinstance(files, dict) or not all(
        _PIECE.fullmatch(name) and isinstance(entry, list) and len(entry) == 2 for name, entry in files.items()
    ):
        raise _UnfitError("its ledger is damaged")
    return content


def _read_ledger(path: Path, request: Mapping[str, Any]) -> dict[str, list[Any]]:
    content = _parsed(path)
    if content["request"] != request:
        raise _UnfitError("it is of another model, recipe or version")
    files: dict[str, list[Any]] = content["files"]
    return files
