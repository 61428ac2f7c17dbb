"""One engine to build: what the process that builds it is given, and how that process is run and read."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from compress.errors import ArtifactError, MissingDependencyError
from compress.progress import log
from export.runtime.profiles import Profile

HARMLESS = re.compile(r"catchCudaError|cudaError 35|TF32 is disabled by default")
"""Lines that the libraries write in every build, on a machine without a driver or anywhere."""

_LACK = re.compile(r"std::bad_alloc|^MemoryError|[Cc]annot allocate memory")

SECONDS_OF_SILENCE = 5.0


@dataclass(frozen=True)
class Job:
    """`onnx` -> `plan`, paths.

    rtx: by TensorRT-RTX, for the compute capabilities given as major * 10 + minor; else by TensorRT, for this GPU.
    plugins: libraries to load into the registry first. optimization: the builder's level, 0 ... 5. workspace: bytes.
    timing_cache: a file that is read and added to. layers: where to write what the engine is made of, which a GPU
    has to be there for.
    """

    onnx: str
    plan: str
    profiles: tuple[Profile, ...]
    rtx: bool = False
    capabilities: tuple[int, ...] = ()
    plugins: tuple[str, ...] = ()
    optimization: int | None = None
    workspace: int | None = None
    timing_cache: str | None = None
    layers: str | None = None

    def to_json(self) -> str:
        """For the process that builds."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """What `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(**values | {key: tuple(values[key]) for key in ("profiles", "capabilities", "plugins")})


def run_job(job: Job) -> dict[str, Any]:
    """Build the engine and return what is known of it; progress goes to the log.

    Raises ArtifactError with TensorRT's own words when it refuses the graph, or when its process ends otherwise, and
    MissingDependencyError when its library cannot be loaded or memory runs out.
    """
    with tempfile.TemporaryDirectory(prefix="procrustes-engine-") as scratch:
        env = rtx_environment(Path(scratch)) if job.rtx else dict(os.environ)
        root = str(Path(__file__).resolve().parents[2])  # this package, wherever the command was started
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
        job_file, result = Path(scratch) / "job.json", Path(scratch) / "result.json"
        job_file.write_text(job.to_json(), encoding="utf-8")
        command = [sys.executable, "-m", "export.tensorrt.worker", str(job_file), str(result)]
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        said: list[str] = []
        assert process.stdout is not None and process.stderr is not None  # noqa: PT018
        reader = threading.Thread(target=_collect, args=(process.stderr, said), daemon=True)
        reader.start()
        try:
            _follow(process.stdout, said)
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        reader.join()
        if code == 0 and result.is_file():
            values: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            return {**values, "warnings": _worth_reading(said)}
        raise _failure(code, said, job)


def _failure(code: int, said: list[str], job: Job) -> Exception:
    name = "TensorRT-RTX" if job.rtx else "TensorRT"
    lines = _worth_reading(said)
    for line in lines:
        log(f"  {line}")
    if any(line.startswith(("ModuleNotFoundError", "ImportError", "OSError")) for line in lines):
        return MissingDependencyError(f"{name} cannot be loaded ({lines[-1]})")
    lack = next((line.strip() for line in lines if _LACK.search(line)), None)
    if code == -signal.SIGKILL or lack is not None:
        said_so = (
            "was killed, as Linux does when memory runs out" if lack is None else f"ran out of memory ({lack:.200})"
        )
        return MissingDependencyError(
            f"{name} built no engine from {Path(job.onnx).name}: its process {said_so}; end other programs, lower "
            "--batch, --prompt and --cache, or build on a machine with more memory"
        )
    ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    errors = [line.removeprefix("[E]").strip() for line in lines if line.startswith("[E]")]
    reason = errors[0] if errors else lines[-1].strip() if lines else "it said nothing"
    return ArtifactError(f"{name} built no engine from {Path(job.onnx).name}: its process {ended}; {reason}")


def _worth_reading(said: list[str]) -> list[str]:
    return [line.rstrip() for line in said if line.strip() and not HARMLESS.search(line)]


def _collect(stream: IO[str], lines: list[str]) -> None:
    lines.extend(stream)


def _follow(stream: IO[str], others: list[str]) -> None:
    """Log the steps of the whole build, and of its phases where one takes long; `others` gets what is no step."""
    spoke = 0.0
    for line in stream:
        try:
            said = json.loads(line)
            text, whole = f"engine: {said['phase']} {said['step']}/{said['of']}", said["whole"]
        except (ValueError, KeyError, TypeError):
            others.append(line)
            continue
        if whole or time.monotonic() - spoke > SECONDS_OF_SILENCE:
            spoke = time.monotonic()
            log(text)


def rtx_environment(scratch: Path) -> dict[str, str]:
    """The environment of a process that parses with TensorRT-RTX.

    The parser of version 1.7 opens its library by a name that the wheel does not have, and ends the process where it
    fails: in the folder `scratch` it has that name, and LD_LIBRARY_PATH begins with it.
    """
    environment = dict(os.environ)
    found = importlib.util.find_spec("tensorrt_rtx_libs")
    places = [] if found is None else list(found.submodule_search_locations or [])
    for library in (path for place in places for path in Path(place).glob("libtensorrt_rtx.so.*")):
        (scratch / "libtensorrt_rtx.so").symlink_to(library)
        others = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(scratch), others]))
        break
    return environment
