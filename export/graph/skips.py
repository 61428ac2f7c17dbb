"""The skips of per-block rotations as standard ONNX operators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from compress.errors import ArtifactError
from compress.model.skips import CSSkip, DenseSkip, HouseholderSkip, SkipForm, SliceSkip
from export.graph.writer import GraphWriter, Weight


def apply_skip(g: GraphWriter, form: SkipForm, factors: Mapping[str, Weight], x: str) -> str:
    """x S, (tokens, d) -> (tokens, d), in the nodes of `SkipForm.apply`.

    Raises ArtifactError for a form that this version cannot export.
    """
    if isinstance(form, DenseSkip):
        return g.op("Gemm", x, g.weight(factors["weight"]), transB=1)
    if isinstance(form, CSSkip):
        return _cs(g, form, factors, x)
    if isinstance(form, HouseholderSkip):
        v = g.weight(factors["V"])
        turned = g.op("Gemm", g.op("Gemm", x, v), g.weight(factors["T"]))  # (tokens, reflections)
        return g.op("Sub", x, g.op("Gemm", turned, v, transB=1))
    if isinstance(form, SliceSkip):
        return _slice(g, form, factors["weight"], x)
    raise ArtifactError(f"a skip of form {form.name!r} has no ONNX graph; compress with --skip dense or cs")


def _cs(g: GraphWriter, form: CSSkip, factors: Mapping[str, Weight], x: str) -> str:
    """z = x_K Y, w = x_N V, out_N = z + w c, out_K = x_K - (z / (1 + c) + w) Y^T."""
    p, t, cosines = form.width - form.kept, form.turned, factors["c"]

    def damping() -> Iterable[Tensor]:
        return (1 / (1 + part) for part in cosines.parts())

    y, c = g.weight(factors["Y"]), g.weight(cosines)
    shrink = g.weight(Weight(f"{cosines.name}.shrink", (t,), damping))
    x_k, x_n = g.ops("Split", x, g.ints(form.kept, p), outputs=2, axis=1)  # (tokens, kept), (tokens, p)
    z, w = g.op("Gemm", x_k, y), g.op("Gemm", x_n, g.weight(factors["V"]))  # (tokens, turned), (tokens, p)
    w_t, *rest = g.ops("Split", w, g.ints(t, p - t), outputs=2, axis=1) if t < p else [w]
    back = g.op("Gemm", g.op("Add", g.op("Mul", z, shrink), w_t), y, transB=1)  # (tokens, kept)
    out_n = g.op("Add", z, g.op("Mul", w_t, c))
    return g.op("Concat", g.op("Sub", x_k, back), out_n, *rest, axis=1)


def _slice(g: GraphWriter, form: SliceSkip, weight: Weight, x: str) -> str:
    if form.kept_in < form.width:
        x = g.op("Slice", x, g.ints(0), g.ints(form.kept_in), g.ints(1))  # (tokens, kept_in)
    y = g.op("Gemm", x, g.weight(weight), transB=1)
    if form.kept_out < form.width:
        y = g.op("Pad", y, g.ints(0, 0, 0, form.width - form.kept_out))
    return y
