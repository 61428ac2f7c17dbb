"""The plugin classes through TensorRT's interfaces, by a C++ program, and in the registry of a real TensorRT 11."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools import unavailable
from trt_plugins.build import PLUGINS
from trt_plugins.toolchain import find

HERE = Path(__file__).parent
REGISTRY = """
import sys
import numpy as np
import tensorrt_lean as trt

logger = trt.Logger(trt.Logger.WARNING)
registry = trt.get_plugin_registry()
assert registry.load_library(sys.argv[1]) is not None

def create(name, **sizes):
    fields = [trt.PluginField(k, np.array([v], np.int32), trt.PluginFieldType.INT32) for k, v in sizes.items()]
    creator = registry.get_creator(name, "1", "procrustes")
    assert creator is not None, name
    return creator.create_plugin("node", trt.PluginFieldCollection(fields), trt.TensorRTPhase.RUNTIME)

assert create("KroneckerLinear", in_features=64, out_features=48, terms=2, blocks=4) is not None
shuffle = dict(in_features=64, out_features=48, left_blocks=2, right_blocks=3, rank=8)
assert create("GroupShuffleLinear_2x3Bias", **shuffle) is not None
assert create("KroneckerLinear", in_features=64, out_features=48, terms=2, blocks=5) is None
assert create("GroupShuffleLinear_3x3", **shuffle) is None
assert registry.get_creator("KroneckerLinear", "2", "procrustes") is None
assert registry.get_creator("KroneckerLinear", "1", "") is None
print(trt.__version__)
"""


def test_the_classes_keep_their_contract(libraries: Path, tmp_path: Path) -> None:
    """Symbolic shapes, types and formats, clones, stored fields, bad fields; enqueue without a GPU is an error."""
    tools, program = find(), tmp_path / "plugin_test"
    command = [str(tools.host), *["-std=c++17", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]]
    command += ["-isystem", str(tools.tensorrt), "-isystem", str(tools.cuda / "include")]
    command += [str(HERE / "plugin_test.cpp"), "-ldl", "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Without a driver nothing of CUDA may be there, so that this test means the same on every machine.
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [str(program), str(libraries / PLUGINS)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("14 ops, 0 failures\n")


def test_the_registry_of_tensorrt_11_takes_the_library(libraries: Path) -> None:
    """Compiled with the headers of TensorRT 10: creators are found, good fields make plugins, bad ones do not."""
    if importlib.util.find_spec("tensorrt_lean") is None:
        unavailable("tensorrt-lean-cu13 is not installed")
    command = [sys.executable, "-c", REGISTRY, str(libraries / PLUGINS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("11.")
    assert "5 blocks do not divide 64" in done.stderr
    assert "the grid is not that of the name" in done.stderr


def test_a_library_that_is_none_is_refused(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt_lean") is None:
        unavailable("tensorrt-lean-cu13 is not installed")
    (tmp_path / "empty.so").write_bytes(b"")
    command = [sys.executable, "-c", REGISTRY, str(tmp_path / "empty.so")]
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode != 0


@pytest.mark.parametrize("library", [PLUGINS, "nowhere.so"])
def test_the_program_can_fail(library: str, libraries: Path, tmp_path: Path) -> None:
    """With a wrong expectation planted, and with a library that is not there."""
    tools, program = find(), tmp_path / "plugin_test"
    source = (HERE / "plugin_test.cpp").read_text().replace("== 48);", "== 49);")
    (tmp_path / "plugin_test.cpp").write_text(source)
    command = [str(tools.host), "-std=c++17", "-isystem", str(tools.tensorrt), "-isystem", str(tools.cuda / "include")]
    command += [str(tmp_path / "plugin_test.cpp"), "-ldl", "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([str(program), str(libraries / library)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FAIL" in done.stdout
