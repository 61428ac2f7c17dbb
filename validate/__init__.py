"""Proof on an artefact: parity ladder, perplexity, speed, and the report with its gates."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from validate.run import validate_artifact

__distribution__ = "procrustes-llm"

__all__ = ["validate_artifact"]


def __getattr__(name: str) -> Any:
    if name != "validate_artifact":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("validate.run"), name)
