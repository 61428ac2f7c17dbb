"""The one place where errors become messages and exit codes."""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from compress.cli.own_packages import check_own_packages
from compress.cli.standard_streams import readers_may_leave
from compress.errors import _LONG, ArtifactError, MissingDependencyError, ProcrustesError, _cut

INTERRUPTED, TERMINATED = 130, 143

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
    from compress.cli.shortages import run_telling

    with readers_may_leave(), _ended_cleanly():
        try:
            check_own_packages(_module_of(main))
            code = run_telling(main, argv)
            sys.stdout.flush()  # a disk that is full shows here, where it can be told
            return code
        except KeyboardInterrupt as error:
            code = TERMINATED if isinstance(error, TerminatedError) else INTERRUPTED
            return _fail("interrupted; run the same command again to resume", code, debug, prefix="")
        except ProcrustesError as error:
            return _fail(str(error), error.exit_code, debug)
        except OSError as error:
            if any(_NO_TEMPORARY_FOLDER in str(each) for each in _chain(error)):
                return _fail(_TEMPORARY_ADVICE, MissingDependencyError.exit_code, debug)
            advice = _WRITE_ADVICE.get(error.errno or 0)
            if advice is None:
                raise
            return _fail(f"{describe_os_error(error)}{_place(error)}; {advice}", ArtifactError.exit_code, debug)


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, which `docker stop`, a CI that cancels and `timeout` send: an end as by Ctrl-C, with its own code."""


@contextmanager
def _ended_cleanly() -> Iterator[None]:
    """Within the block SIGTERM raises `TerminatedError`, so that what was begun is tidied up as for Ctrl-C.

    Not where the signal is ignored, or somebody else handles it, or another thread than the main one is running.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not end the tidying up
        raise TerminatedError

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _module_of(main: Callable[[Sequence[str] | None], int]) -> str:
    """The dotted name of the module of a command's `main`, which is `__main__` when it runs."""
    spec = sys.modules["__main__"].__spec__ if main.__module__ == "__main__" else None
    return main.__module__ if spec is None else spec.name


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
    print(f"{prefix}{_LONG.sub(_cut, sentence)}", file=sys.stderr, flush=True)
    return code
