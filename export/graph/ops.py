"""The op contract: domain `procrustes`, version 1. One table says everything about every op.

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
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from compress.errors import ArtifactError

DOMAIN = "procrustes"
DOMAIN_VERSION = 1
OPSET = 23
"""Of graphs and bodies: the first with Attention, RMSNormalization, RotaryEmbedding. 24 measures alike."""

PLUGIN_VERSION = "1"
BIAS_SUFFIX = "Bias"
PLUGIN_ATTRIBUTES = ("plugin_version", "plugin_namespace")
GROUP_SHUFFLE_GRIDS = tuple((left, right) for left in range(1, 65) for right in range(1, 65))

Attribute = int | str | list[int]
Attributes = dict[str, Attribute]
Array = npt.NDArray[np.float64]
Arrays = Mapping[str, Array]


class Body:
    """Writes the nodes of one function, in order. Every method returns the name of the value it makes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def op(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """One standard node."""
        output = output or f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        return output

    def split(self, x: str, pieces: int, axis: int) -> list[str]:
        """`pieces` equal parts of x along `axis`."""
        outputs = [f"split_{len(self.nodes)}_{i}" for i in range(pieces)]
        self.nodes.append(helper.make_node("Split", [x], outputs, axis=axis, num_outputs=pieces))
        return outputs

    def ints(self, values: list[int]) -> str:
        """A constant int64 vector."""
        output = f"constant_{len(self.nodes)}"
        self.nodes.append(helper.make_node("Constant", [], [output], value_ints=values))
        return output

    def attribute(self, name: str) -> str:
        """The int64 vector that the calling node gives as attribute `name`."""
        node = helper.make_node("Constant", [], [f"{name}_{len(self.nodes)}"])
        reference = onnx.AttributeProto()
        reference.name, reference.ref_attr_name, reference.type = "value_ints", name, onnx.AttributeProto.INTS
        node.attribute.append(reference)
        self.nodes.append(node)
        return str(node.output[0])

    def gemm(self, x: str, weight: str, *bias: str, output: str | None = None) -> str:
        """x @ weight.T (+ bias)."""
        return self.op("Gemm", x, weight, *bias, output=output, transB=1)


Writer = Callable[[Body, tuple[str, ...]], None]
"""Writes the body that leaves its result in "y"; the tuple is ("bias",) or ()."""


@dataclass(frozen=True)
class Op:
    """One op_type. `attributes` are those beyond PLUGIN_ATTRIBUTES; `dense` is its matrix, independently."""

    op_type: str
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    write: Writer
    dense: Callable[[Arrays, Attributes], Array]

    @property
    def has_bias(self) -> bool:
        """Whether the last input is a bias."""
        return self.inputs[-1] == "bias"

    def reference(self, inputs: Arrays, attributes: Attributes) -> Array:
        """y (tokens, out_features) in float64, through the dense matrix. inputs: by name, as `self.inputs`."""
        wide = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
        y = wide["x"] @ self.dense(wide, attributes).T
        return np.asarray(y + wide["bias"] if self.has_bias else y)

    def function(self) -> onnx.FunctionProto:
        """The model-local function."""
        body = Body()
        self.write(body, ("bias",) if self.has_bias else ())
        return helper.make_function(
            DOMAIN,
            self.op_type,
            list(self.inputs),
            ["y"],
            body.nodes,
            [helper.make_opsetid("", OPSET)],
            [*self.attributes, *PLUGIN_ATTRIBUTES],
        )


# --- Bodies. Shapes: m = in_features, n = out_features, k = terms * (m or n) / blocks. ---


def _in(body: Body, bias: tuple[str, ...]) -> None:
    x = body.op("Reshape", "x", body.attribute("grid"))  # (tokens, blocks, m / blocks)
    z = body.op("MatMul", body.op("CastLike", "A", "x"), x)  # (tokens, terms, m / blocks)
    z = body.op("Reshape", z, body.attribute("flat"))  # (tokens, k)
    body.gemm(z, "B", *bias, output="y")  # (tokens, n)


def _out(body: Body, bias: tuple[str, ...]) -> None:
    z = body.op("Reshape", body.gemm("x", "B"), body.attribute("grid"))  # (tokens, terms, n / blocks)
    mix = body.op("Transpose", body.op("CastLike", "A", "x"), perm=[1, 0])  # (blocks, terms)
    z = body.op("MatMul", mix, z)  # (tokens, blocks, n / blocks)
    _finish(body, z, bias, body.attribute("flat"))


def _leading_in(body: Body, bias: tuple[str, ...]) -> None:
    z = body.op("Slice", "x", body.ints([0]), body.attribute("leading"), body.ints([1]))  # (tokens, k)
    body.gemm(z, "B", *bias, output="y")


def _leading_out(body: Body, bias: tuple[str, ...]) -> None:
    z = body.gemm("x", "B")  # (tokens, k)
    # Not one constant of four: the shape inference of ONNX Runtime 1.24 loses its shape, and then refuses Pad.
    pads = body.op("Concat", body.ints([0, 0, 0]), body.attribute("padding"), axis=0)
    padded = body.op("Pad", z, pads, output=None if bias else "y")  # (tokens, n)
    if bias:
        body.op("Add", padded, *bias, output="y")


def _general(body: Body, bias: tuple[str, ...]) -> None:
    # z[t, c, i, b] = sum_e B[i, b, e] x[t, c, e];  y[t, a, b] = sum_{c, i} A[i, a, c] z[t, c, i, b]
    x = body.op("Reshape", "x", body.attribute("grid"))  # (tokens * m1, m2)
    z = body.gemm(x, body.op("Reshape", "B", body.attribute("b_rows")))  # (tokens * m1, terms * n2)
    z = body.op("Reshape", z, body.attribute("inner"))  # (tokens, m1 * terms, n2)
    mix = body.op("Transpose", body.op("CastLike", "A", "x"), perm=[1, 2, 0])  # (n1, m1, terms)
    z = body.op("MatMul", body.op("Reshape", mix, body.attribute("a_rows")), z)  # (tokens, n1, n2)
    _finish(body, z, bias, body.attribute("flat"))


def _general_mix_first(body: Body, bias: tuple[str, ...]) -> None:
    # u[t, a, i, e] = sum_c A[i, a, c] x[t, c, e];  y[t, a, b] = sum_{i, e} B[i, b, e] u[t, a, i, e]
    x = body.op("Reshape", "x", body.attribute("grid"))  # (tokens, m1, m2)
    mix = body.op("Transpose", body.op("CastLike", "A", "x"), perm=[1, 0, 2])  # (n1, terms, m1)
    u = body.op("MatMul", body.op("Reshape", mix, body.attribute("a_rows")), x)  # (tokens, n1 * terms, m2)
    u = body.op("Reshape", u, body.attribute("inner"))  # (tokens * n1, terms * m2)
    rows = body.op("Reshape", body.op("Transpose", "B", perm=[1, 0, 2]), body.attribute("b_rows"))  # (n2, terms * m2)
    _finish(body, body.gemm(u, rows), bias, body.attribute("flat"))  # (tokens * n1, n2)


def _group_shuffle(left: int, right: int) -> Writer:
    def blocks(body: Body, x: str, weights: str, count: int, bias: tuple[str, ...], output: str | None) -> str:
        """Block i of x times weights[i].T, side by side. Pieces of constants are folded when a session starts."""
        axis = body.ints([0])
        pieces = body.split(x, count, axis=1) if count > 1 else [x]
        factors = body.split(weights, count, axis=0) if count > 1 else [weights]
        biases = [(b,) for b in (body.split(bias[0], count, axis=0) if count > 1 else bias)] if bias else [()] * count
        last = output if count == 1 else None
        products = [
            body.gemm(piece, body.op("Squeeze", factor, axis), *shift, output=last)
            for piece, factor, shift in zip(pieces, factors, biases, strict=True)
        ]
        return body.op("Concat", *products, output=output, axis=1) if count > 1 else products[0]

    def write(body: Body, bias: tuple[str, ...]) -> None:
        z = blocks(body, "x", "L", left, (), None)  # (tokens, s), s = left * right * rho
        if left > 1 and right > 1:
            z = body.op("Reshape", z, body.attribute("grid"))  # (tokens, left, right, rho)
            z = body.op("Transpose", z, perm=[0, 2, 1, 3])  # (tokens, right, left, rho)
            z = body.op("Reshape", z, body.attribute("flat"))  # (tokens, s)
        blocks(body, z, "R", right, bias, "y")  # (tokens, n)

    return write


def _pivoted(body: Body, bias: tuple[str, ...]) -> None:
    z = body.gemm("x", "V")  # (tokens, rank)
    y = body.op("Concat", z, body.gemm(z, "C"), axis=1)
    y = body.op("Gather", y, "order", output=None if bias else "y", axis=1)  # (tokens, n)
    if bias:
        body.op("Add", y, *bias, output="y")


def _pivoted_in(body: Body, bias: tuple[str, ...]) -> None:
    x = body.op("Gather", "x", "order", axis=1)  # (tokens, m)
    pivots, rest, axis = body.attribute("pivots"), body.attribute("rest"), body.ints([1])
    p = body.op("Slice", x, body.ints([0]), pivots, axis)  # (tokens, rank)
    q = body.op("Slice", x, pivots, rest, axis)  # (tokens, m - rank)
    body.gemm(body.op("Add", p, body.gemm(q, "C")), "U", *bias, output="y")


def _finish(body: Body, z: str, bias: tuple[str, ...], flat: str) -> None:
    """View z as (tokens, n) and add the bias."""
    y = body.op("Reshape", z, flat, output=None if bias else "y")
    if bias:
        body.op("Add", y, *bias, output="y")


# --- Dense equivalents in float64, written from the definitions: W (n, m), y = x @ W.T. ---


def _identity_rows(attributes: Attributes) -> Array:
    return np.eye(_int(attributes, "terms"), _int(attributes, "blocks"))


def _dense_in(p: Arrays, attributes: Attributes) -> Array:
    A = p.get("A", _identity_rows(attributes))
    terms = np.split(p["B"], len(A), axis=1)
    return np.asarray(sum(np.kron(a[None, :], b) for a, b in zip(A, terms, strict=True)))


def _dense_out(p: Arrays, attributes: Attributes) -> Array:
    A = p.get("A", _identity_rows(attributes))
    terms = np.split(p["B"], len(A), axis=0)
    return np.asarray(sum(np.kron(a[:, None], b) for a, b in zip(A, terms, strict=True)))


def _dense_general(p: Arrays, attributes: Attributes) -> Array:
    return np.asarray(sum(np.kron(a, b) for a, b in zip(p["A"], p["B"], strict=True)))


def _dense_group_shuffle(p: Arrays, attributes: Attributes) -> Array:
    L, R = p["L"], p["R"]  # (left, s / left, m / left), (right, n / right, s / right)
    rho = L.shape[1] // len(R)
    rows = []
    for r, block in enumerate(R):
        pieces = [block[:, i * rho : (i + 1) * rho] @ left[r * rho : (r + 1) * rho] for i, left in enumerate(L)]
        rows.append(np.concatenate(pieces, axis=1))
    return np.concatenate(rows, axis=0)


def _dense_pivoted(p: Arrays, attributes: Attributes) -> Array:
    return np.asarray(np.concatenate([p["V"], p["C"] @ p["V"]])[p["order"].astype(np.int64)])


def _dense_pivoted_in(p: Arrays, attributes: Attributes) -> Array:
    W = np.empty((_int(attributes, "out_features"), _int(attributes, "in_features")))
    W[:, p["order"].astype(np.int64)] = np.concatenate([p["U"], p["U"] @ p["C"]], axis=1)
    return W


def _int(attributes: Attributes, name: str) -> int:
    value = attributes[name]
    assert isinstance(value, int)
    return value


# --- The table. ---

_SIZES = ("in_features", "out_features")
_KRON = (*_SIZES, "terms", "blocks", "side")
_GENERAL = (*_SIZES, "terms", "side", "a_shape", "b_shape", "grid", "inner", "flat", "a_rows", "b_rows")
_PIVOTS = ("rank", "pivots", "rest")
_FAMILIES = (
    Op("KroneckerLinear", ("x", "B", "A"), (*_KRON, "grid", "flat"), _in, _dense_in),
    Op("KroneckerLinearOut", ("x", "B", "A"), (*_KRON, "grid", "flat"), _out, _dense_out),
    Op("KroneckerLeadingLinear", ("x", "B"), (*_KRON, "leading"), _leading_in, _dense_in),
    Op("KroneckerLeadingLinearOut", ("x", "B"), (*_KRON, "padding"), _leading_out, _dense_out),
    Op("KroneckerLinearGeneral", ("x", "B", "A"), _GENERAL, _general, _dense_general),
    Op("KroneckerLinearGeneralMixFirst", ("x", "B", "A"), _GENERAL, _general_mix_first, _dense_general),
    Op("PivotedLinear", ("x", "V", "C", "order"), (*_SIZES, "rank"), _pivoted, _dense_pivoted),
    Op(
        "PivotedLinearIn", ("x", "C", "U", "order"), (*_SIZES, "rank", "pivots", "rest"), _pivoted_in, _dense_pivoted_in
    ),
)
_GROUP_SHUFFLE_ATTRIBUTES = (*_SIZES, "left_blocks", "right_blocks", "rank", "grid", "flat")
_GROUP_SHUFFLE_NAME = re.compile(r"GroupShuffleLinear_([1-9]\d*)x([1-9]\d*)")


def op(op_type: str) -> Op:
    """The op of that name; raises ArtifactError when the contract has none."""
    base = op_type.removesuffix(BIAS_SUFFIX)
    grid = _GROUP_SHUFFLE_NAME.fullmatch(base)
    if grid is not None and (int(grid[1]), int(grid[2])) in GROUP_SHUFFLE_GRIDS:
        write = _group_shuffle(int(grid[1]), int(grid[2]))
        found = Op(base, ("x", "L", "R"), _GROUP_SHUFFLE_ATTRIBUTES, write, _dense_group_shuffle)
    else:
        matches = [family for family in _FAMILIES if family.op_type == base]
        if not matches:
            raise ArtifactError(f"{op_type!r} is not an op of domain {DOMAIN!r} version {DOMAIN_VERSION}")
        found = matches[0]
    if base == op_type:
        return found
    return Op(op_type, (*found.inputs, "bias"), found.attributes, found.write, found.dense)


def is_ours(op_type: str) -> bool:
    """Whether the contract has an op of that name."""
    base = op_type.removesuffix(BIAS_SUFFIX)
    return _GROUP_SHUFFLE_NAME.fullmatch(base) is not None or any(family.op_type == base for family in _FAMILIES)


def op_types() -> tuple[str, ...]:
    """Every op_type but those of GroupShuffleLinear, which `GROUP_SHUFFLE_GRIDS` enumerates."""
    return tuple(family.op_type + suffix for family in _FAMILIES for suffix in ("", BIAS_SUFFIX))
