"""Reading the weights of a source model, one tensor at a time, whatever it is stored in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from compress.architecture import Architecture
from compress.errors import ArtifactError
from compress.source.families.base import LM_HEAD, TensorNames, expected_shapes
from compress.source.weight_files import check_index, entry_of, locate, open_file

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Tensors in checkpoints that no model reads: buffers of old Llama files and a format mark of fairseq.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", "decoder.version")


class WeightReader(Protocol):
    """Tensors by name. Every `get` returns a tensor of its own, which the caller may overwrite."""

    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def file(self, name: str) -> str:
        """Name of the file that holds a tensor, for messages."""
        ...

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the CPU, in `dtype` or as stored; ArtifactError when absent, NaN or infinite."""
        ...


class Reader(ABC):
    """What all readers share: the checks on the values."""

    loads_copies = False
    """True if `_load` returns memory that has no other user."""

    @abstractmethod
    def names(self) -> tuple[str, ...]: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def file(self, name: str) -> str: ...

    @abstractmethod
    def _load(self, name: str) -> Tensor:
        """The stored tensor, which may share memory with the file's mapping."""

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        stored = self._load(name)
        where = f"tensor {name!r} in {self.file(name)}"
        if stored.dtype not in _FLOATS:
            raise ArtifactError(
                f"The {where} is of type {_dtype_name(stored.dtype)}, but only float16, bfloat16, float32 "
                "and float64 weights can be compressed; take the model before it was quantised."
            )
        if not _all_finite(stored):
            wrong = int((~torch.isfinite(stored)).sum())
            raise ArtifactError(
                f"The {where} has {wrong} values out of {stored.numel()} that are NaN or infinite; the checkpoint "
                "is damaged: download or save it again."
            )
        # A copy: safetensors and mmap give views of the file's mapping, and a second `get` would see what the caller
        # wrote into the first.
        tensor = stored.to(dtype=dtype or stored.dtype, copy=not self.loads_copies)
        if tensor.dtype != stored.dtype and not _all_finite(tensor):
            raise ArtifactError(
                f"The {where} has a value of magnitude {float(stored.abs().max()):.4g}, which "
                f"{_dtype_name(tensor.dtype)} cannot hold; use bfloat16 or float32."
            )
        return tensor


class MemoryReader(Reader):
    """Tensors that are already in memory; `file` is what messages call their origin."""

    def __init__(self, tensors: Mapping[str, Tensor], file: str) -> None:
        self._tensors = dict(tensors)
        self._file = file

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._load(name).shape)

    def file(self, name: str) -> str:
        return self._file

    def _load(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise absent(name, self._file)
        return self._tensors[name]


class FileReader(Reader):
    """The checkpoint in a folder: safetensors or `.bin`, single or sharded. Opened at once, read lazily."""

    def __init__(self, folder: Path) -> None:
        entry = entry_of(folder)
        file_of = locate(folder, entry)
        if file_of is None:
            self._files = {entry: open_file(folder / entry)}
            self._file_of = dict.fromkeys(self._files[entry].shapes, entry)
        else:
            self._files = {name: open_file(folder / name) for name in sorted(set(file_of.values()))}
            check_index(entry, file_of, self._files)
            self._file_of = file_of
        self._entry = entry
        self._stored = {name: name for name in self._file_of}

    def rename(self, stored: Mapping[str, str]) -> None:
        """Serve the tensors under other names: name asked for -> name now. Tensors left out are hidden."""
        self._stored = {name: self._stored[old] for name, old in stored.items()}

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._stored))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[self.file(name)].shapes[self._stored[name]]

    def file(self, name: str) -> str:
        if name not in self._stored:
            raise absent(name, self._entry)
        return self._file_of[self._stored[name]]

    def _load(self, name: str) -> Tensor:
        return self._files[self.file(name)].load(self._stored[name])


def use_model_names(reader: FileReader, architecture: Architecture, names: TensorNames) -> None:
    """Give a checkpoint the names of the causal LM, as transformers does when it loads one.

    Two layouts differ. A checkpoint of the base model lacks the prefix `model.` (old OPT files); one with
    tied embeddings may hold the shared matrix as `lm_head.weight`, alone or twice. Raises ArtifactError when
    the two copies differ: then the embeddings are not tied, whatever config.json has.
    """
    stored = {name: name for name in reader.names()}
    prefix = "model."
    if names.embed not in stored and names.embed.removeprefix(prefix) in stored:
        stored = {name if name == LM_HEAD else prefix + name: name for name in stored}
    if architecture.tied and LM_HEAD in stored:
        head = stored.pop(LM_HEAD)
        embed = stored.setdefault(names.embed, head)
        if embed != head and not torch.equal(reader.get(head), reader.get(embed)):
            raise ArtifactError(
                f"config.json says that the embeddings are tied, but {LM_HEAD} in {reader.file(head)} "
                f"differs from {names.embed}; set tie_word_embeddings to false in config.json to keep both."
            )
    reader.rename(stored)


def check_shapes(
    reader: WeightReader, architecture: Architecture, names: TensorNames, config: str = "config.json"
) -> None:
    """Raise ArtifactError unless the checkpoint holds exactly the model's tensors, each in its shape.

    A tensor that no part of the model reads is an error too: config.json is then not this checkpoint's
    (biases it does not mention, more layers), and the result would be another model. `config` is what messages call
    the place of the sizes.
    """
    expected = expected_shapes(architecture, names)
    present = set(reader.names())
    for name, shape in expected.items():
        if name not in present:
            raise ArtifactError(
                f"The checkpoint has no tensor {name!r}, which {config} calls for (shape {shape}); check "
                f"that all weight files are there and that {config} belongs to them."
            )
        if reader.shape(name) != shape:
            raise ArtifactError(
                f"The tensor {name!r} in {reader.file(name)} has shape {reader.shape(name)}, but {config} "
                f"calls for {shape}; it does not belong to these tensors."
            )
    unused = sorted(n for n in present - set(expected) if not n.endswith(_IGNORED_SUFFIXES))
    if unused:
        raise ArtifactError(
            f"The checkpoint has {len(unused)} tensors that the model of {config} does not use, such as "
            f"{unused[0]!r} in {reader.file(unused[0])}; it does not belong to these tensors."
        )


def _all_finite(tensor: Tensor) -> bool:
    """Both extremes are NaN when any value is: one pass, where `isfinite` makes a mask of the tensor's size."""
    return not tensor.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def absent(name: str, where: str) -> ArtifactError:
    """The error for a tensor that is not there."""
    return ArtifactError(f"The checkpoint ({where}) has no tensor {name!r}.")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
