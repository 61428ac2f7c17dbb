"""External data: tensors go to one file beside model.onnx, one at a time: memory stays near one tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import onnx
import torch
from torch import Tensor

from compress.errors import ArtifactError

DATA_NAME = "model.onnx.data"
INLINE_BELOW = 1024
"""Bytes. Smaller tensors stay inside model.onnx: shape constants must, the rest would each waste a page."""

_ALIGNMENT = 4096  # a memory page: ONNX Runtime maps the file
_CHUNK = 16 << 20  # elements converted at once

ONNX_TYPES: dict[torch.dtype, int] = {
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int32: onnx.TensorProto.INT32,
    torch.int64: onnx.TensorProto.INT64,
}


class ExternalData:
    """Writes DATA_NAME in `folder`, as a context manager. `bytes_written` counts inline tensors too."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / DATA_NAME
        self.bytes_written = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> ExternalData:
        self._file = open(self.path, "wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, parts: Iterable[Tensor]) -> onnx.TensorProto:
        """A tensor of `shape` and `dtype` whose rows are those of `parts`, one after the other.

        Parts are read one at a time. Raises ArtifactError for values that are not finite, or not so in `dtype`.
        """
        assert self._file is not None
        tensor = onnx.TensorProto(name=name, dims=shape, data_type=ONNX_TYPES[dtype])
        size = dtype.itemsize
        for length in shape:
            size *= length
        if size < INLINE_BELOW:
            tensor.raw_data = b"".join(raw for part in parts for raw in _raw_chunks(name, part, dtype))
            written = len(tensor.raw_data)
        else:
            offset = -(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT
            self._file.write(b"\0" * (offset - self._file.tell()))
            for part in parts:
                for raw in _raw_chunks(name, part, dtype):
                    self._file.write(raw)
            written = self._file.tell() - offset
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", DATA_NAME), ("offset", offset), ("length", size)):
                tensor.external_data.add(key=key, value=str(value))
        if written != size:
            raise ArtifactError(
                f"{name} has {written} bytes where its shape {shape} needs {size}; compress the model again"
            )
        self.bytes_written += size
        return tensor


def _raw_chunks(name: str, tensor: Tensor, dtype: torch.dtype) -> Iterable[bytes | memoryview]:
    flat = tensor.detach().contiguous().view(-1)
    for start in range(0, len(flat), _CHUNK):
        source = flat[start : start + _CHUNK]
        chunk = source.to(dtype)
        if dtype.is_floating_point and not torch.isfinite(chunk).all():
            if torch.isfinite(source).all():
                largest = source.abs().max().item()
                raise ArtifactError(
                    f"{name} has a value of {largest:.3g}, beyond {dtype}; export with --dtype bfloat16 or float32"
                )
            raise ArtifactError(f"{name} has NaN or infinite values; compress the model again")
        yield chunk.view(torch.uint8).numpy().data
