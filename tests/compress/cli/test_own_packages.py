"""Packages of others under our top-level names: exit 4 before any work, with the name of the other and the remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.cli.own_packages import DISTRIBUTION, MARK, NAMES

ROOT = Path(__file__).resolve().parents[3]
REMEDY = "procrustes-llm needs an environment of its own: run python3 -m venv ENV, install"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site-packages with this project in it: folders of its own, of links to the files."""
    for name in NAMES:
        folder = tmp_path / "site" / name
        folder.mkdir(parents=True)
        for file in (ROOT / name).iterdir():
            if file.name != "__pycache__":
                (folder / file.name).symlink_to(file)
    record(tmp_path / "site", DISTRIBUTION, *(f"{name}/__init__.py" for name in NAMES), top_level=NAMES)
    return tmp_path / "site"


def record(site: Path, distribution: str, *files: str, top_level: tuple[str, ...] = ()) -> None:
    """What pip leaves of a distribution. setuptools writes top_level.txt, hatch, flit and poetry do not."""
    folder = site / f"{distribution.replace('-', '_')}-5.0.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 5.0.9\n")
    (folder / "RECORD").write_text("".join(f"{file},sha256=x,1\n" for file in ("a/b.py", *files)))
    if top_level:
        (folder / "top_level.txt").write_text("\n".join(top_level))


def start(site: Path, module: str, folder: Path | None = None, *before: Path) -> tuple[int, str]:
    """Exit code and stderr of a command without arguments, which it refuses with 2 where it starts at all."""
    paths = os.pathsep.join(str(path) for path in (*before, site))
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=folder or site.parent,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def replace(path: Path, text: str = "") -> None:
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def test_each_package_has_the_mark() -> None:
    assert [name for name in NAMES if MARK not in (ROOT / name / "__init__.py").read_text()] == []


def test_alone_it_starts(site: Path) -> None:
    record(site, "fine", "validated/__init__.py", "configobj/validate/__init__.py", "x/validate.py", top_level=("x",))
    (site.parent / "exports").mkdir()
    assert start(site, "validate.run")[0] == 2


def theirs_last(site: Path) -> None:
    record(site, "configobj", "validate/__init__.py", top_level=("configobj", "validate"))
    replace(site / "validate" / "__init__.py", "'''Not ours.'''\n")


def ours_last(site: Path) -> None:
    record(site, "configobj", "validate/__init__.py", top_level=("configobj", "validate"))


def ours_last_and_no_top_level(site: Path) -> None:
    record(site, "configobj", "configobj/__init__.py", "validate/__init__.py")


def a_module_of_that_name(site: Path) -> None:
    record(site, "configobj", "validate.py", top_level=("validate",))


@pytest.mark.parametrize("module", ["validate.run", "compress.run"])
@pytest.mark.parametrize("happens", [theirs_last, ours_last, ours_last_and_no_top_level, a_module_of_that_name])
def test_a_distribution_with_our_names_is_told(site: Path, happens: Callable[[Path], None], module: str) -> None:
    happens(site)
    code, said = start(site, module)
    assert code == 4
    file = "validate.py" if happens is a_module_of_that_name else "validate/__init__.py"
    assert said.startswith(f"error: configobj 5.0.9 installs {file!r} into {str(site)!r}, under a top-level name")
    assert REMEDY in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("gone", [True, False])
def test_an_overwritten_or_removed_init_is_told(site: Path, gone: bool) -> None:
    """As `pip uninstall configobj` leaves it: our file is gone, and nobody claims the name."""
    replace(site / "validate" / "__init__.py")
    if gone:
        (site / "validate" / "__init__.py").unlink()
    for module in ("validate.run", "export.build"):
        code, said = start(site, module)
        assert code == 4
        assert said.startswith(f"error: The package 'validate' of procrustes-llm is incomplete in {str(site)!r}: ")
        assert REMEDY in said


def test_one_earlier_on_the_path_is_told(site: Path) -> None:
    """An editable installation comes after site-packages."""
    other = site.parent / "other"
    other.mkdir()
    replace(other / "validate" / "__init__.py")
    record(other, "configobj", "validate/__init__.py", top_level=("validate",))
    code, said = start(site, "compress.run", None, other)
    assert code == 4
    assert f"finds the package 'validate' in {str(other / 'validate' / '__init__.py')!r}" in said
    assert "it belongs to configobj 5.0.9" in said
    assert REMEDY in said


def test_a_file_of_the_working_folder_hides_what_is_needed_only(site: Path, tmp_path: Path) -> None:
    """`python -m` looks into the working folder first, and validate.py is a name that users take."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "validate.py").write_text("")
    (folder / "export").mkdir()  # without __init__.py it hides nothing
    assert start(site, "export.build", folder)[0] == 2
    (folder / "trt_plugins.py").write_text("")
    code, said = start(site, "export.build", folder)
    assert code == 4
    assert said.endswith("rename it, or run python -m export.build in another folder\n")
    assert f"'trt_plugins' in {str(folder / 'trt_plugins.py')!r}" in said
