"""OUT/triton: a model repository that `tritonserver` loads as it is, and what starts, asks and deploys it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import compress
import export
import trt_plugins
from compress.artifact.store import Artifact
from compress.errors import ArtifactError
from compress.progress import log
from export.graph.decoder import MODEL_NAME
from export.stages import BUILD_INFO, build_info, is_current, write_json
from export.tensorrt.options import PLAN
from export.triton import deploy
from export.triton.config import WARMUP, Backend, Network, graph_tensors, network_config, text_config
from export.triton.names import check_name

SEQUENCES = 16
"""Answered at a time, by default; an engine may take fewer."""
MODEL = '''"""{what} The code is in {lib}; what it needs from packages is in requirements.txt."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "{lib}"))

from export.triton.{module} import TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
'''


def write_repository(
    artifact: Artifact,
    *,
    engine: str,
    name: str,
    sequences: int = SEQUENCES,
    threads: int = 1,
    network: Network | None = None,
) -> dict[str, Any]:
    """OUT/triton for an engine ("ort" or "trt"); returns what its build.json holds.

    repository/NAME is the text model, which runs the engine in its own process, so that the cache never leaves the
    device. network/NAME_lm is the network by itself in Triton's backend `network` (default: tensorrt or python): a copy
    of the plan, once OUT/engine has one, or of the graph, or code that reads OUT/onnx. It is in a repository of its
    own, for loaded beside the text model it takes the memory of the weights a second time. Raises UsageError for a
    name that Triton would not take.
    """
    check_name(name)
    backend: Network = network or ("tensorrt" if engine == "trt" else "python")
    plan = _plan(artifact) if backend == "tensorrt" else None
    inputs = ["onnx"] if plan is None else ["onnx", "engine"]
    wanted = {"engine": engine, "name": name, "sequences": sequences, "threads": threads, "network": backend}
    wanted["code"] = _code_version()
    if is_current(artifact, "triton", inputs, wanted):
        log(f"re-using {artifact.path('triton')}: same options")
        return build_info(artifact, "triton")
    onnx = artifact.require_stage("onnx")
    own = {"artifact": "../../..", "threads": str(threads)}
    with artifact.stage("triton", inputs=inputs, facts=wanted) as folder:
        model = folder / "repository" / name
        version = model / "1"
        _write(
            model / "config.pbtxt", text_config(name, engine, {**own, "engine": engine, "sequences": str(sequences)})
        )
        for file, (_, content) in WARMUP.items():
            _write(model / "warmup" / file, content)
        _write(version / "model.py", MODEL.format(what="Text in, text out.", lib="lib", module="model"))
        for package in (compress, export, trt_plugins):
            source = Path(str(package.__file__)).parent
            ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".*_cache", "csrc", "templates")
            shutil.copytree(source, version / "lib" / source.name, ignore=ignore)

        network_name = f"{name}_lm"
        if backend != "none":
            _write_network(folder, name, network_name, backend, onnx, plan, own)
        for file, text in deploy.files(name, network_name, gpu=engine == "trt").items():
            _write(folder / file, text)
        (folder / "launch.sh").chmod(0o755)
        tensorrt = None
        if engine == "trt":
            found = None if plan is None else build_info(artifact, "engine")["versions"]["tensorrt"]
            tensorrt = f"tensorrt=={found}" if found else "tensorrt  # the version that build_engine.sh is run with"
        _write(folder / "requirements.txt", deploy.requirements(tensorrt))
        _write(folder / ".dockerignore", "*\n!requirements.txt\n")
        write_json(folder / BUILD_INFO, wanted)
    return build_info(artifact, "triton")


def _write_network(
    folder: Path, name: str, network_name: str, backend: Backend, onnx: Path, plan: Path | None, own: dict[str, str]
) -> None:
    """network/NAME_lm. plan: that of OUT/engine, None where there is none yet."""
    model = folder / "network" / network_name
    parameters = own if backend == "python" else {}
    config = network_config(network_name, backend, graph_tensors(onnx / MODEL_NAME), parameters)
    _write(model / "config.pbtxt", config)
    if backend == "python":
        lib = f"../../../repository/{name}/1/lib"
        _write(model / "1" / "model.py", MODEL.format(what="Tensors in, tensors out.", lib=lib, module="network"))
    elif backend == "onnxruntime":
        shutil.copytree(onnx, model / "1", ignore=shutil.ignore_patterns(BUILD_INFO))
    elif plan is not None:
        (model / "1").mkdir()
        shutil.copyfile(plan, model / "1" / PLAN)


def _plan(artifact: Artifact) -> Path | None:
    """OUT/engine/model.plan, where it was built from the present graph."""
    try:
        path = artifact.require_stage("engine") / PLAN
    except ArtifactError:
        return None
    return path if path.is_file() and build_info(artifact, "engine")["engine"] == "trt" else None


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _code_version() -> str:
    import hashlib

    total = hashlib.sha256()
    for package in (compress, export, trt_plugins):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            total.update(path.read_bytes())
    for text in deploy.templates().values():
        total.update(text.encode())
    return total.hexdigest()
