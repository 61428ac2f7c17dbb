"""What pyproject.toml asks for, and the lowest versions of it as constraints.

python -m tests.pyproject > constraints-lowest.txt
"""

from __future__ import annotations

import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).resolve().parents[1]

TESTED = ("", "eval", "dev")
"""The extras that make test-lowest installs; "" is what is always installed."""

HEADER = """\
# The lowest versions that pyproject.toml allows, for make test-lowest, which runs the tests with them. Written by
#     python -m tests.pyproject > constraints-lowest.txt
"""


def requirements() -> dict[str, list[Requirement]]:
    """Extra -> what it asks for; "" -> what is always installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: [Requirement(text) for text in texts] for extra, texts in extras.items()}


def least(requirement: Requirement) -> str | None:
    """The version after >=; None where any will do."""
    return next((each.version for each in requirement.specifier if each.operator == ">="), None)


def lowest() -> str:
    """The lines of the constraints file. NVIDIA numbers its builds, which a bound leaves open."""
    found = {each.name: each for extra in TESTED for each in requirements()[extra] if least(each) is not None}
    lines = []
    for name, each in sorted(found.items(), key=lambda item: item[0].lower()):
        build = ".*" if name.startswith("tensorrt") else ""
        lines.append(f"{name}=={least(each)}{build}" + (f"; {each.marker}" if each.marker else ""))
    return HEADER + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(lowest(), end="")
