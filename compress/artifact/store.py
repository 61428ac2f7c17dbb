"""The artefact folder OUT: stages that appear whole or not at all, and the manifest that vouches for them.

A stage (`checkpoint`, `onnx`, `engine`, `triton`, `reports`, or the single file `recipe.yaml`) is written
under `OUT/.tmp-<stage>` and published by renames. One process writes OUT at a time (`compress/artifact/locking.py`).

Publishing keeps a small journal, so that a kill at any moment leaves the old stage or the new one, whole:

    1. fsync and hash what was written          OUT/.tmp-S
    2. write the manifest-to-be                 OUT/.pending-S
    3. rename the old stage out of the way      OUT/S      -> OUT/.old-S
    4. rename the new stage into place          OUT/.tmp-S -> OUT/S
    5. replace the manifest                     OUT/.pending-S -> OUT/manifest.json
    6. remove                                   OUT/.old-S

`_recover` runs whenever the lock is taken: with .tmp-S still there it goes back to before 3, else on to 6.
All the space that a publication needs is taken by 1 and 2, before anything old is touched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from compress.artifact.files import (
    files_below,
    fsync,
    located,
    may_be_folder,
    named,
    refuse_links,
    remove,
    seal,
    sha256_of,
)
from compress.artifact.ledger import KeptFolder, check_folder, clear, clear_unused, request_of
from compress.artifact.locking import locked
from compress.artifact.manifest import FileEntry, Manifest
from compress.errors import ArtifactError, UsageError

MANIFEST = "manifest.json"
_LEFT_ALONE = re.compile(r"state|lost\+found|\..*")
_TMP, _OLD, _PENDING, _SCRATCH, _DRAFT = ".tmp-", ".old-", ".pending-", ".scratch-", ".draft"


class Artifact:
    """The folder `out`, which need not exist yet: the first write makes it."""

    def __init__(self, out: Path) -> None:
        self.out = Path(out)

    def path(self, name: str) -> Path:
        """OUT/name, whether it exists or not."""
        return self.out / name

    # -- reading -------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether OUT has a manifest, that is, at least one thing was written there completely."""
        return self.path(MANIFEST).is_file()

    def read_manifest(self) -> dict[str, Any]:
        """The manifest as a plain dict. Raises ArtifactError when it is missing or malformed."""
        return self._manifest().to_dict()

    def has_stage(self, name: str) -> bool:
        """Whether the stage is complete. Contents are not read; `verify` does that."""
        return self.exists() and name in self._manifest().stages and self.path(name).exists()

    def stage_digest(self, name: str) -> str:
        """One SHA-256 over the names and hashes of a complete stage's files. Raises ArtifactError."""
        return self._complete(name).digest(name)

    def require_stage(self, name: str) -> Path:
        """The path of a complete stage that was made from the present state of its inputs.

        Raises ArtifactError when the stage is not there, or when one of its inputs has been replaced since.
        Contents are not read; `verify` does that.
        """
        manifest = self._complete(name)
        for source, digest in manifest.stages[name].get("inputs", {}).items():
            if source not in manifest.stages or manifest.digest(source) != digest:
                raise ArtifactError(
                    f"{self.path(name)} was made from another {source} than the one in {self.out}; build {name} again"
                )
        return self.path(name)

    def verify(self, prefixes: Iterable[str] | None = None) -> None:
        """Hold files against the manifest: size, SHA-256, no links, nothing beside them in a stage's folder.

        `prefixes` are stages or paths relative to OUT; None means every file in the manifest. Raises
        ArtifactError naming the first file, in order of name, that is missing or changed.
        """
        manifest = self._manifest()
        chosen = dict(sorted(manifest.files.items()))
        if prefixes is not None:
            wanted = [prefix.rstrip("/") for prefix in prefixes]
            for prefix in wanted:
                if not any(_below(name, prefix) for name in chosen):
                    raise ArtifactError(f"{self.path(MANIFEST)} lists no file under {prefix!r}; build it first")
            chosen = {name: entry for name, entry in chosen.items() if any(_below(name, p) for p in wanted)}
        for name, entry in chosen.items():
            self._verify_file(name, entry)
        for stage in {name.split("/")[0] for name in chosen}:
            self._refuse_strangers(stage, manifest.files)

    # -- writing -------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self, *, rehearsal: bool = False) -> Iterator[None]:
        """Be the only process that writes OUT, making the folder if need be. May be nested in one process.

        A whole command may hold it; every write takes it by itself. Raises ArtifactError naming the other
        process where there is one, UsageError where OUT is not a folder. A folder that was made and got nothing, as
        the command was refused, goes again; so it does after a `rehearsal`, which changes nothing that is there.
        """
        made = [folder for folder in (self.out, *self.out.parents) if not folder.exists()]
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise self._no_folder() from None
        except FileNotFoundError:  # a file system that makes no folders, such as /proc
            raise UsageError(f"{self.out} cannot be made there; choose another --out") from None
        finished = False
        try:
            with locked(self.out) as first:
                if first and not rehearsal:
                    self._clean_up()
                try:
                    yield
                    finished = not rehearsal
                finally:
                    if first and not finished and not rehearsal:
                        clear_unused(self.path("state"))
        finally:
            if not finished:
                for folder in made:
                    with suppress(OSError):  # not empty, most likely
                        folder.rmdir()

    def stage(
        self,
        name: str,
        *,
        inputs: Iterable[str] = (),
        facts: Mapping[str, Any] | None = None,
        section: Mapping[str, Any] | None = None,
    ) -> Stage:
        """A context manager that yields an empty folder and publishes it as OUT/name when the block succeeds.

        On any failure, an interrupt included, the folder is removed and an older OUT/name stays as it was.
        `inputs` names the stages this one is made from: their digests are kept, for `require_stage`. `facts`
        is kept in the manifest's stages[name]; `section` is for `update_manifest`, in the same write.
        Both are read when the block ends. Publishing anything but reports empties the gates: their results
        belonged to what was there before.
        """
        _check_stage_name(name)
        return Stage(self, name, tuple(inputs), facts, section)

    def write_text(self, name: str, text: str, *, executable: bool = False) -> Path:
        """Publish one UTF-8 text file at OUT/name, as a stage of its own. Returns its path."""
        _check_stage_name(name)
        with self.lock():
            temporary = self._temporary(name)
            try:
                temporary.write_text(text, encoding="utf-8")
                if executable:
                    temporary.chmod(0o755)
                self._publish(name, (), None, None)
            finally:
                remove(temporary)
        return self.path(name)

    def update_manifest(self, section: Mapping[str, Any]) -> None:
        """Replace `source`, `recipe_sha256` and `gates`, merge into `versions`, as far as they are given.

        Raises ValueError for any other key: `files` and `stages` are written by `stage` alone.
        """
        with self.lock():
            self._write(self._manifest_or_new().updated(section), MANIFEST)

    def claim(self, *names: str) -> None:
        """Raise UsageError where one of OUT/names is there and is not this program's: what a command is going to
        write, looked at before it works."""
        manifest = self._manifest_or_new()
        for name in names:
            target = self.path(name)
            unfinished = self.path(_PENDING + name).exists()  # see `rehearse`: else there is none once OUT is locked
            if os.path.lexists(target) and name not in manifest.stages and not unfinished:
                raise UsageError(
                    f"{target} exists and was not written by this program, which therefore will not replace it; "
                    "choose another --out or move it away"
                )

    def refuse_others(self) -> None:
        """Raise UsageError where OUT is no place for an artefact: a file, or a folder with files in it and no artefact,
        such as somebody's home or a checkout. Nothing is made or locked.

        Hidden files, and what an interrupted first run leaves, are no reason.
        """
        if not may_be_folder(self.out):
            raise self._no_folder()
        if not self.out.exists():
            return
        if not self.exists():
            names = {path.name for path in self.out.iterdir()}
            # A first publication that was killed at step 4.
            ours = {name.removeprefix(_PENDING) for name in names if name.startswith(_PENDING)}
            others = sorted(name for name in names - ours if not _LEFT_ALONE.fullmatch(name))
            if others:
                raise UsageError(
                    f"{self.out} has {others[0]!r} in it, which was not written by this program: nothing is written "
                    f"there; choose another --out, such as {self.out / 'compressed'}"
                )
        check_folder(self.path("state"))

    def _no_folder(self) -> UsageError:
        return UsageError(f"{self.out} is not, or is not in, a folder; choose another --out")

    def rehearse(self, *names: str) -> None:
        """Raise what a command that writes OUT/`names` would raise before its work, and leave everything as it is."""
        with self.lock(rehearsal=True):
            self.refuse_others()
            self.claim(*names)

    def open_state(self, request: Mapping[str, Any]) -> KeptFolder:
        """OUT/state, outside the manifest: the finished pieces of an interrupted run, empty where there are none of
        this request. Call it with the lock held. Raises as `KeptFolder.open`."""
        return KeptFolder.open(self.path("state"), request)

    def clear_state(self) -> None:
        """Remove OUT/state, once there is nothing left to resume."""
        with self.lock():
            clear(self.path("state"))

    def clear_finished_state(self) -> None:
        """Remove OUT/state where it is of the request that OUT/checkpoint was made by, which is known to be whole: a
        kill came between publishing the one and removing the other."""
        with self.lock():
            left, made = request_of(self.path("state")), self._manifest_or_new().stages.get("checkpoint", {})
            if isinstance(left, dict) and {k: v for k, v in left.items() if k != "versions"} == made.get("request"):
                clear(self.path("state"))

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """An empty folder in OUT for the time of the block, on the file system that the results are for. What a kill
        leaves of it goes when OUT is locked next."""
        with self.lock():
            folder = self.path(_SCRATCH + name)
            remove(folder)
            folder.mkdir()
            try:
                yield folder
            except Exception as error:  # as in Stage.__exit__: all is passed on, with a place where it lacks one
                if (known := located(error, folder)) is not error:
                    raise known from error
                raise
            finally:
                remove(folder)

    # -- inside --------------------------------------------------------------------------------------------

    def _manifest(self) -> Manifest:
        return Manifest.read(self.path(MANIFEST))

    def _manifest_or_new(self) -> Manifest:
        return self._manifest() if os.path.lexists(self.path(MANIFEST)) else Manifest()

    def _complete(self, name: str) -> Manifest:
        manifest = self._manifest()
        if name not in manifest.stages or not self.path(name).exists():
            raise ArtifactError(f"{self.out} has no complete {name}; build it first")
        return manifest

    def _temporary(self, name: str) -> Path:
        """The place to write stage `name`, empty. Call it with the lock held."""
        self.claim(name)
        temporary = self.path(_TMP + name)
        remove(temporary)
        return temporary

    def _publish(
        self,
        name: str,
        inputs: tuple[str, ...],
        facts: Mapping[str, Any] | None,
        section: Mapping[str, Any] | None,
    ) -> None:
        temporary, target, old = self.path(_TMP + name), self.path(name), self.path(_OLD + name)
        entries = seal(temporary, name)
        manifest = self._manifest_or_new()
        stage: dict[str, Any] = dict(facts or {})
        if inputs:
            stage["inputs"] = {source: self.stage_digest(source) for source in inputs}
        manifest = manifest.with_stage(name, stage, entries).updated(section or {})
        self._write(manifest, _PENDING + name)
        try:
            if os.path.lexists(target):
                os.rename(target, old)
            os.rename(temporary, target)
            os.replace(self.path(_PENDING + name), self.path(MANIFEST))
        except OSError:
            self._recover(name)
            raise
        fsync(self.out)
        remove(old)

    def _write(self, manifest: Manifest, name: str) -> None:
        """Put `manifest` at OUT/name, whole or not at all."""
        draft = self.path(_DRAFT)
        try:
            with open(draft, "w", encoding="utf-8") as file:
                file.write(manifest.to_json())
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, self.path(name))
        except OSError as error:
            named(error, draft)
            raise
        finally:
            remove(draft)
        fsync(self.out)

    def _recover(self, name: str) -> None:
        """Undo or finish the publication of stage `name`, which failed or was killed after step 2."""
        target, old, pending = self.path(name), self.path(_OLD + name), self.path(_PENDING + name)
        if os.path.lexists(self.path(_TMP + name)):
            if not os.path.lexists(target) and os.path.lexists(old):
                os.rename(old, target)
            remove(pending)
        else:
            os.replace(pending, self.path(MANIFEST))
            remove(old)

    def _clean_up(self) -> None:
        """Recover what a killed process had begun and remove what it left. Call it once the lock is taken."""
        for pending in self.out.glob(_PENDING + "*"):
            if pending.is_symlink() or not pending.is_file():
                remove(pending)  # not what step 2 wrote
                continue
            self._recover(pending.name.removeprefix(_PENDING))
        for pattern in (_TMP + "*", _OLD + "*", _SCRATCH + "*", _DRAFT):
            for leftover in self.out.glob(pattern):
                remove(leftover)

    def _verify_file(self, name: str, entry: FileEntry) -> None:
        path = self.path(name)
        refuse_links(path, self.out)
        size = path.lstat().st_size
        if size != entry["size"]:
            state = "truncated" if size < entry["size"] else "changed"
            raise ArtifactError(
                f"{path} is {state}: {size} bytes, where the manifest has {entry['size']}; build it again"
            )
        if sha256_of(path) != entry["sha256"]:
            raise ArtifactError(f"{path} is changed: its SHA-256 is not the manifest's; build it again")

    def _refuse_strangers(self, stage: str, files: Mapping[str, FileEntry]) -> None:
        """Python's own byte code aside, a stage's folder holds what the manifest lists and nothing else."""
        for path in files_below(self.path(stage)):
            name = path.relative_to(self.out).as_posix()
            if name not in files and "__pycache__" not in path.parts:
                raise ArtifactError(f"{path} is not in the manifest; remove it, or build {stage} again")


class Stage:
    """What `Artifact.stage` returns."""

    def __init__(
        self,
        artifact: Artifact,
        name: str,
        inputs: tuple[str, ...],
        facts: Mapping[str, Any] | None,
        section: Mapping[str, Any] | None,
    ) -> None:
        self._artifact, self._name = artifact, name
        self._arguments = (inputs, facts, section)

    def __enter__(self) -> Path:
        with ExitStack() as stack:
            stack.enter_context(self._artifact.lock())
            self._folder = self._artifact._temporary(self._name)
            self._folder.mkdir()
            stack.callback(remove, self._folder)
            self._held = stack.pop_all()
        return self._folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held:
            if error is None:
                self._artifact._publish(self._name, *self._arguments)
            elif isinstance(error, Exception) and (known := located(error, self._folder)) is not error:
                raise known from error


def _check_stage_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_.-]*", name) or name in (MANIFEST, "state"):
        raise ValueError(f"{name!r} is no stage name")


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + "/")
