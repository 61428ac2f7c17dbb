"""The op contract: domain `procrustes`, version 1. A file for each family of structures, one table for all of them.

Each op is a model-local ONNX function: its body is standard operators. ONNX Runtime inlines it, and TensorRT's
parser takes a plugin of the same op_type, plugin_version and plugin_namespace where one is registered, else the
body. That parser finds a function by op_type alone (it ignores domain and overload, and refuses a missing
optional input), hence one op_type for every variant:

| op_type                        | inputs  | for x (tokens, in_features) computes                          |
|--------------------------------|---------|---------------------------------------------------------------|
| KroneckerLinear                | x, B, A | blocks of x mixed into terms by A, then @ B.T                 |
| KroneckerLinearOut             | x, B, A | x @ B.T, then terms mixed into blocks of y by A               |
| KroneckerLeadingLinear         | x, B    | the first, A = rows of the identity: x[:, :k] @ B.T           |
| KroneckerLeadingLinearOut      | x, B    | the second, the same A: x @ B.T padded with zeros             |
| KroneckerLinearGeneral         | x, B, A | x @ (sum_i kron(A_i, B_i)).T, B contracted first              |
| KroneckerLinearGeneralMixFirst | x, B, A | the same, A contracted first                                  |
| GroupShuffleLinear_{l}x{r}     | x, L, R | block diagonal L, shuffle, block diagonal R                   |
| PivotedLinear                  | x, V, C, order | z = x @ V.T, then entries `order` of [z, z @ C.T]      |
| PivotedLinearIn                | x, C, U, order | [p, q] = entries `order` of x, (p + q @ C.T) @ U.T     |

and each followed by `Bias`, with `bias` (out_features,) as last input. The grid is part of the name of
GroupShuffleLinear because its fast body has one Gemm a block; only `GROUP_SHUFFLE_GRIDS` exist. Dense and low
rank matrices need no op of ours: they are Gemm nodes. `order` is int32.

Every node carries `plugin_version`, `plugin_namespace`, `in_features`, `out_features`, the structure's own
sizes (terms, blocks, side; left_blocks, right_blocks, rank), and the shape constants that its body reads.

The file of a structure holds what a graph needs of it: the schema, function body and dense form of its ops, and its
lowering, `register`ed under the structure's name (`base.Family`). A new file in this folder is found by itself.
"""

from __future__ import annotations

from export.graph.ops.base import (
    BIAS_SUFFIX,
    DOMAIN,
    DOMAIN_VERSION,
    OPSET,
    PLUGIN_ATTRIBUTES,
    PLUGIN_VERSION,
    SIZES,
    Array,
    Arrays,
    Attributes,
    Body,
    Call,
    Derived,
    Family,
    Op,
    custom,
    families,
    family_of,
    gemm,
    graph_factors,
    is_ours,
    lower,
    op,
    op_types,
    register,
    standard,
)
from export.graph.ops.gs import GROUP_SHUFFLE_GRIDS

__all__ = [
    "BIAS_SUFFIX",
    "DOMAIN",
    "DOMAIN_VERSION",
    "GROUP_SHUFFLE_GRIDS",
    "OPSET",
    "PLUGIN_ATTRIBUTES",
    "PLUGIN_VERSION",
    "SIZES",
    "Array",
    "Arrays",
    "Attributes",
    "Body",
    "Call",
    "Derived",
    "Family",
    "Op",
    "custom",
    "families",
    "family_of",
    "gemm",
    "graph_factors",
    "is_ours",
    "lower",
    "op",
    "op_types",
    "register",
    "standard",
]
