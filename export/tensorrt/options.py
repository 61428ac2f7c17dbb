"""What engines of TensorRT and of TensorRT-RTX share: options, names, and what is installed."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from compress.artifact.store import Artifact
from export.runtime.profiles import Spans

PLAN, LAYERS = "model.plan", "layers.json"

Choice = Literal["auto", "native", "cpp"]


@dataclass(frozen=True)
class Options:
    """How to build. `plugin`: the plugins, the function bodies (native), or the faster of both."""

    spans: Spans
    plugin: Choice = "auto"
    optimization: int | None = None
    workspace: int | None = None  # bytes
    timing_cache: Path | None = None

    def flags(self) -> list[str]:
        """Flags of export.build for these options, what is not given left out."""
        flags = [*self.spans.flags(), "--plugin", self.plugin]
        if self.optimization is not None:
            flags += ["--opt-level", str(self.optimization)]
        if self.workspace is not None:
            flags += ["--workspace", str(self.workspace >> 20)]
        return flags

    @classmethod
    def of(cls, flags: Sequence[str]) -> Options:
        """What `flags` gave."""
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        spans = Spans.parse(given["--batch"], given["--prompt"], given["--cache"], sys.maxsize)
        level, workspace = given.get("--opt-level"), given.get("--workspace")
        return cls(
            spans,
            cast(Choice, given["--plugin"]),
            None if level is None else int(level),
            None if workspace is None else int(workspace) << 20,
        )


def plugin_library(artifact: Artifact) -> Path | None:
    """OUT/plugins/libprocrustes_plugins.so, None where the graph has no op for it."""
    from trt_plugins.build import PLUGINS

    if not artifact.has_stage("plugins"):
        return None
    return artifact.require_stage("plugins") / PLUGINS


def installed(distribution: str) -> str | None:
    """Version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_of(text: str) -> tuple[int, ...]:
    """(11, 4) of 11.4.0.106."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
