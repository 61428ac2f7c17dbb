"""Sums of Kronecker products: six ops, for the sides in and out with a mix or without, and for both sides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from compress.structures import KroneckerStructure
from export.graph.ops.base import (
    SIZES,
    Array,
    Arrays,
    Attributes,
    Body,
    Call,
    Family,
    Op,
    custom,
    finish,
    integer,
    register,
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
    finish(body, z, bias, body.attribute("flat"))


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
    finish(body, z, bias, body.attribute("flat"))


def _general_mix_first(body: Body, bias: tuple[str, ...]) -> None:
    # u[t, a, i, e] = sum_c A[i, a, c] x[t, c, e];  y[t, a, b] = sum_{i, e} B[i, b, e] u[t, a, i, e]
    x = body.op("Reshape", "x", body.attribute("grid"))  # (tokens, m1, m2)
    mix = body.op("Transpose", body.op("CastLike", "A", "x"), perm=[1, 0, 2])  # (n1, terms, m1)
    u = body.op("MatMul", body.op("Reshape", mix, body.attribute("a_rows")), x)  # (tokens, n1 * terms, m2)
    u = body.op("Reshape", u, body.attribute("inner"))  # (tokens * n1, terms * m2)
    rows = body.op("Reshape", body.op("Transpose", "B", perm=[1, 0, 2]), body.attribute("b_rows"))  # (n2, terms * m2)
    finish(body, body.gemm(u, rows), bias, body.attribute("flat"))  # (tokens * n1, n2)


# --- Dense equivalents in float64, written from the definitions: W (n, m), y = x @ W.T. ---


def _identity_rows(attributes: Attributes) -> Array:
    return np.eye(integer(attributes, "terms"), integer(attributes, "blocks"))


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


# --- Lowering. ---


def _lower(s: KroneckerStructure, bias: bool) -> tuple[Call, ...]:
    return (_one_sided(s, bias) if s.side != "both" else _two_sided(s, bias),)


def _one_sided(s: KroneckerStructure, bias: bool) -> Call:
    m, n = s.in_features, s.out_features
    common: Attributes = {"terms": s.terms, "blocks": s.blocks, "side": s.side}
    if s.side == "in":
        if s.mix == "leading":
            return custom("KroneckerLeadingLinear", s, ("B",), bias, {**common, "leading": [s.kept]})
        shapes: Attributes = {"grid": [-1, s.blocks, m // s.blocks], "flat": [-1, s.kept]}
        return custom("KroneckerLinear", s, ("B", "A"), bias, {**common, **shapes})
    if s.mix == "leading":
        return custom("KroneckerLeadingLinearOut", s, ("B",), bias, {**common, "padding": [n - s.kept]})
    shapes = {"grid": [-1, s.terms, n // s.blocks], "flat": [-1, n]}
    return custom("KroneckerLinearOut", s, ("B", "A"), bias, {**common, **shapes})


def _two_sided(s: KroneckerStructure, bias: bool) -> Call:
    terms, (n1, m1), (n2, m2) = s.terms, s.left, s.right
    attributes: Attributes = {
        "terms": terms,
        "side": s.side,
        "a_shape": [n1, m1],
        "b_shape": [n2, m2],
        "flat": [-1, s.out_features],
    }
    # Multiply-accumulates per token: B first terms m1 n2 (m2 + n1), A first terms n1 m2 (m1 + n2).
    if 1 / n1 + 1 / m2 < 1 / n2 + 1 / m1:
        attributes |= {
            "grid": [-1, m2],
            "b_rows": [terms * n2, m2],
            "inner": [-1, m1 * terms, n2],
            "a_rows": [n1, m1 * terms],
        }
        return custom("KroneckerLinearGeneral", s, ("B", "A"), bias, attributes)
    attributes |= {
        "grid": [-1, m1, m2],
        "a_rows": [n1 * terms, m1],
        "inner": [-1, terms * m2],
        "b_rows": [n2, terms * m2],
    }
    return custom("KroneckerLinearGeneralMixFirst", s, ("B", "A"), bias, attributes)


def _stacks(one: KroneckerStructure, other: KroneckerStructure) -> bool:
    """The B of readers of the same blocks and terms, with mix "leading" or with equal A."""
    return one.side == "in" and replace(one, out_features=other.out_features) == other


_ONE_SIDED = (*SIZES, "terms", "blocks", "side")
_TWO_SIDED = (*SIZES, "terms", "side", "a_shape", "b_shape", "grid", "inner", "flat", "a_rows", "b_rows")
_PLUGIN = (*SIZES, "terms", "blocks")
_MIXED = ("x", "B", "A")
_FLOAT = {"A": "float32"}

register(
    "kron",
    Family(
        _lower,
        (
            Op("KroneckerLinear", _MIXED, (*_ONE_SIDED, "grid", "flat"), _in, _dense_in, _PLUGIN, _FLOAT),
            Op("KroneckerLinearOut", _MIXED, (*_ONE_SIDED, "grid", "flat"), _out, _dense_out, _PLUGIN, _FLOAT),
            Op("KroneckerLeadingLinear", ("x", "B"), (*_ONE_SIDED, "leading"), _leading_in, _dense_in, _PLUGIN),
            Op("KroneckerLeadingLinearOut", ("x", "B"), (*_ONE_SIDED, "padding"), _leading_out, _dense_out, _PLUGIN),
            Op("KroneckerLinearGeneral", _MIXED, _TWO_SIDED, _general, _dense_general, None, _FLOAT),
            Op("KroneckerLinearGeneralMixFirst", _MIXED, _TWO_SIDED, _general_mix_first, _dense_general, None, _FLOAT),
        ),
        stacks=_stacks,
        compared=("A",),
        once=("A",),
    ),
)
