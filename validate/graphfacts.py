"""Facts that an exported ONNX file holds about itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError


def graph_dtype(path: Path) -> str:
    """The type of an exported graph's logits, and so of the graph. Raises ArtifactError where it has none."""
    import onnx

    names = {
        onnx.TensorProto.FLOAT: "float32",
        onnx.TensorProto.FLOAT16: "float16",
        onnx.TensorProto.BFLOAT16: "bfloat16",
    }
    graph = _graph(path)
    logits = next((o for o in graph.output if o.name == "logits"), None)
    if logits is None:
        raise ArtifactError(f"{path} has no output called logits; export the model again")
    kind = logits.type.tensor_type.elem_type
    return names.get(kind, f"type {kind}")


def _graph(path: Path) -> Any:
    """The graph without its weights. Raises ArtifactError when the file holds none."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(str(path), load_external_data=False).graph
    except DecodeError as error:
        raise ArtifactError(f"{path} is no ONNX file ({error}); export the model again") from error


@dataclass(frozen=True)
class GraphFacts:
    """Facts of the file: `logits` is "all" or "last", nodes are those in the file."""

    dtype: str
    logits: str
    nodes: int
    structured_nodes: int
    executed_nodes: int

    @classmethod
    def of(cls, path: Path) -> GraphFacts:
        """Read the graph without its weights, and run it once to see what ONNX Runtime makes of it."""

        from export.graph.ops import DOMAIN
        from export.runtime.ort import executed_nodes

        dtype = graph_dtype(path)
        graph = _graph(path)
        logits = next(o for o in graph.output if o.name == "logits")
        return cls(
            dtype=dtype,
            logits="last" if logits.type.tensor_type.shape.dim[1].dim_value == 1 else "all",
            nodes=len(graph.node),
            structured_nodes=sum(node.domain == DOMAIN for node in graph.node),
            executed_nodes=sum(executed_nodes(path).values()),
        )
