"""The versions that decide the bytes of a result."""

from __future__ import annotations

import importlib.metadata

PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Installed version of each package."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}
