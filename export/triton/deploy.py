"""The files of OUT/triton around the model repository: how it is started, asked, put into a container and a cluster.

They are in templates/, with @NAMES@ for what comes from the manifest and from the options of the export.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

IMAGE = "nvcr.io/nvidia/tritonserver:26.07-py3"
"""The container that Dockerfile starts from: pinned, for a newer one may bring another Python or TensorRT."""
REQUIREMENTS = ("onnx", "onnxruntime", "torch", "transformers", "typing-extensions")
TEMPLATES = Path(__file__).parent / "templates"
GPU = """    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: 1
              capabilities: [gpu]
"""


def files(name: str, network: str, *, gpu: bool) -> dict[str, str]:
    """File name -> content, of all templates. name, network: of the two models; gpu: they run a TensorRT plan."""
    values = {
        "NAME": name,
        "NETWORK": network,
        "LABEL": label(name),
        "IMAGE": IMAGE,
        "NETWORK_FILE": f"{network}/1/model.plan" if gpu else f"{network}/1",
        "GPU": GPU if gpu else "",
        "RESOURCES": 'limits: {nvidia.com/gpu: "1"}' if gpu else "requests: {cpu: 2, memory: 4Gi}",
    }
    return {file: re.sub("@([A-Z_]+)@", lambda found: values[found[1]], text) for file, text in templates().items()}


def templates() -> dict[str, str]:
    """File name -> content, with the @NAMES@."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.iterdir()) if path.is_file()}


def requirements(tensorrt: str | None) -> str:
    """requirements.txt of the server's Python: what the export was made with, newer patches allowed. tensorrt: the
    requirement of the plan, which runs on the version that built it alone."""
    lines = ["# What the text model needs in the Python that tritonserver's python backend runs.", "numpy"]
    lines += [f"{name}~={'.'.join(version(name).split('+')[0].split('.')[:3])}" for name in REQUIREMENTS]
    return "\n".join([*lines, *([tensorrt] if tensorrt else [])]) + "\n"


def label(name: str) -> str:
    """A model's name as a DNS label, which services of compose and Kubernetes have: at most 63 of a-z, 0-9 and '-'."""
    plain = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"model-{plain}"
    return plain[:50].strip("-")  # with room for what is put behind it
