"""Group-and-shuffle matrices: one op for each grid of blocks, because its fast body has one Gemm a block."""

from __future__ import annotations

import re

import numpy as np

from compress.errors import ArtifactError
from compress.structures import GroupShuffleStructure
from export.graph.ops.base import SIZES, Array, Arrays, Attributes, Body, Call, Family, Op, Writer, custom, register

GROUP_SHUFFLE_GRIDS = tuple((left, right) for left in range(1, 65) for right in range(1, 65))
PLUGIN_GRID = 8
"""Blocks of either side up to which there is a plugin; beyond, the body runs."""

_NAME = re.compile(r"GroupShuffleLinear_([1-9]\d*)x([1-9]\d*)")
_ATTRIBUTES = (*SIZES, "left_blocks", "right_blocks", "rank", "grid", "flat")
_PLUGIN = (*SIZES, "left_blocks", "right_blocks", "rank")


def _body(left: int, right: int) -> Writer:
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


def _dense(p: Arrays, attributes: Attributes) -> Array:
    L, R = p["L"], p["R"]  # (left, s / left, m / left), (right, n / right, s / right)
    rho = L.shape[1] // len(R)
    rows = []
    for r, block in enumerate(R):
        pieces = [block[:, i * rho : (i + 1) * rho] @ left[r * rho : (r + 1) * rho] for i, left in enumerate(L)]
        rows.append(np.concatenate(pieces, axis=1))
    return np.concatenate(rows, axis=0)


def _named(op_type: str) -> Op | None:
    grid = _NAME.fullmatch(op_type)
    if grid is None or (left := int(grid[1]), right := int(grid[2])) not in GROUP_SHUFFLE_GRIDS:
        return None
    plugin = _PLUGIN if max(left, right) <= PLUGIN_GRID else None
    return Op(op_type, ("x", "L", "R"), _ATTRIBUTES, _body(left, right), _dense, plugin)


def _lower(s: GroupShuffleStructure, bias: bool) -> tuple[Call, ...]:
    left, right = s.left_blocks, s.right_blocks
    if (left, right) not in GROUP_SHUFFLE_GRIDS:
        raise ArtifactError(f"a {left} x {right} grid of blocks is beyond the op contract: at most 64 x 64")
    attributes: Attributes = {
        "left_blocks": left,
        "right_blocks": right,
        "rank": s.rank,
        "grid": [-1, left, right, s.rank],
        "flat": [-1, left * right * s.rank],
    }
    return (custom(f"GroupShuffleLinear_{left}x{right}", s, ("L", "R"), bias, attributes),)


register("gs", Family(_lower, named=_named))
