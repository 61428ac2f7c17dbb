"""Tensors in files: written whole or not at all, or mapped into memory."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from compress.artifact.files import named, os_error_of
from compress.errors import ArtifactError


def mapped_anew(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor of zeros that lives in a new file `path`; changes are written back by the system.

    The space is taken here: on a full disk this raises OSError, where a write into a sparse mapping would kill the
    process (SIGBUS).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
        except OSError as error:
            named(error, path)
            raise
    return mapped(path, shape)


def mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The float32 tensor that lives in `path`. Raises ArtifactError when there is none of this size: zeros of a file
    made here would pass for activations."""
    size = math.prod(shape)
    found = path.stat().st_size if path.is_file() else None
    if found != 4 * size:
        seen = "missing" if found is None else f"of {found} bytes"
        raise ArtifactError(f"{path} is {seen}, where {4 * size} bytes of activations were kept; remove it, run again")
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)


def save_whole(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, whole or not at all. Raises OSError naming `path` when there is no space for it."""
    partial = path.with_suffix(".partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    except SafetensorError as error:
        raise os_error_of(error, path) from error
    partial.rename(path)
