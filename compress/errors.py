"""The errors that a user can meet, and the one place where they become exit codes.

Every message is one sentence or two: what was wrong, the value seen, where, and what to do next. Exit codes:
0 ok; 1 a bug; 2 usage; 3 a gate failed; 4 the environment lacks something; 5 an artefact is corrupt, does not
match, or cannot be written; 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence

from compress.standard_streams import readers_may_leave


class ProcrustesError(Exception):
    """A failure that we can put into a sentence. Raised itself only for a bug in this project."""

    exit_code = 1


class UsageError(ProcrustesError):
    """What was asked for cannot be done: a bad flag, an unknown name, an unsupported model."""

    exit_code = 2


class GateError(ProcrustesError):
    """A measured figure is past the limit that the user set."""

    exit_code = 3


class MissingDependencyError(ProcrustesError):
    """The environment lacks a package, a library, a device, memory or file handles."""

    exit_code = 4


class ArtifactError(ProcrustesError):
    """A file is missing, truncated, changed or hostile, does not match another one, or cannot be written."""

    exit_code = 5


INTERRUPTED = 130

# What the operating system refused -> what to do next.
_WRITE_ADVICE = {
    errno.ENOSPC: "free some space there or choose another folder, then run the same command again",
    errno.EDQUOT: "free some of your quota or choose another folder, then run the same command again",
    errno.EACCES: "choose a folder that you may read and write, or change its permissions",
    errno.EPERM: "choose a folder that you may read and write, or change its permissions",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) or choose another file system",
    errno.ENAMETOOLONG: "choose a folder with a shorter name",
    errno.EROFS: "choose a folder on a file system that is not mounted read-only",
}

# As tempfile says it: it tries to write to each folder that it knows of.
_NO_TEMPORARY_FOLDER = "No usable temporary directory found"
_TEMPORARY_ADVICE = (
    "no temporary folder can be written to, neither TMPDIR nor /tmp: set TMPDIR to a folder that you may write to, on "
    "a disk with space"
)


def run_cli(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run a command's `main` and return its exit code; the caller passes it to `sys.exit`.

    A `ProcrustesError` or a refusal by the operating system prints `error: <sentence>` on stderr, with no
    traceback unless `--debug` is among the arguments or PROCRUSTES_DEBUG=1. Anything else is a bug and passes
    through, so that the interpreter prints its traceback and exits with 1; so does SystemExit, which argparse
    raises for usage errors. `argv=None` means the process's own arguments, as for argparse.

    A reader of stdout or stderr that has gone (`| head -1`), or was never there (`>&-`), changes neither the work nor
    the exit code: what was asked for is the artefact, or the answer of a gate, and whether a pipe breaks before the
    last line is a matter of timing. Programs whose output is all that they make end with 141 instead.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("PROCRUSTES_DEBUG", "0") not in ("", "0")
    from compress.shortages import run_telling

    with readers_may_leave():
        try:
            code = run_telling(main, argv)
            sys.stdout.flush()  # a disk that is full shows here, where it can be told
            return code
        except KeyboardInterrupt:
            return _fail("interrupted; run the same command again to resume", INTERRUPTED, debug, prefix="")
        except ProcrustesError as error:
            return _fail(str(error), error.exit_code, debug)
        except OSError as error:
            if any(_NO_TEMPORARY_FOLDER in str(each) for each in _chain(error)):
                return _fail(_TEMPORARY_ADVICE, MissingDependencyError.exit_code, debug)
            advice = _WRITE_ADVICE.get(error.errno or 0)
            if advice is None:
                raise
            return _fail(f"{describe_os_error(error)}{_place(error)}; {advice}", ArtifactError.exit_code, debug)


def no_command(module: str, instead: str) -> int:
    """For `python -m` of a module that is imported by a command: say so on stderr; returns the exit code of usage."""
    print(f"error: {module} is not a command: {instead}", file=sys.stderr)
    return UsageError.exit_code


def describe_os_error(error: OSError) -> str:
    """`No space left on device: 'out/demo/checkpoint'`, with the file named where the error knows it."""
    reason = error.strerror or type(error).__name__
    path = error.filename2 if error.filename2 is not None else error.filename
    return reason if path is None else f"{reason}: {os.fsdecode(path)!r}"


def _place(error: OSError) -> str:
    """Where it can have been: a write() that failed does not know its file."""
    if error.filename is not None or error.filename2 is not None or tempfile.tempdir is None:
        return ""
    return f" (of what is printed, or in the temporary folder {tempfile.tempdir!r}, which TMPDIR sets)"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__


def _fail(sentence: str, code: int, debug: bool, prefix: str = "error: ") -> int:
    if debug:
        traceback.print_exc()
    print(f"{prefix}{sentence}", file=sys.stderr, flush=True)
    return code
