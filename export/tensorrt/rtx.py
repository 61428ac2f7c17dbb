"""TensorRT-RTX: an engine built ahead of time for the GPUs that are named, on any machine, with or without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.artifact.files import sha256_of
from compress.artifact.store import Artifact
from compress.errors import MissingDependencyError, UsageError
from compress.lazy import LEAST, version_of
from compress.progress import log
from export.graph.decoder import MODEL_NAME
from export.graph.header import read_header
from export.stages import BUILD_INFO, build_info, is_current, write_json
from export.tensorrt.jobs import Job, run_job
from export.tensorrt.options import PLAN, Options, installed, plugin_library

CAPABILITIES = (75, 80, 86, 89, 120, 121)
"""What TensorRT-RTX 1.7 builds for: Turing, Ampere, Ada and consumer Blackwell; not Hopper, nor Blackwell's B200."""
DEFAULT = (80, 86, 89, 120)


def parse_capabilities(text: str | None) -> tuple[int, ...]:
    """8.0,8.9 -> (80, 89). Raises UsageError for what TensorRT-RTX has no engines for."""
    if text is None:
        return DEFAULT
    found = []
    for part in text.split(","):
        number = part.strip().replace(".", "")
        if not number.isdigit() or int(number) not in CAPABILITIES:
            known = ", ".join(f"{c // 10}.{c % 10}" for c in CAPABILITIES)
            raise UsageError(f"--compute-capability {part.strip()!r}: TensorRT-RTX builds for {known}")
        found.append(int(number))
    return tuple(dict.fromkeys(found))


def require() -> str:
    """The version of TensorRT-RTX. Raises MissingDependencyError, with all that is missing and how to get it."""
    version = installed("tensorrt-rtx-cu13") or installed("tensorrt-rtx") or installed("tensorrt-rtx-cu12")
    least = LEAST["tensorrt-rtx-cu13"]
    missing = [] if version else ["TensorRT-RTX (pip install 'procrustes-llm[trt-rtx]')"]
    if version and version_of(version) < version_of(least):
        missing.append(f"TensorRT-RTX {least} or later in place of {version}")
    if installed("polygraphy") is None:
        missing.append("polygraphy (pip install 'procrustes-llm[trt-rtx]')")
    if version is None or missing:
        raise MissingDependencyError(f"a TensorRT-RTX engine needs {'; and '.join(missing)}")
    return version


def build_rtx(artifact: Artifact, options: Options, capabilities: Sequence[int]) -> dict[str, Any]:
    """OUT/engine: the plan and build.json, whose values are returned.

    Nothing is timed when an engine is built ahead of time, so `auto` takes the function bodies: such an engine needs no
    library beside it. Raises MissingDependencyError where TensorRT-RTX is missing, ArtifactError when it refuses the
    graph.
    """
    version = require()
    library = plugin_library(artifact) if options.plugin == "cpp" else None
    wanted = {
        "engine": "trt-rtx",
        "versions": {"tensorrt-rtx": version},
        "compute_capabilities": list(capabilities),
        "flags": options.flags(),
        "plugin_sha256": None if library is None else sha256_of(library),
    }
    inputs = ["onnx"] if library is None else ["onnx", "plugins"]
    if is_current(artifact, "engine", inputs, wanted):
        log(f"re-using {artifact.path('engine')}: same graph and TensorRT-RTX")
        return build_info(artifact, "engine")
    path = artifact.require_stage("onnx") / MODEL_NAME
    profiles = options.spans.profiles(read_header(path).axes)
    with artifact.stage("engine", inputs=inputs, facts=wanted, section={"versions": wanted["versions"]}) as folder:
        built = run_job(
            Job(
                onnx=str(path),
                plan=str(folder / PLAN),
                profiles=tuple(profiles),
                rtx=True,
                capabilities=tuple(capabilities),
                plugins=() if library is None else (str(library),),
                optimization=options.optimization,
                workspace=options.workspace,
            )
        )
        values = {
            **wanted,
            **built,
            "plan": PLAN,
            "plugin": "native" if library is None else "cpp",
            "profiles": profiles,
        }
        write_json(folder / BUILD_INFO, values)
    return build_info(artifact, "engine")
