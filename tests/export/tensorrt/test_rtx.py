"""TensorRT-RTX's parser takes every graph natively, in every type, without a GPU (pip install tensorrt-rtx-cu13)."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from tests.export.cases import CASES, Case, export, gs, kron, low_rank, pivoted, two_sided
from tests.export.helpers import llama
from tests.export.selections import around_cores, around_pivots, both, unlike
from tests.export.tensorrt.parsing import parse, selecting

TYPES = {"float32": "DataType.FLOAT", "float16": "DataType.HALF", "bfloat16": "DataType.BF16"}


MODELS = {
    "dense": Case(llama()),
    "kron leading": Case(llama(), kron("leading")),
    "kron explicit, qk norm": Case(llama(qk_norm=True), kron("explicit")),
    "kron both sides": Case(llama(), two_sided),
    "gs": Case(llama(), gs),
    "lowrank": Case(llama(), low_rank),
    "pifa": Case(llama(attention_bias=True), pivoted),
    "opt mixture": CASES["opt mixture"],
    "narrow selections": Case(llama(), selecting(llama(), both)),
    "padded selections": Case(llama(attention_bias=True), selecting(llama(), unlike)),
    "selections around cores": Case(llama(), selecting(llama(), around_cores)),
    "selections around pivots": Case(llama(), selecting(llama(), around_pivots)),
    "sliding window, llama3 rope": Case(llama(sliding_window=4, rope=CASES["llama3 rope"].arch.rope)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", TYPES)
def test_parser_takes_the_graph(name: str, dtype: str, rtx_environment: dict[str, str], tmp_path: Path) -> None:
    _, info = export(MODELS[name], tmp_path, dtype=dtype)
    result = parse(info.path, rtx_environment)
    assert result["parsed"], result["errors"]
    assert set(result["outputs"]) == {TYPES[dtype]}
    assert not [kind for kind in result["layers"] if "PLUGIN" in kind]


@pytest.mark.parametrize(
    ("name", "dtype"), [("kron leading", "float32"), ("opt mixture", "float16"), ("narrow selections", "float16")]
)
def test_builder_makes_a_plan(name: str, dtype: str, rtx_environment: dict[str, str], tmp_path: Path) -> None:
    """Types, shapes and a profile with dynamic batch, length and past all fit: the plan is not run here."""
    _, info = export(MODELS[name], tmp_path, dtype=dtype)
    assert parse(info.path, rtx_environment, "--build")["plan_bytes"] > 10_000


def test_parser_refuses_what_it_should(rtx_environment: dict[str, str], tmp_path: Path) -> None:
    """The harness can fail: without its functions a model does not parse."""
    _, info = export(MODELS["kron leading"], tmp_path)
    model = onnx.load(info.path, load_external_data=False)
    del model.functions[:]
    info.path.write_bytes(model.SerializeToString())
    result = parse(info.path, rtx_environment)
    assert not result["parsed"]
    assert "KroneckerLeadingLinear" in result["errors"][0]
