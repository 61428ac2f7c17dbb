"""What pip installs: the wheel has all that runs and no tests, and the commands run from it, away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.artifact.store import Artifact
from compress.cli.own_packages import NAMES
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
NO_CACHE = shutil.ignore_patterns("__pycache__")
UNINSTALLED = {"trt_plugins/README.md"}
"""Of our packages, what only a reader of the repository wants."""


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; it sees neither the checkout nor an index."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: what an earlier build has left in build/ would get into the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*NAMES, "tests"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=NO_CACHE)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, folder / "source", cwd=folder)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel in it, and all else as this one has it."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    ours = dict.fromkeys(sysconfig.get_path(key) for key in ("purelib", "platlib"))
    (site / "the_other_environment.pth").write_text("\n".join(ours) + "\n")  # whose own .pth files are not read
    options = ("--no-deps", "--no-index", "--ignore-installed", "--quiet", "--disable-pip-version-check")
    run(python, "-m", "pip", "install", *options, wheel, cwd=folder)
    return python


def test_the_wheel_has_every_file_and_no_tests(wheel: Path) -> None:
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        str(path.relative_to(ROOT))
        for name in NAMES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"trt_plugins/resources.json", "trt_plugins/csrc/CMakeLists.txt", "compress/py.typed"} <= files
    assert "export/triton/templates/launch.sh" in files
    assert files == wanted - UNINSTALLED


def test_commands_run_from_the_wheel(python: Path, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Compression, export, validation, and that none of it comes from the checkout."""
    code = f"import {', '.join(NAMES)}; print(*({', '.join(f'{name}.__file__' for name in NAMES)}))"
    for file in run(python, "-c", code, cwd=tmp_path).split():
        assert Path(file).is_relative_to(python.parents[1])
    assert "usage: python -m export.build" in run(python, "-m", "export.build", "--help", cwd=tmp_path)
    (tmp_path / "text.txt").write_text(tiny.TEXT * 3)
    model = ("--model", tiny_model("tiny_llama"), "--structure", "lowrank", "--ratio", "0.7", "--unit", "4")
    text = ("--calibration-data", "text.txt", "--calibration-samples", "2", "--sequence-length", "32")
    run(python, "-m", "export.build", *model, *text, "--engine", "ort", "--out", "out", cwd=tmp_path)
    assert (tmp_path / "out" / "triton" / "launch.sh").is_file()
    small = ("--data", "text.txt", "--max-windows", "2", "--prefill", "8", "--past", "8", "--seconds", "0.01")
    report = json.loads(run(python, "-m", "validate.run", "out", *small, "--no-plot", "--json", cwd=tmp_path))
    assert report["parity"]
    Artifact(tmp_path / "out").verify()
