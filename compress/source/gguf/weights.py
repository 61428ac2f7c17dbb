"""The weights of a GGUF file under Hugging Face names, de-quantised to float32 one tensor at a time."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.architecture import Architecture
from compress.errors import UsageError
from compress.lazy import require
from compress.source.families.base import TensorNames
from compress.source.gguf.header import GgufHeader, GgufTensor
from compress.source.gguf.rope import FREQUENCIES
from compress.source.readers import Reader, absent

_ROLES = {
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
# The frequencies are in the config; the second is a buffer of files from 2023.
_AT_ONCE = 1 << 18  # values; the intermediate arrays of de-quantisation then fit the cache
_NOT_READ = re.compile(rf"{re.escape(FREQUENCIES)}|blk\.\d+\.attn_rot_embd\.weight")


class GgufReader(Reader):
    """Tensors of a GGUF file, mapped; each `get` de-quantises its tensor anew, and no other is in memory."""

    loads_copies = True

    def __init__(self, header: GgufHeader, architecture: Architecture, names: TensorNames) -> None:
        """Raises UsageError for tensors that the model does not read, and for storage types that cannot be read."""
        self._header = header
        stored = _stored_names(architecture, names)
        unknown = sorted(
            name for name in header.tensors if name not in stored.values() and not _NOT_READ.fullmatch(name)
        )
        if unknown:
            raise UsageError(
                f"The GGUF file {header.path} has {len(unknown)} tensors that a {header.architecture} model has no use "
                f"for, such as {unknown[0]!r}: it is of another architecture than it says, and is not supported."
            )
        self._stored = {name: old for name, old in stored.items() if old in header.tensors}
        for old in self._stored.values():
            _check_readable(header, header.tensors[old])
        # Rows of q and k are stored in the order of llama.cpp's rotation, for the architecture `llama` alone.
        self._heads = {}
        if header.architecture == "llama":
            self._heads = {".attn_q.": architecture.num_heads, ".attn_k.": architecture.num_kv_heads}

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._stored))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._header.tensors[self._of(name)].shape

    def file(self, name: str) -> str:
        return self._header.path.name

    def _load(self, name: str) -> Tensor:
        stored = self._of(name)
        values = read_tensor(self._header, stored)
        for projection, heads in self._heads.items():
            if projection in stored:
                # (heads, half, 2, inputs) -> (heads, 2, half, inputs): llama.cpp rotates neighbours, transformers
                # feature i and i + half.
                shape = values.shape
                values = values.reshape(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(shape)
        return torch.from_numpy(np.ascontiguousarray(values))

    def _of(self, name: str) -> str:
        if name not in self._stored:
            raise absent(name, self._header.path.name)
        return self._stored[name]


def read_tensor(header: GgufHeader, name: str) -> npt.NDArray[np.float32]:
    """One tensor in float32, in memory of its own. Raises UsageError for a storage type that cannot be read."""
    tensor = header.tensors[name]
    gguf = _check_readable(header, tensor)
    kind = gguf.GGMLQuantizationType(tensor.kind)
    values = np.empty((math.prod(tensor.shape[:-1]), tensor.shape[-1]), np.float32)  # (rows, row)
    if values.size:
        data = np.memmap(header.path, np.uint8, "r", tensor.offset, (len(values), tensor.size // len(values)))
        stored = data.view(np.float32) if kind.name == "F32" else data
        step = max(1, _AT_ONCE // tensor.shape[-1])
        for row in range(0, len(values), step):
            values[row : row + step] = gguf.dequantize(stored[row : row + step], kind)
    return values.reshape(tensor.shape)


def _check_readable(header: GgufHeader, tensor: GgufTensor) -> Any:
    """The package gguf; UsageError when it has no way from the type of `tensor` to float32."""
    gguf = require("gguf", pip="'gguf>=0.17'", purpose="read GGUF files")
    kind = gguf.GGMLQuantizationType(tensor.kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8).view(np.float32 if kind.name == "F32" else np.uint8), kind)
    except NotImplementedError as error:
        raise UsageError(
            f"The tensor {tensor.name!r} in {header.path} is stored as {kind.name}, which cannot be turned into "
            "float32 here; convert the model to another type, such as Q8_0 or F16."
        ) from error
    version = header.metadata.get("general.quantization_version", 2)
    if block > 1 and version != 2:
        raise UsageError(
            f"The GGUF file {header.path} is quantised by version {version!r} of the formats, and version 2 is read; "
            "convert the model again with a recent llama.cpp."
        )
    return gguf


def _stored_names(architecture: Architecture, names: TensorNames) -> dict[str, str]:
    """Hugging Face name -> name in the file, for every tensor that the model can have."""

    def pair(parameter: Any, stored: str) -> dict[str, str]:
        return {
            name: f"{stored}.{suffix}"
            for name, suffix in ((parameter.weight, "weight"), (parameter.bias, "bias"))
            if name is not None
        }

    found = {names.embed: "token_embd.weight"} | pair(names.final_norm, "output_norm")
    if names.lm_head is not None:
        found[names.lm_head] = "output.weight"
    for i, layer in enumerate(names.layers):
        found |= pair(layer.attn_norm, f"blk.{i}.attn_norm") | pair(layer.mlp_norm, f"blk.{i}.ffn_norm")
        for role in architecture.linears():
            found |= pair(layer.linears[role], f"blk.{i}.{_ROLES[role]}")
        for norm, stored in ((layer.q_norm, "attn_q_norm"), (layer.k_norm, "attn_k_norm")):
            if norm is not None:
                found[norm] = f"blk.{i}.{stored}.weight"
    return found
