"""Checkpoint to ONNX, and from ONNX to an engine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.build import export_model

__distribution__ = "procrustes-llm"

__all__ = ["export_model"]


def __getattr__(name: str) -> Any:
    if name != "export_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("export.build"), name)
