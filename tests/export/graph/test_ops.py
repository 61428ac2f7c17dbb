"""Every op of the contract: function body in ONNX Runtime = numpy reference = the structure in PyTorch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor

from compress.errors import ArtifactError
from compress.structures import (
    DenseStructure,
    GroupShuffleStructure,
    KroneckerStructure,
    LowRankStructure,
    PivotedStructure,
    Structure,
)
from export.graph.layer import export_linear
from export.graph.ops import DOMAIN, GROUP_SHUFFLE_GRIDS, PLUGIN_ATTRIBUTES, lower, op, op_types

ort = pytest.importorskip("onnxruntime")

small = st.integers(1, 5)
Draw = Callable[[st.SearchStrategy[int]], int]


@st.composite
def one_sided(draw: Draw, side: str, mix: str) -> Structure:
    blocks, width, other = draw(small), draw(small), draw(st.integers(1, 9))
    terms = draw(st.integers(1, min(blocks, width * other)))
    m, n = (blocks * width, other) if side == "in" else (other, blocks * width)
    return KroneckerStructure(m, n, blocks=blocks, terms=terms, side=side, mix=mix)


@st.composite
def two_sided(draw: Draw) -> Structure:
    n1, m1, n2, m2 = (draw(small) for _ in range(4))
    terms = draw(st.integers(1, min(n1 * m1, n2 * m2)))
    return KroneckerStructure(m1 * m2, n1 * n2, blocks=n1 * m1, terms=terms, side="both", n1=n1, m1=m1)


@st.composite
def group_shuffle(draw: Draw) -> Structure:
    left, right, rows, columns = (draw(small) for _ in range(4))
    rank = draw(st.integers(1, min(rows, columns)))
    return GroupShuffleStructure(left * columns, right * rows, left, right, rank)


@st.composite
def low_rank(draw: Draw) -> Structure:
    n, m = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return LowRankStructure(m, n, draw(st.integers(1, min(n, m))))


@st.composite
def pivoted(draw: Draw, side: str) -> Structure:
    m, n = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    return PivotedStructure(m, n, draw(st.integers(1, min(m, n, (m if side == "in" else n) - 1))), side)


STRUCTURES = {
    "dense": st.builds(DenseStructure, st.integers(1, 9), st.integers(1, 9)),
    "in explicit": one_sided("in", "explicit"),
    "in leading": one_sided("in", "leading"),
    "out explicit": one_sided("out", "explicit"),
    "out leading": one_sided("out", "leading"),
    "both": two_sided(),
    "gs": group_shuffle(),
    "lowrank": low_rank(),
    "pivots out": pivoted("out"),
    "pivots in": pivoted("in"),
}


def random_factors(structure: Structure, seed: int) -> dict[str, Tensor]:
    return structure.random_factors(torch.Generator().manual_seed(seed), torch.float64)


def run(path: Path, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def reference(structure: Structure, factors: dict[str, Tensor], bias: Tensor | None, x: Tensor) -> np.ndarray:
    """Through ops.Op.reference for our ops, and plain numpy for Gemm."""
    y = x.numpy()
    for call in lower(structure, bias is not None):
        named = {name: (bias if name == "bias" else factors[name]).numpy() for name in call.factors}
        if call.domain == DOMAIN:
            y = op(call.op_type).reference({"x": y, **named}, call.attributes)
        else:
            y = y @ named[call.factors[0]].T + named.get("bias", 0)
    return y


@pytest.mark.parametrize("kind", STRUCTURES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_body_equals_reference_equals_torch(kind: str, data: st.DataObject) -> None:
    structure = data.draw(STRUCTURES[kind])
    tokens, biased, seed = (
        data.draw(st.sampled_from([1, 2, 7])),
        data.draw(st.booleans()),
        data.draw(st.integers(0, 99)),
    )
    factors = random_factors(structure, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, structure.in_features, generator=generator, dtype=torch.float64)
    bias = torch.randn(structure.out_features, generator=generator, dtype=torch.float64) if biased else None

    expected = reference(structure, factors, bias, x)
    in_torch = structure.apply(factors, x) + (0 if bias is None else bias)
    assert torch.allclose(in_torch, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)

    with tempfile.TemporaryDirectory() as folder:
        wide = run(export_linear(structure, factors, Path(folder), bias=bias, dtype=torch.float64), x.numpy())
        narrow = run(export_linear(structure, factors, Path(folder), bias=bias), x.numpy().astype(np.float32))
    np.testing.assert_allclose(wide, expected, rtol=1e-12, atol=1e-12)
    assert narrow.dtype == np.float32
    np.testing.assert_allclose(narrow, expected, rtol=0, atol=2e-6 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("kind", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_types(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Strict inference accepts the body, the output is half precision, and only A is float32 and orders int32."""
    structure = {
        "dense": DenseStructure(8, 6),
        "in explicit": KroneckerStructure(8, 6, 4, 3),
        "in leading": KroneckerStructure(8, 6, 4, 3, mix="leading"),
        "out explicit": KroneckerStructure(6, 8, 4, 3, side="out"),
        "out leading": KroneckerStructure(6, 8, 4, 3, side="out", mix="leading"),
        "both": KroneckerStructure(8, 6, 4, 3, side="both", n1=2, m1=2),
        "gs": GroupShuffleStructure(8, 6, 4, 2, 2),
        "lowrank": LowRankStructure(8, 6, 3),
        "pivots out": PivotedStructure(8, 6, 3),
        "pivots in": PivotedStructure(8, 6, 3, "in"),
    }[kind]
    factors = random_factors(structure, 0)
    path = export_linear(structure, factors, tmp_path, bias=torch.ones(structure.out_features), dtype=dtype)
    model = onnx.load(path)
    half = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}[dtype]
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {name for name, t in types.items() if t != half} == {"A", "order"} & set(factors)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    assert inferred.graph.output[0].type.tensor_type.elem_type == half
    if dtype == torch.float16:
        x = torch.randn(3, structure.in_features, generator=torch.Generator().manual_seed(1)).half()
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        factors = {name: torch.from_numpy(stored[name].astype(np.float64)) for name in factors}
        expected = reference(structure, factors, torch.ones(structure.out_features).double(), x.double())
        np.testing.assert_allclose(run(path, x.numpy()), expected, rtol=0, atol=5e-3 * np.abs(expected).max())


