"""Facts that an exported ONNX file holds about itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


def graph_dtype(path: Path) -> str:
    """The type of an exported graph's logits, and so of the graph. Raises ArtifactError where it has none."""
    from export.graph.header import read_header

    return read_header(path).dtype


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
        from export.graph.header import header_of, read_graph
        from export.graph.ops import DOMAIN
        from export.runtime.ort import executed_nodes

        model = read_graph(path)
        logits = header_of(path, model).logits
        return cls(
            dtype=logits.dtype,
            logits="last" if logits.axes[1] == 1 else "all",
            nodes=len(model.graph.node),
            structured_nodes=sum(node.domain == DOMAIN for node in model.graph.node),
            executed_nodes=sum(executed_nodes(path).values()),
        )
