"""A write that fails knows no file, and a library's not even its number: the folder that it was for is told."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from compress.artifact.store import Artifact
from compress.errors import ArtifactError


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("place", ["stage", "scratch"])
def test_a_full_disk_is_told_with_the_folder(place: str, library: bool, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    error = RuntimeError("IoError: ... (os error 28)") if library else full
    artifact = Artifact(tmp_path / "out")
    opened = artifact.stage("onnx") if place == "stage" else artifact.scratch("dense")
    with pytest.raises(OSError, match="No space left") as caught, opened as folder:
        raise error
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(folder))
    assert not folder.exists()


def test_other_errors_leave_scratch_as_they_are(tmp_path: Path) -> None:
    for error in (ArtifactError("damaged (os error 28)"), ZeroDivisionError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, Artifact(tmp_path / "out").scratch("dense"):
            raise error
        assert caught.value is error
