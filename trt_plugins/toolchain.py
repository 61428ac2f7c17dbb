"""Finding what compiles the plugins: nvcc with its headers, a host compiler, CMake, and TensorRT's headers."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compress.errors import MissingDependencyError

HEADER = "NvInferRuntime.h"
DEBIAN = Path("/usr/include/x86_64-linux-gnu")


@dataclass(frozen=True)
class Toolchain:
    """`cuda` is the folder that has bin/nvcc and include; `pip`: it came from packages, not from a toolkit."""

    cuda: Path
    pip: bool
    tensorrt: Path
    cmake: Path
    host: Path

    @property
    def nvcc(self) -> Path:
        """The compiler."""
        return self.cuda / "bin" / "nvcc"

    @property
    def libraries(self) -> Path:
        """The folder of libcudart_static.a."""
        found = [self.cuda / name for name in ("lib64", "lib") if (self.cuda / name / "libcudart_static.a").is_file()]
        return found[0] if found else self.cuda / "lib"


def find() -> Toolchain:
    """What is there. Raises MissingDependencyError, in one sentence, for the first thing that is not."""
    cuda, pip = _cuda()
    host = shutil.which("g++")
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if host is None:
        raise MissingDependencyError("the plugins need a C++ compiler: install g++ (apt install g++)")
    if cmake is None:
        raise MissingDependencyError(
            "the plugins need CMake: pip install 'procrustes-llm[plugins]', or apt install cmake"
        )
    return Toolchain(cuda, pip, tensorrt_headers(), Path(cmake), Path(host))


def _cuda() -> tuple[Path, bool]:
    """(the folder with bin/nvcc and include, whether it came from pip packages): a toolkit (CUDA_HOME, then nvcc on
    PATH), or those packages. Raises MissingDependencyError."""
    if "CUDA_HOME" in os.environ:
        home = Path(os.environ["CUDA_HOME"])
        if not (home / "bin" / "nvcc").is_file():
            raise MissingDependencyError(
                f"CUDA_HOME is {home}, which has no bin/nvcc: unset it, or name a CUDA toolkit"
            )
        return home, False
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        nvcc = Path(folder) / "nvcc"
        if nvcc.is_file():
            for home in (nvcc.resolve().parents[1], Path("/usr/local/cuda")):  # nvcc may be a script that calls it
                if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_fp16.h").is_file():
                    return home, False
    for home in packages("nvidia/cu13"):
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_fp16.h").is_file():
            return home, True
    raise MissingDependencyError(
        "there is no CUDA compiler: put nvcc on PATH, set CUDA_HOME, or pip install 'procrustes-llm[plugins]'"
    )


def tensorrt_headers() -> Path:
    """The folder of NvInferRuntime.h: TENSORRT_INCLUDE_DIR, libnvinfer-dev, or the package that carries the headers."""
    if "TENSORRT_INCLUDE_DIR" in os.environ:
        folder = Path(os.environ["TENSORRT_INCLUDE_DIR"])
        if not (folder / HEADER).is_file():
            raise MissingDependencyError(f"TENSORRT_INCLUDE_DIR is {folder}, which has no {HEADER}")
        return folder
    for folder in (DEBIAN, Path("/usr/include"), *packages("kernel_lens/include/tensorrt")):
        if (folder / HEADER).is_file():
            return folder
    raise MissingDependencyError(
        "TensorRT's headers are not there: set TENSORRT_INCLUDE_DIR, install libnvinfer-dev, or "
        "pip install 'procrustes-llm[plugins]'"
    )


def packages(inside: str) -> Iterator[Path]:
    """Folders of that name among the installed packages."""
    for key in ("purelib", "platlib"):
        folder = Path(sysconfig.get_paths()[key]) / inside
        if folder.is_dir():
            yield folder
