"""OUT/triton: a model repository that `tritonserver` loads as it is, a script that starts it, and a client."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import compress
import export
import trt_plugins
from compress.artifact import Artifact
from compress.errors import UsageError
from compress.progress import log
from export.stages import BUILD_INFO, build_info, is_current, write_json

SEQUENCES = 16
"""Answered at a time, by default; an engine may take fewer."""
INPUTS = (
    ("text_input", "TYPE_STRING", 1),
    ("messages", "TYPE_STRING", 1),
    ("stream", "TYPE_BOOL", 1),
    ("max_tokens", "TYPE_INT32", 1),
    ("min_tokens", "TYPE_INT32", 1),
    ("temperature", "TYPE_FP32", 1),
    ("top_k", "TYPE_INT32", 1),
    ("top_p", "TYPE_FP32", 1),
    ("repetition_penalty", "TYPE_FP32", 1),
    ("seed", "TYPE_INT64", 1),
    ("stop", "TYPE_STRING", -1),
    ("logprobs", "TYPE_INT32", 1),
)
OUTPUTS = (
    ("text_output", "TYPE_STRING", 1),
    ("tokens", "TYPE_INT32", -1),
    ("logprobs_output", "TYPE_FP32", -1),
    ("top_logprobs", "TYPE_STRING", 1),
    ("finish_reason", "TYPE_STRING", 1),
)
MODEL = '''"""Text in, text out. The code is in lib/; what it needs from packages is in ../../../requirements.txt."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "lib"))

from export.triton.model import TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
'''
REQUIREMENTS = ("numpy", "onnx", "onnxruntime", "torch", "transformers", "typing-extensions", "wrapt")


def write_repository(
    artifact: Artifact, *, engine: str, name: str, sequences: int = SEQUENCES, threads: int = 1
) -> dict[str, Any]:
    """OUT/triton for an engine ("ort" or "trt"); returns what its build.json holds.

    The text model runs the engine in its own process, so that the cache never leaves the device. Raises UsageError for
    a name that Triton would not take.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise UsageError(f"--serve-as {name!r}: a model's name has letters, digits, '_', '.' and '-' only")
    wanted = {"engine": engine, "name": name, "sequences": sequences, "threads": threads, "code": _code_version()}
    if is_current(artifact, "triton", ["onnx"], wanted):
        log(f"re-using {artifact.path('triton')}: same options")
        return build_info(artifact, "triton")
    with artifact.stage("triton", inputs=["onnx"], facts=wanted) as folder:
        model = folder / "repository" / name
        version = model / "1"
        version.mkdir(parents=True)
        parameters = {"artifact": "../../..", "engine": engine, "sequences": str(sequences), "threads": str(threads)}
        (model / "config.pbtxt").write_text(config(name, engine, parameters), encoding="utf-8")
        (version / "model.py").write_text(MODEL, encoding="utf-8")
        for package in (compress, export, trt_plugins):
            source = Path(str(package.__file__)).parent
            ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".*_cache", "csrc")
            shutil.copytree(source, version / "lib" / source.name, ignore=ignore)
        packages = (*REQUIREMENTS, "tensorrt") if engine == "trt" else REQUIREMENTS
        (folder / "requirements.txt").write_text("\n".join(packages) + "\n", encoding="utf-8")
        (folder / "launch.sh").write_text(LAUNCH, encoding="utf-8")
        (folder / "launch.sh").chmod(0o755)
        (folder / "client.py").write_text(CLIENT.replace("MODEL_NAME", name), encoding="utf-8")
        write_json(folder / BUILD_INFO, wanted)
    return build_info(artifact, "triton")


def config(name: str, engine: str, parameters: dict[str, str]) -> str:
    """config.pbtxt of the text model."""
    lines = [f"name: {json.dumps(name)}", 'backend: "python"', "max_batch_size: 0"]
    lines.append("model_transaction_policy { decoupled: true }")
    lines += [_tensor("input", *tensor, optional=True) for tensor in INPUTS]
    lines += [_tensor("output", *tensor) for tensor in OUTPUTS]
    kind = "KIND_GPU" if engine == "trt" else "KIND_CPU"
    lines.append(f"instance_group [ {{ count: 1 kind: {kind} }} ]")
    for key, value in parameters.items():
        text = f"key: {json.dumps(key)} value: {{ string_value: {json.dumps(value)} }}"
        lines.append(f"parameters [ {{ {text} }} ]")
    return "\n".join(lines) + "\n"


def _tensor(field: str, name: str, kind: str, size: int, *, optional: bool = False) -> str:
    rest = " optional: true" if optional else ""
    return f'{field} [ {{ name: "{name}" data_type: {kind} dims: [ {size} ]{rest} }} ]'


def _code_version() -> str:
    import hashlib

    total = hashlib.sha256()
    for package in (compress, export, trt_plugins):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()


LAUNCH = """#!/usr/bin/env bash
# Starts Triton with the model of this folder, on this machine's own address; more flags go to tritonserver as they are:
#   launch.sh --http-port 9000 --grpc-port 9001 --metrics-port 9002
# The python that tritonserver's python backend runs needs the packages of requirements.txt.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec tritonserver \\
  --model-repository="$here/repository" --model-control-mode=none --exit-on-error=true \\
  --http-address=127.0.0.1 --grpc-address=127.0.0.1 --metrics-address=127.0.0.1 "$@"
"""
CLIENT = '''"""python client.py "The capital of France is" [--stream]: text from the model, with no package."""

import argparse
import json
import urllib.request

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("text")
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--model", default="MODEL_NAME")
parser.add_argument("--max-tokens", type=int, default=64)
parser.add_argument("--temperature", type=float, default=0.0)
parser.add_argument("--stream", action="store_true")
args = parser.parse_args()
body = {"text_input": args.text, "max_tokens": args.max_tokens, "temperature": args.temperature}
body |= {"stream": args.stream}
way = "generate_stream" if args.stream else "generate"
request = urllib.request.Request(
    f"{args.url}/v2/models/{args.model}/{way}", json.dumps(body).encode(), {"Content-Type": "application/json"}
)
with urllib.request.urlopen(request) as response:
    for line in response:
        text = line.decode().removeprefix("data: ").strip()
        if text:
            print(json.loads(text)["text_output"], end="", flush=True)
print()
'''
