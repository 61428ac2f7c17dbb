"""The CUDA kernels on CPU threads against float64: plain, under ThreadSanitizer, under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from compress.errors import MissingDependencyError
from tests.tools import unavailable
from trt_plugins import toolchain

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "trt_plugins" / "csrc"
SANITIZERS = {
    "plain": ["-O1"],
    "threads": ["-O1", "-fsanitize=thread"],
    "addresses": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


def compiled(sources: Path, out: Path, flags: list[str]) -> Path:
    try:
        tools = toolchain.find()
    except MissingDependencyError as error:
        unavailable(str(error))
    program = out / "kernels_test"
    command = [
        str(tools.host),
        *["-std=c++20", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread"],
        *flags,
    ]
    command += ["-isystem", str(tools.cuda / "include"), f"-I{HERE}", f"-I{sources}", str(HERE / "kernels_test.cpp")]
    command += ["-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, cases: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    return subprocess.run(
        [str(program), str(cases)], capture_output=True, text=True, check=False, env=environment, timeout=600
    )


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_every_op_in_every_type(sanitizer: str, tmp_path: Path) -> None:
    done = run(compiled(SOURCES, tmp_path, SANITIZERS[sanitizer]), 3 if sanitizer == "plain" else 1)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert lines[-1] == "0 failures"
    assert len(lines) == 1 + 42 * (3 if sanitizer == "plain" else 1)


def planted(tmp_path: Path, old: str, new: str) -> Path:
    """A copy of the kernels with a defect."""
    copy = tmp_path / "csrc"
    shutil.copytree(SOURCES, copy)
    skinny = copy / "kernels" / "skinny.cuh"
    text = skinny.read_text()
    assert old in text
    skinny.write_text(text.replace(old, new))
    return copy


def test_a_missing_barrier_is_reported(tmp_path: Path) -> None:
    """The barrier between filling shared memory and reading it."""
    old = "  __syncthreads();\n\n  T const* const weight"
    sources = planted(tmp_path, old, old.replace("__syncthreads();", ""))
    done = run(compiled(sources, tmp_path, SANITIZERS["threads"]), 1)
    assert done.returncode == 66
    assert "data race" in done.stderr


def test_an_index_out_of_shared_memory_is_reported(tmp_path: Path) -> None:
    sources = planted(tmp_path, "z[t * columns + c + i]", "z[t * columns + c + i + 4096]")
    done = run(compiled(sources, tmp_path, SANITIZERS["addresses"]), 1)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr


def test_wrong_sums_are_seen(tmp_path: Path) -> None:
    sources = planted(tmp_path, "fold<0, Distance / 2>(values, lane);", "")
    done = run(compiled(sources, tmp_path, SANITIZERS["plain"]), 1)
    assert done.returncode == 1
    assert "FAIL" in done.stdout
