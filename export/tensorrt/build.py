"""TensorRT: OUT/engine/model.plan from OUT/onnx, with the plugins or without, for the GPU of this machine.

What a GPU is not needed for is made first: the plugin libraries (OUT/plugins) and OUT/build_engine.sh, which builds the
engine where there is one.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.artifact.files import sha256_of
from compress.artifact.store import Artifact
from compress.errors import MissingDependencyError
from compress.lazy import LEAST
from compress.progress import log
from export.graph.decoder import MODEL_NAME
from export.graph.header import read_header
from export.runtime.profiles import DECODE, PREFILL, Axes, Profile, Spans
from export.stages import BUILD_INFO, build_info, is_current, write_json
from export.tensorrt.gpu import Gpu, find_gpu
from export.tensorrt.jobs import Job, run_job
from export.tensorrt.options import LAYERS, PLAN, Options, installed, plugin_library, version_of

SCRIPT = "build_engine.sh"
LEAST_VERSION = version_of(LEAST["tensorrt"])  # whose parser knows the opset 23 operators of the graph


def require() -> Gpu:
    """The GPU to build for. Raises MissingDependencyError, with all that is missing and how to get it, at once."""
    gpu, missing = find_gpu(), list[str]()
    if gpu is None:
        missing.append("an NVIDIA GPU with its driver (nvidia-smi must list it)")
    version = installed("tensorrt")
    if version is None:
        missing.append("TensorRT (pip install 'procrustes-llm[gpu]')")
    elif version_of(version) < LEAST_VERSION:
        missing.append(f"TensorRT {'.'.join(map(str, LEAST_VERSION))} or later in place of {version}")
    if installed("polygraphy") is None:
        missing.append("polygraphy (pip install 'procrustes-llm[gpu]')")
    if gpu is None or missing:
        raise MissingDependencyError(f"a TensorRT engine needs {'; and '.join(missing)}")
    return gpu


def build_trt(artifact: Artifact, options: Options) -> dict[str, Any]:
    """OUT/engine: the plan, layers.json and build.json, whose values are returned.

    Raises MissingDependencyError where there is no GPU or no TensorRT, ArtifactError when TensorRT refuses the graph.
    """
    gpu = require()
    version = installed("tensorrt")
    library = plugin_library(artifact) if options.plugin != "native" else None
    wanted = {
        "engine": "trt",
        "versions": {"tensorrt": version},
        "gpu": gpu.to_dict(),
        "flags": options.flags(),
        "plugin_sha256": None if library is None else sha256_of(library),
    }
    inputs = ["onnx"] if library is None else ["onnx", "plugins"]
    if is_current(artifact, "engine", inputs, wanted):
        log(f"re-using {artifact.path('engine')}: same graph, GPU and TensorRT")
        return build_info(artifact, "engine")
    path = artifact.require_stage("onnx") / MODEL_NAME
    profiles = options.spans.profiles(read_header(path).axes)
    ways = {"native": None, "cpp": library} if options.plugin == "auto" else {options.plugin: library}
    ways = {name: used for name, used in ways.items() if name == "native" or used is not None} or {"native": None}
    with artifact.stage("engine", inputs=inputs, facts=wanted, section={"versions": wanted["versions"]}) as folder:
        built = {name: build_plan(path, folder / name, used, profiles, options) for name, used in ways.items()}
        seconds = _timed(folder, ways, path, options.spans) if len(ways) > 1 else {}
        chosen = min(ways, key=lambda name: seconds.get(name, {}).get("decode", 0.0))
        if seconds:
            log(_comparison(seconds, chosen))
        for name in (PLAN, LAYERS):
            shutil.move(folder / chosen / name, folder / name)
        for name in ways:
            shutil.rmtree(folder / name)
        values = {
            **wanted,
            **built[chosen],
            "plan": PLAN,
            "plugin": chosen,
            "profiles": profiles,
            "seconds_by_plugin": seconds,
        }
        write_json(folder / BUILD_INFO, values)
    return build_info(artifact, "engine")


def build_plan(
    onnx: Path, folder: Path, library: Path | None, profiles: Sequence[Profile], options: Options
) -> dict[str, Any]:
    """folder/model.plan and layers.json, by TensorRT on this GPU. library: of the plugins, None for none."""
    log(f"building an engine {'of the function bodies alone' if library is None else 'with the plugins'}")
    folder.mkdir()
    cache = options.timing_cache or default_timing_cache(installed("tensorrt"))
    cache.parent.mkdir(parents=True, exist_ok=True)
    return run_job(
        Job(
            onnx=str(onnx),
            plan=str(folder / PLAN),
            profiles=tuple(profiles),
            plugins=() if library is None else (str(library),),
            optimization=options.optimization,
            workspace=options.workspace,
            timing_cache=str(cache),
            layers=str(folder / LAYERS),
        )
    )


def _timed(folder: Path, ways: Mapping[str, Path | None], onnx: Path, spans: Spans) -> dict[str, dict[str, float]]:
    """Seconds of a prefill and of a decode step at the usual sizes, by engine. Needs the GPU."""
    from export.tensorrt.engine import seconds_at

    return {name: seconds_at(folder / name / PLAN, onnx, spans, library) for name, library in ways.items()}


def _comparison(seconds: Mapping[str, Mapping[str, float]], chosen: str) -> str:
    other = next(name for name in seconds if name != chosen)
    gains = [f"{part} {seconds[other][part] / seconds[chosen][part]:.2f}x" for part in ("decode", "prefill")]
    return f"keeping {chosen}: against {other} {', '.join(gains)}"


def default_timing_cache(version: str | None) -> Path:
    """Shared by all builds of this user: what was timed once need not be timed again. TensorRT keeps GPUs apart in it,
    and refuses the cache of another version, which is therefore part of the name."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "procrustes-llm" / f"tensorrt-{version}.cache"


