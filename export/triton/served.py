"""What a model of OUT/triton reads in its config.pbtxt, and finds in OUT."""

from __future__ import annotations

import json
from pathlib import Path

from compress.artifact.manifest import Manifest
from compress.artifact.store import MANIFEST, Artifact
from export.graph.decoder import MODEL_NAME


def configured(args: dict[str, str]) -> tuple[Artifact, dict[str, str]]:
    """OUT and the parameters of config.pbtxt, from what Triton's python backend gives `initialize`."""
    parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
    return Artifact((Path(args["model_repository"]) / parameters["artifact"]).resolve()), parameters


def sound_tokenizer(artifact: Artifact) -> Path:
    """OUT/checkpoint, after a look at the hashes of everything in it but the weights, which are in the engine: the
    tokenizer, its chat template, the configuration. Raises ArtifactError for a file that was changed or added."""
    folder = artifact.require_stage("checkpoint")
    files = Manifest.read(artifact.path(MANIFEST)).files
    artifact.verify([n for n in files if n.startswith("checkpoint/") and not n.endswith(".safetensors")])
    return folder


def sound_graph(artifact: Artifact) -> Path:
    """OUT/onnx/model.onnx, after a look at its hashes. Raises ArtifactError for a file that was changed."""
    artifact.verify(["onnx"])
    return artifact.require_stage("onnx") / MODEL_NAME
