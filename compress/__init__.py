"""Compression of causal language models: calibrate, rotate, fit structured matrices, write a checkpoint.

    import compress

    out = compress.compress("smollm2-135m", compress.Recipe(structure="auto", ratio=0.85), out="out/small")
    model, tokenizer = compress.load(out)

The names below load their modules (and with them torch) when first used, so that the import itself stays light.

Where transformers' auto classes are imported already, so is torch, and they learn of our checkpoints at once; later
they learn of them by `load` or `register`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress import structures
    from compress.api import compress, load, register
    from compress.progress import Progress
    from compress.recipe import Recipe

__all__ = ["Progress", "Recipe", "compress", "load", "register", "structures"]

_HOME = {
    "Progress": "compress.progress",
    "Recipe": "compress.recipe",
    "compress": "compress.api",
    "load": "compress.api",
    "register": "compress.api",
}

__distribution__ = "procrustes-llm"


def __getattr__(name: str) -> Any:
    if name == "structures":
        return import_module("compress.structures")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "transformers.models.auto.modeling_auto" in sys.modules:
    __getattr__("register")()
