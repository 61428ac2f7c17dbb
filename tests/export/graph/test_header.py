"""The header of an exported file: the same from the file and from ONNX Runtime, without the weights; hostile files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from compress.errors import ArtifactError
from export.graph.decoder import export_onnx
from export.graph.external import DATA_NAME
from export.graph.header import Header, read_header
from export.runtime.ort import OrtExecutor, OrtRunner
from tests.export.cases import every, mixed_kron
from tests.export.helpers import llama, write_checkpoint

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, arch = tmp_path_factory.mktemp("model"), llama()
    write_checkpoint(folder / "checkpoint", arch, every(arch, mixed_kron))
    return export_onnx(folder / "checkpoint", folder / "onnx").path


def test_file_and_session_say_the_same(exported: Path) -> None:
    header, arch = read_header(exported), llama()
    assert OrtRunner(exported).header == header
    assert OrtExecutor(exported).axes == header.axes
    assert header.axes["input_ids"] == ("batch", "sequence")
    assert header.axes["past_key_values.0.key"] == ("batch", arch.num_kv_heads, "past_sequence", arch.head_dim)
    assert {each.name: each.dtype for each in header.inputs}["attention_mask"] == "int64"
    assert (header.dtype, header.vocabulary) == ("float32", arch.vocab_size)
    assert header.cache_sizes == (arch.num_kv_heads, arch.head_dim)
    assert len(header.caches) == 2 * arch.num_layers
    assert header.metadata["max_positions"] == arch.max_positions
    assert header.metadata["sliding_window"] is None


def test_the_weights_are_not_read(exported: Path, tmp_path: Path) -> None:
    alone = tmp_path / exported.name
    alone.write_bytes(exported.read_bytes())
    assert (exported.parent / DATA_NAME).exists()
    assert read_header(alone).axes == read_header(exported).axes


def written(path: Path, logits: list[int | str] | None, cache: list[int | str] | None, **metadata: str) -> Header:
    """The header of a graph of nothing but its inputs and outputs."""
    outputs = [] if logits is None else [helper.make_tensor_value_info("logits", TensorProto.BFLOAT16, logits)]
    inputs = (
        [] if cache is None else [helper.make_tensor_value_info("past_key_values.0.key", TensorProto.BFLOAT16, cache)]
    )
    model = helper.make_model(helper.make_graph([], "empty", inputs, outputs))
    helper.set_model_props(model, {key.replace("__", "."): value for key, value in metadata.items()})
    onnx.save(model, str(path))
    return read_header(path)


LOGITS, CACHE = ["batch", 1, 7], ["batch", 2, "past", 4]


def test_types_and_metadata_of_others(tmp_path: Path) -> None:
    header = written(tmp_path / "m.onnx", LOGITS, CACHE, author="not JSON", procrustes__eos_token_id="[2, 3]")
    assert header.dtype == "bfloat16"
    assert header.metadata == {"eos_token_id": [2, 3]}


def test_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(ArtifactError, match=r"m\.onnx does not exist; run python -m export\.build first"):
        read_header(path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ArtifactError, match="is no ONNX file"):
        read_header(path)
    with pytest.raises(ArtifactError, match=r"procrustes\.eos_token_id = '\[2,' in its metadata, which is no JSON"):
        written(path, LOGITS, CACHE, procrustes__eos_token_id="[2,")
    for logits in (None, ["batch", 7]):
        with pytest.raises(ArtifactError, match="no output called logits with three axes"):
            _ = written(path, logits, CACHE).dtype
    with pytest.raises(ArtifactError, match="a vocabulary of no fixed size"):
        _ = written(path, ["batch", 1, "vocabulary"], CACHE).vocabulary
    with pytest.raises(ArtifactError, match="is not a decoder exported by this project"):
        _ = written(path, LOGITS, None).caches
    with pytest.raises(ArtifactError, match="a cache of no fixed number or size of heads"):
        _ = written(path, LOGITS, ["batch", "heads", "past", 4]).cache_sizes


def test_nothing_else_reads_an_onnx_file() -> None:
    readers = {
        str(path.relative_to(ROOT))
        for package in ("compress", "export", "validate")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and (node.attr in {"metadata_props", "custom_metadata_map"} or re.match(r"onnx\w*\.load", ast.unparse(node)))
    }
    assert readers == {"export/graph/header.py"}
