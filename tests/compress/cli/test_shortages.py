"""Too little memory, too few file handles: exit 4 and a sentence that says what to lower."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from compress.cli.entry import run_cli
from compress.cli.shortages import shortage_of
from compress.errors import ArtifactError, UsageError


class LibraryError(Exception):
    """As safetensors, tokenizers and ONNX Runtime raise them."""


LibraryError.__module__ = "onnxruntime.capi"


def raising(error: Exception, cause: Exception | None = None) -> Callable[[Sequence[str] | None], int]:
    def main(argv: Sequence[str] | None) -> int:
        raise error from cause

    return main


SHORTAGES = [
    (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "out/x"), "too few file handles"),
    (OSError(errno.ENFILE, os.strerror(errno.ENFILE)), "too few file handles"),
    (RuntimeError("unable to open file <x> in read-write mode: Too many open files (24)"), "too few file handles"),
    (LibraryError("I/O error: Too many open files (os error 24)"), "too few file handles"),
    (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "out of memory"),
    (MemoryError(), "out of memory (MemoryError)"),
    (MemoryError("std::bad_alloc"), "out of memory (std::bad_alloc)"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: ..."), "alloc_cpu"),
    (RuntimeError("unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)"), "out of memory"),
    (LibraryError("Failed to allocate memory for requested buffer of size 99"), "out of memory"),
    (ImportError("x.so: failed to map segment from shared object: Cannot allocate memory"), "out of memory"),
    (RuntimeError("can't start new thread"), "too few threads"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "the GPU is out of memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "the GPU"),
]


@pytest.mark.parametrize(("error", "said"), SHORTAGES, ids=lambda value: str(value)[:30])
def test_a_shortage_is_exit_4(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(raising(error), []) == 4
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert said in line
    assert any(advice in line for advice in ("lower", "raise it"))
    assert line.count("\n") == 1


def test_a_shortage_is_not_taken_for_damage(capsys: pytest.CaptureFixture[str]) -> None:
    """A reader that met it says that the file is damaged: it is not."""
    cause = OSError(errno.EMFILE, os.strerror(errno.EMFILE), "model.safetensors")
    assert run_cli(raising(ArtifactError("model.safetensors is damaged: download it again"), cause), []) == 4
    assert "too few file handles" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        UsageError("--calibration-data notes on 'Cannot allocate memory' is no text"),
        ArtifactError("Too many open files.txt is missing"),
        ValueError("bad_alloc"),
        RuntimeError("shapes do not match"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=str,
)
def test_other_errors_are_not_taken_for_shortages(error: Exception) -> None:
    assert shortage_of(error) is None


def test_a_real_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch's own message, whatever this version's is."""

    def main(argv: Sequence[str] | None) -> int:
        torch.empty(1 << 62, dtype=torch.uint8)
        return 0

    assert run_cli(main, []) == 4
    assert "error: out of memory" in capsys.readouterr().err


def test_other_exceptions_pass_through() -> None:
    with pytest.raises(ZeroDivisionError):
        run_cli(raising(ZeroDivisionError()), [])


def test_a_full_disk_that_a_library_tells_of_is_exit_5(capsys: pytest.CaptureFixture[str]) -> None:
    """Outside of a stage of the artefact, as in a temporary folder."""
    assert run_cli(raising(LibraryError("I/O error: No space left on device (os error 28)")), []) == 5
    assert capsys.readouterr().err.startswith("error: No space left on device")
