"""Heavy and optional libraries, imported where they are used, and the versions that are needed of them."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from types import ModuleType

from compress.errors import MissingDependencyError

LEAST = {
    "gguf": "0.17",
    "huggingface-hub": "1.5",
    "onnx": "1.19",
    "onnxruntime": "1.23.2",
    "safetensors": "0.6.1",
    "tensorrt": "10.15",
    "tensorrt-rtx-cu13": "1.7.1",
    "torch": "2.6",
    "transformers": "5.6",
}
"""Package -> the first version that will do, as in pyproject.toml, where pip was not asked or was overruled."""

CORE = ("torch", "transformers", "safetensors", "huggingface-hub")


def require(module: str, *, pip: str, purpose: str) -> ModuleType:
    """Import `module`, or say which pip package gives it.

    `pip` is what follows `pip install`, for instance "'procrustes-llm[eval]'"; `purpose` completes
    "is needed to ...". Raises MissingDependencyError when the module is not installed, does not import, or is older
    than `LEAST` says.
    """
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        # A broken install (a missing shared library, a missing dependency) is not "not installed".
        missing = isinstance(error, ModuleNotFoundError) and error.name in _prefixes(module)
        state = "is not installed" if missing else f"cannot be imported ({error})"
        raise MissingDependencyError(
            f"The Python package {module!r} {state}; it is needed to {purpose}. Run: pip install {pip}"
        ) from error
    _check(module, getattr(found, "__version__", None), purpose)
    return found


def check_versions(*packages: str, purpose: str) -> None:
    """Raise MissingDependencyError when a pip package is missing or older than `LEAST` says. Nothing is imported."""
    for package in packages:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise MissingDependencyError(
                f"The Python package {package!r} is not installed; it is needed to {purpose}. "
                f"Run: pip install '{package}>={LEAST[package]}'"
            ) from None
        _check(package, version, purpose)


def version_of(text: str) -> tuple[int, ...]:
    """(1, 24, 2) of "1.24.2+cu13" or "1.24.2rc1"."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _check(package: str, version: object, purpose: str) -> None:
    """An unknown version passes: what it lacks will be said where it is missed."""
    least = LEAST.get(package)
    if least is None or not isinstance(version, str) or not version_of(version):
        return
    if version_of(version) < version_of(least):
        raise MissingDependencyError(
            f"{package} {version} is installed, but {least} or later is needed to {purpose}. "
            f"Run: pip install --upgrade '{package}>={least}'"
        )


def _prefixes(module: str) -> set[str]:
    """`a.b.c` -> {a, a.b, a.b.c}."""
    parts = module.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}
