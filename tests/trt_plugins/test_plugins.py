"""The plugin library in NVIDIA's own registry, parser and builder (TensorRT-RTX), on real exports, without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from tests.export.cases import CASES, Case, export, gs, kron, pivoted, two_sided
from tests.export.helpers import llama
from tests.export.selections import around_pivots
from tests.export.tensorrt.parsing import parse, selecting
from trt_plugins.build import AUTOLOAD, PLUGINS

MODELS = {
    "kron explicit": Case(llama(), kron("explicit")),
    "kron leading, biased": Case(llama(attention_bias=True), kron("leading")),
    "gs": Case(llama(), gs),
    "pifa, biased": Case(llama(attention_bias=True), pivoted),
    "selections around pivots": Case(llama(), selecting(llama(), around_pivots)),
    "opt mixture": CASES["opt mixture"],
}
GENERAL = "KroneckerLinearGeneral"  # has no plugin: the parser takes its body


def custom_nodes(path: Path) -> list[str]:
    return [n.op_type for n in onnx.load(path, load_external_data=False).graph.node if n.domain == "procrustes"]


@pytest.mark.parametrize("name", MODELS)
def test_every_node_becomes_a_plugin(
    name: str, libraries: Path, rtx_environment: dict[str, str], tmp_path: Path
) -> None:
    for dtype in ("float16", "bfloat16", "float32") if name.startswith("kron") else ("float16", "bfloat16"):
        _, info = export(MODELS[name], tmp_path / dtype, dtype=dtype)
        nodes = custom_nodes(info.path)
        result = parse(info.path, rtx_environment, "--plugins", str(libraries / PLUGINS), "--build")
        assert result["parsed"], result["errors"]
        assert result["plugins"] == sum(GENERAL not in node for node in nodes) > 0
        assert result["plan_bytes"] > 10_000


def test_general_kronecker_products_stay_native(
    libraries: Path, rtx_environment: dict[str, str], tmp_path: Path
) -> None:
    _, info = export(Case(llama(), two_sided), tmp_path, dtype="float16")
    assert all(GENERAL in node for node in custom_nodes(info.path))
    assert parse(info.path, rtx_environment, "--plugins", str(libraries / PLUGINS))["plugins"] == 0


@pytest.mark.parametrize(
    ("kind", "attribute", "value", "message"),
    [
        ("kron explicit", "blocks", 5, "blocks do not divide"),
        ("kron explicit", "terms", 2, "must have the shape"),
        ("gs", "left_blocks", 1, "the grid is not that of the name"),
        ("pifa, biased", "rank", 7, "must have the shape"),
        ("pifa, biased", "rank", 0, "the attribute rank is 0"),
        ("pifa, biased", "rank", None, "needs the attribute rank"),
    ],
)
def test_attributes_that_contradict_the_shapes_are_refused(
    kind: str,
    attribute: str,
    value: int | None,
    message: str,
    libraries: Path,
    rtx_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    _, info = export(MODELS[kind], tmp_path, dtype="float16")
    model = onnx.load(info.path, load_external_data=False)
    node = next(n for n in model.graph.node if n.domain == "procrustes")
    (found,) = (a for a in node.attribute if a.name == attribute)
    if value is None:
        node.attribute.remove(found)
    else:
        found.i = value
    info.path.write_bytes(model.SerializeToString())
    result = parse(info.path, rtx_environment, "--plugins", str(libraries / PLUGINS))
    assert not result["parsed"]
    assert message in result["said"]


def test_the_library_needs_no_tensorrt_and_no_driver(libraries: Path) -> None:
    needed = subprocess.run(["readelf", "-d", str(libraries / PLUGINS)], capture_output=True, text=True, check=True)
    assert "NEEDED" in needed.stdout
    assert not [line for line in needed.stdout.splitlines() if "nvinfer" in line or "libcuda" in line]
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(libraries / PLUGINS)], capture_output=True, text=True, check=True
    )
    assert {"getCreators", "setLoggerFinder"} <= {line.split()[-1] for line in symbols.stdout.splitlines()}


def test_autoload_without_tensorrt_says_so(libraries: Path) -> None:
    code = f"import ctypes; ctypes.CDLL({str(libraries / AUTOLOAD)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no TensorRT is loaded" in done.stderr


def test_autoload_refuses_a_registry_of_another_version(libraries: Path, rtx_environment: dict[str, str]) -> None:
    """TensorRT-RTX 1 and the headers of TensorRT 10: a call through that interface ends the process."""
    code = f"import ctypes, tensorrt_rtx as trt; trt.get_plugin_registry(); ctypes.CDLL({str(libraries / AUTOLOAD)!r})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=rtx_environment)
    assert done.returncode == 0, done.stderr
    assert "was compiled for TensorRT 10 and the process has version" in done.stderr
