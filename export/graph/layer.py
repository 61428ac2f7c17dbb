"""One linear layer as an ONNX model of its own, for tests and for the layer benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from compress.structures import Structure
from export.graph.decoder import MODEL_NAME, check
from export.graph.external import ExternalData
from export.graph.ops import graph_factors, lower
from export.graph.writer import GraphWriter, Weight


def export_linear(
    structure: Structure,
    factors: Mapping[str, Tensor],
    out: Path,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write out/model.onnx: x (tokens, in_features) -> y (tokens, out_features), the nodes of a whole export.

    factors as `structure.shapes()` names them; bias (out_features,). Raises ArtifactError when they do not match.
    """
    structure.check_factors(factors)
    out.mkdir(parents=True, exist_ok=True)
    stored = graph_factors(structure, factors) | ({} if bias is None else {"bias": bias})
    types = structure.storage_dtypes(dtype)
    with ExternalData(out) as data:
        g = GraphWriter(data, dtype)
        x = g.input("x", ("tokens", structure.in_features))
        g.output("y", ("tokens", structure.out_features))
        calls = lower(structure, bias is not None)
        for call in calls:
            weights = [g.weight(_weight(name, stored[name], types.get(name))) for name in call.factors]
            x = g.call(call, x, weights, result="y" if call is calls[-1] else None)
        model = g.model("linear", {})
    path = out / MODEL_NAME
    path.write_bytes(model.SerializeToString(deterministic=True))
    check(path)
    return path


def _weight(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Weight:
    return Weight(name, tuple(tensor.shape), lambda: [tensor], dtype)
