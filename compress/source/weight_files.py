"""Opening weight files: safetensors and `.bin`, single and sharded with an index.

safetensors files are mapped, so a 66b model costs one tensor of memory at a time. `.bin` files are pickles:
they are opened with `torch.load(weights_only=True, mmap=True)` and nothing else, which runs no code from the
file. That is the call transformers itself makes; going through transformers instead would build the whole
model in memory and be no safer.

A checkpoint is untrusted input. Whatever does not add up is an ArtifactError (exit 5) that names the file.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.artifact import reading
from compress.artifact.reading import fault_of, reason, refuse_pointer, shown
from compress.errors import ArtifactError

# What transformers looks for, in its order: the first that exists is the checkpoint.
ENTRIES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


# What torch's restricted unpickler and its storages let through on a damaged file: it does what the bytes demand.
_UNPICKLING = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    struct.error,
    zipfile.BadZipFile,
)


class WeightFile(Protocol):
    """One open file: shapes by tensor name, and the tensors, which may share the file's mapping."""

    shapes: dict[str, tuple[int, ...]]

    def load(self, name: str) -> Tensor:
        """A tensor of `shapes`."""
        ...


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._path = path
        try:
            handle: Any = safe_open(str(path), framework="pt", device="cpu")
            self.shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in sorted(handle.keys())}
            self._handle = handle
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error

    def load(self, name: str) -> Tensor:
        from safetensors import SafetensorError

        try:
            tensor: Tensor = self._handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(self._path, error) from error
        return tensor


class _PickleFile:
    def __init__(self, path: Path) -> None:
        try:
            # Files from before torch 1.6 are not zip archives and cannot be mapped.
            mapped = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise ArtifactError(
                f"The weight file {path} is damaged or holds something other than tensors; nothing in it was "
                "executed. Get the model's safetensors files instead."
            ) from error
        except _UNPICKLING as error:
            raise _damaged(path, error) from error
        if not isinstance(content, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
        ):
            raise ArtifactError(f"The weight file {path} is not a dictionary of tensors by name.")
        for name, tensor in content.items():
            if (fault := _tensor_fault(tensor)) is not None:
                raise ArtifactError(
                    f"The weight file {path} holds the tensor {shown(name)}, which {fault}; get the model's "
                    "safetensors files instead."
                )
        self._tensors: dict[str, Tensor] = content
        self.shapes = {name: tuple(tensor.shape) for name, tensor in content.items()}

    def load(self, name: str) -> Tensor:
        return self._tensors[name]


def _tensor_fault(tensor: Tensor) -> str | None:
    """Why a tensor of a pickle is no plain array of numbers that the file itself holds; None when it is one."""
    if tensor.layout is not torch.strided:
        return f"is stored as {str(tensor.layout).removeprefix('torch.')}"
    if tensor.device.type != "cpu":
        return f"is on the device {str(tensor.device)!r} and has no values"
    if tensor.is_quantized or tensor.is_nested or type(tensor) not in (Tensor, torch.nn.Parameter):
        return "is quantised or of a class of its own"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"has the shape {tuple(tensor.shape)}, more numbers than the file holds for it"
    return None


def entry_of(folder: Path) -> str:
    """The file of `ENTRIES` that stands for the checkpoint in `folder`; ArtifactError when there is none."""
    for entry in ENTRIES:
        if os.path.lexists(folder / entry):
            if (fault := fault_of(folder / entry)) is not None:
                raise ArtifactError(f"The weight file {folder / entry} {fault}; download the model again.")
            return entry
    raise ArtifactError(
        f"The folder {folder} has no weights: one of {', '.join(ENTRIES)} is needed. If a download was "
        "interrupted, run it again."
    )


def weight_files(folder: Path) -> tuple[str, ...]:
    """Names of the weight files of the checkpoint in `folder`, not opened; ArtifactError when one is missing."""
    entry = entry_of(folder)
    file_of = locate(folder, entry)
    if file_of is None:
        return (entry,)
    files = tuple(sorted(set(file_of.values())))
    for file in files:
        _check_shard(folder / file)
    return files


def locate(folder: Path, entry: str) -> dict[str, str] | None:
    """Tensor name -> file name for an index; None when `entry` is itself the one weight file."""
    return _read_index(folder / entry) if entry.endswith(".index.json") else None


def open_file(path: Path) -> WeightFile:
    """Open one weight file; ArtifactError when it is missing or damaged."""
    _check_shard(path)
    refuse_pointer(path)
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _PickleFile(path)


def _check_shard(path: Path) -> None:
    if (fault := fault_of(path)) is not None:
        raise ArtifactError(
            f"The weight file {path} {fault}, but the index beside it lists it; download the model again."
        )


def check_index(entry: str, file_of: Mapping[str, str], files: Mapping[str, WeightFile]) -> None:
    """Raise ArtifactError unless the files hold the tensors of the index, each once and in the file that it names."""
    advice = "the files are of different versions: download the model again."
    for name, file in file_of.items():
        if name not in files[file].shapes:
            raise ArtifactError(
                f"The index {entry} places the tensor {name!r} in {file}, which does not hold it; {advice}"
            )
    for file, weights in files.items():
        for name in weights.shapes:
            if file_of.get(name) != file:
                said = f"places it in {file_of[name]}" if name in file_of else "does not list it"
                raise ArtifactError(
                    f"The file {file} holds the tensor {name!r}, but the index {entry} {said}; {advice}"
                )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object and no key twice; ArtifactError otherwise."""
    if fault_of(path) is None:
        refuse_pointer(path)
    try:
        content = reading.read_json(path)
    except reading.RefusedError as error:
        raise ArtifactError(f"The file {path} {error}; download it again.") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"The file {path} is not a JSON object but {shown(content)}; download it again.")
    return content


def _read_index(path: Path) -> dict[str, str]:
    """The weight map of a sharded checkpoint, every file a plain name in the same folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"The index {path} has no weight_map; download the model again.")
    suffix = ".safetensors" if "safetensors" in path.name else ".bin"
    for name, file in weight_map.items():
        # A separator, a drive or ".." would lead out of the folder, on this system or on another.
        plain = isinstance(file, str) and file == PurePosixPath(file).name == PureWindowsPath(file).name
        if not plain or not file.endswith(suffix):
            raise ArtifactError(
                f"The index {path} places the tensor {name!r} in {shown(file)}, which is not the name of a "
                f"{suffix} file in the same folder; the checkpoint is forged or damaged: do not use it."
            )
    return weight_map


def _damaged(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"The weight file {path} cannot be read ({reason(error)}); it is truncated or damaged: download it again."
    )