def test_table_is_complete_and_calls_match_it() -> None:
    seen = set()
    for structure in (
        KroneckerStructure(8, 6, 4, 3),
        KroneckerStructure(8, 6, 4, 3, mix="leading"),
        KroneckerStructure(6, 8, 4, 3, side="out"),
        KroneckerStructure(6, 8, 4, 3, side="out", mix="leading"),
        KroneckerStructure(8, 32, 4, 3, side="both", n1=1, m1=4),
        KroneckerStructure(8, 32, 4, 3, side="both", n1=4, m1=1),
        GroupShuffleStructure(8, 6, 4, 2, 2),
        PivotedStructure(8, 6, 3),
        PivotedStructure(8, 6, 3, "in"),
    ):
        for bias in (False, True):
            (call,) = lower(structure, bias)
            found = op(call.op_type)
            assert set(call.attributes) == {*found.attributes, *PLUGIN_ATTRIBUTES}
            assert ("x", *call.factors) == found.inputs
            assert set(found.function().attribute) == set(call.attributes)
            fixed = {name: t for name, t in structure.storage_dtypes(torch.float16).items() if t != torch.float16}
            assert {name: getattr(torch, words) for name, words in found.types.items()} == fixed
            seen.add(call.op_type)
    assert seen == {*op_types(), "GroupShuffleLinear_4x2", "GroupShuffleLinear_4x2Bias"}


def test_no_op_has_the_name_of_a_standard_one() -> None:
    """TensorRT's parser looks a function up by op_type alone, after its own importers."""
    assert not [name for name in op_types() if onnx.defs.has(name)]


@pytest.mark.parametrize(
    "name",
    ["Gemm", "KroneckerLinearBiasBias", "GroupShuffleLinear", "GroupShuffleLinear_0x2", "GroupShuffleLinear_65x1"],
)
def test_unknown_op_is_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match="is not an op of domain"):
        op(name)


def test_grid_beyond_the_contract_is_refused() -> None:
    assert (64, 64) in GROUP_SHUFFLE_GRIDS
    with pytest.raises(ArtifactError, match="65 x 1"):
        lower(GroupShuffleStructure(65, 4, 65, 1, 1), False)


def test_wrong_factors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        export_linear(LowRankStructure(4, 4, 2), {"U": torch.ones(4, 2), "V": torch.ones(3, 4)}, tmp_path)
