"""The stages of an artifact that this package makes: OUT/onnx from OUT/checkpoint, OUT/engine from OUT/onnx.

A stage is made again when what it is made from, or how, has changed, or when its files are not as they were left.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.artifact.reading import read_artefact_json, shown
from compress.artifact.store import Artifact
from compress.errors import ArtifactError
from compress.progress import log
from export.graph.decoder import MODEL_NAME, export_onnx
from export.graph.ops import is_ours
from export.runtime.ort import CPU, executed_nodes

BUILD_INFO = "build.json"


def build_onnx(artifact: Artifact, *, dtype: str, logits: str) -> dict[str, Any]:
    """OUT/onnx: the graph, its weights and build.json. Returns what build.json holds.

    Raises ArtifactError when OUT has no sound checkpoint, or one that cannot be exported.
    """
    wanted = {"dtype": dtype, "logits": logits, "versions": versions("onnx", "torch")}
    if is_current(artifact, "onnx", ["checkpoint"], wanted):
        log(f"re-using {artifact.path('onnx')}: same checkpoint and options")
    else:
        checkpoint = artifact.require_stage("checkpoint")
        with artifact.stage(
            "onnx", inputs=["checkpoint"], facts=wanted, section={"versions": wanted["versions"]}
        ) as folder:
            info = export_onnx(checkpoint, folder, dtype=dtype, logits=logits)
            write_json(folder / BUILD_INFO, {**info.to_dict(), "versions": wanted["versions"]})
        log(
            f"exported {sum(info.nodes.values())} nodes, {info.structured_nodes} of them custom operators, "
            f"in {info.seconds:.1f} s"
        )
    return build_info(artifact, "onnx")


def build_ort(artifact: Artifact) -> dict[str, Any]:
    """OUT/engine for ONNX Runtime, which needs no plan: build.json says what runs, after a first run on the CPU.

    Raises ArtifactError when the graph does not load, or when a structured node would run as a function call.
    """
    wanted = {"engine": "ort", "versions": versions("onnxruntime")}
    if is_current(artifact, "engine", ["onnx"], wanted):
        log(f"re-using {artifact.path('engine')}: same graph and ONNX Runtime")
    else:
        path = artifact.require_stage("onnx") / MODEL_NAME
        ours = set(structured_ops(artifact))
        nodes = executed_nodes(path)
        if ours & set(nodes):
            raise ArtifactError(
                f"ONNX Runtime did not inline {', '.join(sorted(ours & set(nodes)))} of {path}; upgrade onnxruntime"
            )
        with artifact.stage(
            "engine", inputs=["onnx"], facts=wanted, section={"versions": wanted["versions"]}
        ) as folder:
            values = {
                **wanted,
                "model": f"onnx/{MODEL_NAME}",
                "providers": list(CPU),
                "graph_optimization": "all",
                "executed_nodes": nodes,
                "machine": platform.machine(),
            }
            write_json(folder / BUILD_INFO, values)
    return build_info(artifact, "engine")


def structured_ops(artifact: Artifact) -> dict[str, int]:
    """How many nodes of each custom op OUT/onnx has."""
    return {name: count for name, count in build_info(artifact, "onnx")["nodes"].items() if is_ours(name)}


_FACTS: dict[str, dict[str, type]] = {
    "onnx": {"dtype": str, "nodes": dict},
    "engine": {"engine": str, "versions": dict},
    "triton": {"engine": str, "name": str, "sequences": int, "threads": int},
}
"""Stage -> what its build.json must hold: the facts that other stages read."""


def build_info(artifact: Artifact, stage: str) -> dict[str, Any]:
    """OUT/{stage}/build.json. Raises ArtifactError when it is missing, not JSON, or lacks what others read."""
    path = artifact.path(stage) / BUILD_INFO
    values: dict[str, Any] = read_artefact_json(path, dict, f"build {stage} again")
    for name, kind in _FACTS.get(stage, {}).items():
        if type(values.get(name)) is not kind:
            raise ArtifactError(
                f"{path} has {name} = {shown(values.get(name))}, no {kind.__name__}; build {stage} again"
            )
    return values


def is_current(artifact: Artifact, stage: str, inputs: list[str], wanted: Mapping[str, Any]) -> bool:
    """True if OUT/{stage} was made from the present inputs with these facts and is whole; the log has why not."""
    if not artifact.has_stage(stage):
        return False
    facts = artifact.read_manifest()["stages"][stage]
    if {key: facts.get(key) for key in wanted} != dict(wanted) or set(facts.get("inputs", {})) != set(inputs):
        return False
    try:
        artifact.require_stage(stage)
        artifact.verify([stage])
    except ArtifactError as error:
        log(f"making {stage} again: {error}")
        return False
    return True


def versions(*packages: str) -> dict[str, str]:
    """Installed version of each distribution."""
    return {name: importlib.metadata.version(name) for name in packages}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
