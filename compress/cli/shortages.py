"""Too little memory and too few file handles, in whatever words a library says so, as one sentence."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from compress.artifact.files import os_error_of
from compress.errors import MissingDependencyError, ProcrustesError

_HANDLES = (errno.EMFILE, errno.ENFILE)
_TEXTS = {  # as torch, safetensors, ONNX Runtime, the dynamic loader and Python have them
    "handles": ("Too many open files", "(os error 24)", "(os error 23)"),
    "gpu": ("CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory"),
    "threads": ("can't start new thread",),
    "memory": (
        "can't allocate memory",
        "Cannot allocate memory",
        "cannot allocate memory",
        "Failed to allocate memory",
        "failed to map segment",
        "bad allocation",
        "bad_alloc",
        "(os error 12)",
    ),
}


def shortage_of(error: BaseException) -> str | None:
    """What was lacking and what to lower, where `error` or what it was raised from is such a lack; else None."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
    for each in chain:
        kind = _kind(each)
        if kind is not None:
            return _sentence(kind, each)
    return None


def free_memory() -> int | None:
    """Bytes that this process can still get: of the machine, and of its own limit (ulimit -v). None where the system
    does not say."""
    found = []
    with suppress(OSError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) << 10)
        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            found.append(max(0, soft - taken))
    return min(found, default=None)


def run_telling(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """`main(argv)`; a lack of memory or handles becomes a MissingDependencyError (exit 4), and what the system refused
    to a library that gives it only in its text an OSError. All else passes through."""
    try:
        return main(argv)
    except Exception as error:  # libraries raise it in classes of their own; what is no shortage goes on as it is
        sentence = shortage_of(error)
        if sentence is None:
            known = error if isinstance(error, ProcrustesError) else os_error_of(error, None)
            if known is error:
                raise
            raise known from error
        raise MissingDependencyError(sentence) from error


def _kind(error: BaseException) -> str | None:
    text = str(error)
    if isinstance(error, OSError) and error.errno in _HANDLES:
        return "handles"
    if type(error).__name__ == "OutOfMemoryError" or any(part in text for part in _TEXTS["gpu"]):  # torch's, for GPUs
        return "gpu"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "memory"
    # The words alone count only where a library, or the system, would use them.
    if isinstance(error, (RuntimeError, OSError, ImportError)) or type(error).__module__.split(".")[0] not in (
        "builtins",
        "compress",
    ):
        return next((kind for kind, parts in _TEXTS.items() if any(part in text for part in parts)), None)
    return None


def _sentence(kind: str, error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    reason = lines[0][:200] if lines else type(error).__name__
    if kind == "handles":
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"too few file handles ({reason}): this process may have {soft} files open; raise it (ulimit -n)"
    if kind == "threads":
        return f"too few threads ({reason}): lower OMP_NUM_THREADS, or raise the limit (ulimit -u)"
    if kind == "gpu":
        return (
            f"the GPU is out of memory ({reason}): lower --calibration-batch or --sequence-length, end other programs "
            f"on it, or use --device cpu"
        )
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    limit = "" if soft == resource.RLIM_INFINITY else f" or raise the limit of {soft / 1e9:,.1f} GB (ulimit -v)"
    return (
        f"out of memory ({reason}): lower --calibration-batch, --calibration-samples or --sequence-length (for "
        f"validation --batch-sizes or --max-windows), end other programs{limit}"
    )
