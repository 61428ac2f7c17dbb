"""Heavy and optional libraries, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from compress.errors import MissingDependencyError


def require(module: str, *, pip: str, purpose: str) -> ModuleType:
    """Import `module`, or say which pip package gives it.

    `pip` is what follows `pip install`, for instance "'procrustes-llm[eval]'"; `purpose` completes
    "is needed to ...". Raises MissingDependencyError when the module is not installed, or does not import.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        # A broken install (a missing shared library, a missing dependency) is not "not installed".
        missing = isinstance(error, ModuleNotFoundError) and error.name in _prefixes(module)
        state = "is not installed" if missing else f"cannot be imported ({error})"
        raise MissingDependencyError(
            f"The Python package {module!r} {state}; it is needed to {purpose}. Run: pip install {pip}"
        ) from error


def _prefixes(module: str) -> set[str]:
    """`a.b.c` -> {a, a.b, a.b.c}."""
    parts = module.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}
