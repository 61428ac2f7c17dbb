"""Writing a checkpoint: sharded safetensors with an index, config.json, the rotations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compress.checkpoint.reader import INDEX, ROTATION, storage_types
from compress.errors import ArtifactError
from compress.linalg import all_finite
from compress.model.config import ProcrustesConfig
from compress.rewrites.rotations import Rotations
from compress.source.generation import write_generation_config
from compress.structures import Structure


class ShardWriter:
    """Writes tensors to numbered safetensors shards as they come; memory is bounded by one shard.

    with ShardWriter(folder) as writer: writer.add(name, tensor). The index is written on a clean exit only. The factors
    of `structures` (linear "layers.{i}.{role}" -> its structure) are stored in the types that these ask for, every
    other tensor in `dtype`, and integers as they are.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        structures: Mapping[str, Structure] | None = None,
        max_shard_bytes: int = 2 << 30,
    ) -> None:
        self.folder, self.dtype, self.max_shard_bytes = folder, dtype, max_shard_bytes
        self._types = storage_types(structures or {}, dtype)
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total = 0
        self._shards: list[list[str]] = []
        self._seen: set[str] = set()

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor. Raises ArtifactError when it is not finite: a broken weight is never written."""
        if name in self._seen:
            raise ValueError(f"{name} was already written")
        if not all_finite(tensor):
            raise ArtifactError(f"{name} came out with NaN or infinite values; it was not written. Please report this")
        tensor = tensor.detach().to("cpu", self._stored_dtype(name, tensor)).contiguous().clone()
        if not all_finite(tensor):
            raise ArtifactError(
                f"{name} has values beyond the range of {str(self.dtype).removeprefix('torch.')}; it was not written. "
                f"Use --checkpoint-dtype bfloat16 or float32"
            )
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        self._seen.add(name)
        self._pending[name] = tensor
        self._pending_bytes += size
        self._total += size

    def _stored_dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        return self._types.get(name, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def _flush(self) -> None:
        number = len(self._shards) + 1
        save_file(self._pending, self.folder / f"shard-{number}.safetensors", metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        if self._pending:
            self._flush()
        weight_map, count = {}, len(self._shards)
        for number, names in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.folder / f"shard-{number}.safetensors").rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_config(
    folder: Path, config: ProcrustesConfig, dtype: torch.dtype, generation: Mapping[str, Any] | None = None
) -> None:
    """config.json, and generation_config.json with the content `generation`, None where the source has none."""
    config.architectures = ["ProcrustesForCausalLM"]
    config.dtype = dtype
    config.save_pretrained(folder)
    write_generation_config(folder, generation)


def write_rotations(folder: Path, rotations: Rotations) -> None:
    """rotation.safetensors: float64 (d, d) matrices "q.{position}", none for an unrotated stream; its metadata name the
    kind, or the forms of the skips where they are not dense, which only kind "block" has."""
    tensors = {f"q.{i}": q.contiguous() for i, q in enumerate(rotations.matrices)}
    # One entry only: safetensors writes several in random order, and equal requests give equal bytes.
    metadata = {"kind": rotations.kind}
    if rotations.skips:
        metadata = {"skips": json.dumps([form.to_config() for form in rotations.skips])}
    save_file(tensors, folder / ROTATION, metadata=metadata)


def config_for(
    arch: Any, structures: Mapping[str, Structure], rotations: Rotations, **choices: Any
) -> ProcrustesConfig:
    """config.json of a checkpoint with these structures and rotations; choices: extra_biases, embedding ranks."""
    layer_norm = arch.norm == "layernorm"
    return ProcrustesConfig.from_architecture(
        arch,
        structures,
        rotation=rotations.kind,
        **rotations.skip_choices(),
        center_embedding=arch.tied and layer_norm,
        head_map=arch.tied,
        head_bias=layer_norm and not arch.tied,
        tie_word_embeddings=arch.tied,
        **choices,
    )
