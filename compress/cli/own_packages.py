"""The top-level names of this project, which others use as well.

`compress`, `export`, `trt_plugins` and `validate` are common words, and pip puts the files of two distributions with
one top-level name into one folder without a warning: configobj 5.0.9, say, ships `validate/__init__.py`, and that
file belongs to whichever was installed last. Every command looks before its work.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import MissingDependencyError

if TYPE_CHECKING:
    from importlib.metadata import Distribution

DISTRIBUTION = "procrustes-llm"

NAMES = ("compress", "trt_plugins", "export", "validate")
"""From the ground up: a command imports from its own package and from those before it."""

MARK = f'__distribution__ = "{DISTRIBUTION}"'
"""A line of `__init__.py` of each of them."""

_REMEDY = (
    f"{DISTRIBUTION} needs an environment of its own: run python3 -m venv ENV, install {DISTRIBUTION} with "
    "ENV/bin/python -m pip, and run the command with ENV/bin/python"
)


def check_own_packages(command: str) -> None:
    """Raise MissingDependencyError where one of `NAMES` is not ours, or another distribution has files in its folder.

    `command` is the module that runs, for instance "validate.run". A file of the working folder (`validate.py` beside
    the user's data) may hide a package that the command does not import. Takes 0.5 ms of processor time in a checkout
    and 8 ms in a site-packages of 100 distributions; nothing is imported.
    """
    command = command.removesuffix(".__main__")
    first = command.partition(".")[0]
    needed = NAMES[: NAMES.index(first) + 1] if first in NAMES else NAMES
    root = Path(__file__).parents[2]
    for other, file in _other_files(root):
        raise MissingDependencyError(
            f"{other} installs {file!r} into {str(root)!r}, under a top-level name that {DISTRIBUTION} uses as well, "
            f"so that one of them overwrites or hides the other. {_REMEDY}"
        )
    for name in NAMES:
        found = _found(name)
        if found is not None and found.is_file() and MARK in found.read_text(encoding="utf-8", errors="replace"):
            continue
        if found is None or found == root / name / "__init__.py":
            raise MissingDependencyError(
                f"The package {name!r} of {DISTRIBUTION} is incomplete in {str(root)!r}: another package has "
                f"overwritten or removed {name}/__init__.py. {_REMEDY}"
            )
        if not _is_beside_the_script(found):
            raise MissingDependencyError(
                f"Python finds the package {name!r} in {str(found)!r}, which is not that of {DISTRIBUTION}"
                f"{_owner(found)}. {_REMEDY}"
            )
        if name in needed:
            raise MissingDependencyError(
                f"Python finds the package {name!r} in {str(found)!r}, which is not that of {DISTRIBUTION}: rename it, "
                f"or run python -m {command} in another folder"
            )


def _found(name: str) -> Path | None:
    """The file that `import name` runs, or has run; None where there is none, or only folders without `__init__.py`."""
    spec = importlib.util.find_spec(name)
    return None if spec is None or not spec.has_location or spec.origin is None else Path(spec.origin)


def _is_beside_the_script(found: Path) -> bool:
    """Whether it hides ours because Python looks first into the working folder (`python -m`) or that of the script."""
    folder = found.parents[1] if found.name == "__init__.py" else found.parent
    return os.path.realpath(sys.path[0]) == os.path.realpath(folder)


def _other_files(root: Path) -> Iterator[tuple[str, str]]:
    """("configobj 5.0.9", "validate/__init__.py") for other distributions with files of our names in `root`.

    What setuptools builds lists its names in top_level.txt; of the rest RECORD is read, which has every file.
    """
    names = {name.encode() for name in NAMES}
    entry = re.compile(rb"^(?:%s)(?:/[^,\n]*|\.py)(?=,)" % b"|".join(sorted(names)), re.MULTILINE)
    own = DISTRIBUTION.replace("-", "_") + "-"
    for folder in os.scandir(root):
        if not folder.name.endswith(".dist-info") or folder.name.startswith(own):
            continue
        listed = _content(f"{folder.path}/top_level.txt")
        if listed is None or not names.isdisjoint(listed.split()):
            files = entry.findall(_content(f"{folder.path}/RECORD") or b"")
            if files:
                import importlib.metadata

                yield _title(importlib.metadata.PathDistribution(Path(folder.path))), min(files).decode()


def _content(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:  # most have the one or the other only
        return None


def _owner(found: Path) -> str:
    """ ": it belongs to configobj 5.0.9", where a distribution says so. Reads the list of every one: seconds."""
    import importlib.metadata

    for distribution in importlib.metadata.distributions():
        if any(Path(str(file.locate())) == found for file in distribution.files or ()):
            return f": it belongs to {_title(distribution)}"
    return ""


def _title(distribution: Distribution) -> str:
    return f"{distribution.metadata['Name']} {distribution.version}"
