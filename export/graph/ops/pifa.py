"""Pivoted low rank: one op for pivots among the outputs, one for pivots among the inputs."""

from __future__ import annotations

import numpy as np

from compress.structures import PivotedStructure
from export.graph.ops.base import SIZES, Array, Arrays, Attributes, Body, Call, Family, Op, custom, integer, register


def _out(body: Body, bias: tuple[str, ...]) -> None:
    z = body.gemm("x", "V")  # (tokens, rank)
    y = body.op("Concat", z, body.gemm(z, "C"), axis=1)
    y = body.op("Gather", y, "order", output=None if bias else "y", axis=1)  # (tokens, n)
    if bias:
        body.op("Add", y, *bias, output="y")


def _in(body: Body, bias: tuple[str, ...]) -> None:
    x = body.op("Gather", "x", "order", axis=1)  # (tokens, m)
    pivots, rest, axis = body.attribute("pivots"), body.attribute("rest"), body.ints([1])
    p = body.op("Slice", x, body.ints([0]), pivots, axis)  # (tokens, rank)
    q = body.op("Slice", x, pivots, rest, axis)  # (tokens, m - rank)
    body.gemm(body.op("Add", p, body.gemm(q, "C")), "U", *bias, output="y")


def _dense_out(p: Arrays, attributes: Attributes) -> Array:
    return np.asarray(np.concatenate([p["V"], p["C"] @ p["V"]])[p["order"].astype(np.int64)])


def _dense_in(p: Arrays, attributes: Attributes) -> Array:
    W = np.empty((integer(attributes, "out_features"), integer(attributes, "in_features")))
    W[:, p["order"].astype(np.int64)] = np.concatenate([p["U"], p["U"] @ p["C"]], axis=1)
    return W


def _lower(s: PivotedStructure, bias: bool) -> tuple[Call, ...]:
    if s.side == "out":
        return (custom("PivotedLinear", s, ("V", "C", "order"), bias, {"rank": s.rank}),)
    ends: Attributes = {"rank": s.rank, "pivots": [s.rank], "rest": [s.in_features]}
    return (custom("PivotedLinearIn", s, ("C", "U", "order"), bias, ends),)


_PLUGIN = (*SIZES, "rank")
_IN = (*_PLUGIN, "pivots", "rest")
_ORDER = {"order": "int32"}

register(
    "pifa",
    Family(
        _lower,
        (
            Op("PivotedLinear", ("x", "V", "C", "order"), _PLUGIN, _out, _dense_out, _PLUGIN, _ORDER),
            Op("PivotedLinearIn", ("x", "C", "U", "order"), _IN, _in, _dense_in, _PLUGIN, _ORDER),
        ),
    ),
)