# --- the script


def write_script(artifact: Artifact, options: Options) -> Path:
    """OUT/build_engine.sh: the two ways to build the engine on a machine that has a GPU."""
    axes = read_header(artifact.require_stage("onnx") / MODEL_NAME).axes
    return artifact.write_text(SCRIPT, script(axes, options, artifact.has_stage("plugins")), executable=True)


def script(axes: Axes, options: Options, plugins: bool) -> str:
    """The text of build_engine.sh."""
    from trt_plugins.build import PLUGINS

    python = ["python", "-m", "export.build", "--resume", "--out", ".", "--engine", "trt", *options.flags()]
    trtexec = ["trtexec", f"--onnx=onnx/{MODEL_NAME}", "--stronglyTyped", "--skipInference"]
    if plugins and options.plugin != "native":
        trtexec.append(f"--dynamicPlugins=plugins/{PLUGINS}")
    trtexec += [*_trtexec_profiles(options.spans.profiles(axes)), "--decomposableAttentions=*"]
    if options.optimization is not None:
        trtexec.append(f"--builderOptimizationLevel={options.optimization}")
    if options.workspace is not None:
        trtexec.append(f"--memPoolSize=workspace:{options.workspace >> 20}M")
    trtexec += ["--timingCacheFile=trtexec.cache", f"--saveEngine=trtexec-{PLAN}"]
    return f"""#!/usr/bin/env bash
# Builds the TensorRT engine of this folder for the GPU of this machine, which nothing else in it depends on.
#   {SCRIPT}            with procrustes-llm[gpu]: engine/{PLAN}, timed, checked, and entered in manifest.json
#   {SCRIPT} trtexec    with TensorRT's own tool alone: trtexec-{PLAN}, which manifest.json does not know
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"
case "${{1:-python}}" in
python)
  {_wrapped(python)}
  ;;
trtexec)
  {_wrapped(trtexec)}
  ;;
*)
  echo "usage: {SCRIPT} [python|trtexec]" >&2
  exit 2
  ;;
esac
"""


def _trtexec_profiles(profiles: Sequence[Profile]) -> list[str]:
    flags = []
    for index, profile in ((PREFILL, profiles[PREFILL]), (DECODE, profiles[DECODE])):
        flags.append(f"--profile={index}")
        for place, name in enumerate(("min", "opt", "max")):
            shapes = ",".join(f"{tensor}:{'x'.join(map(str, sizes[place]))}" for tensor, sizes in profile.items())
            flags.append(f"--{name}Shapes={shapes}")
    return flags


def _wrapped(command: Sequence[str]) -> str:
    return " \\\n    ".join(map(shlex.quote, command))
