"""Facts that an exported ONNX file holds about itself: inputs, outputs, metadata, nodes. The one place that reads it.

From the file (`read_header`), whose weights stay where they are, or from a session of ONNX Runtime that has read it
already (`session_header`): both give the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ArtifactError

if TYPE_CHECKING:
    import onnx
    import onnxruntime

PREFIX = "procrustes."
"""Prefix of the metadata that the export writes, as JSON; others of any kind may stand beside it."""

CACHE = "past_key_values."
"""How the names of the cache's inputs begin."""

Axis = int | str
"""A size, or the name of one that varies; "" for one that varies and has no name."""

# As ONNX (onnx.TensorProto.DataType) and ONNX Runtime call them -> as everyone else does.
_TYPES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True)
class TensorHeader:
    """An input or output. `dtype` is "float32", "bfloat16", "int64" and so on."""

    name: str
    dtype: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Header:
    """Header of one file. `metadata` is what the export wrote, without `PREFIX`."""

    path: Path
    inputs: tuple[TensorHeader, ...]
    outputs: tuple[TensorHeader, ...]
    metadata: dict[str, Any]

    @property
    def axes(self) -> dict[str, tuple[Axis, ...]]:
        """Input -> its axes."""
        return {each.name: each.axes for each in self.inputs}

    @property
    def logits(self) -> TensorHeader:
        """(batch, sequence or 1, vocabulary). Raises ArtifactError where there are none."""
        for each in self.outputs:
            if each.name == "logits" and len(each.axes) == 3:
                return each
        raise ArtifactError(f"{self.path} has no output called logits with three axes; export the model again")

    @property
    def dtype(self) -> str:
        """Type of the logits, and so of the graph. Raises ArtifactError where there are none."""
        return self.logits.dtype

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the logits are over. Raises ArtifactError where the graph leaves it open."""
        size = self.logits.axes[2]
        if not isinstance(size, int):
            raise ArtifactError(f"{self.path} has logits of a vocabulary of no fixed size; export the model again")
        return size

    @property
    def caches(self) -> tuple[TensorHeader, ...]:
        """Inputs of (batch, heads, past, head size), keys and values of each layer. Raises ArtifactError where there
        are none: this is no decoder of ours."""
        found = tuple(each for each in self.inputs if each.name.startswith(CACHE) and len(each.axes) == 4)
        if not found:
            raise ArtifactError(f"{self.path} is not a decoder exported by this project: it has no {CACHE}*")
        return found

    @property
    def cache_sizes(self) -> tuple[int, int]:
        """(heads, head size) of the cache. Raises ArtifactError where the graph leaves them open."""
        _, heads, _, size = self.caches[0].axes
        if not isinstance(heads, int) or not isinstance(size, int):
            raise ArtifactError(f"{self.path} has a cache of no fixed number or size of heads; export the model again")
        return heads, size


def read_header(path: Path) -> Header:
    """The header of an ONNX file. Its weights are not read. Raises ArtifactError where it is missing or damaged."""
    return header_of(path, read_graph(path))


def read_graph(path: Path) -> onnx.ModelProto:
    """The whole model but for its weights. Raises ArtifactError where the file is missing or damaged."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(str(path), load_external_data=False)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist; run python -m export.build first") from error
    except DecodeError as error:
        raise ArtifactError(f"{path} is no ONNX file ({error}); export the model again") from error


def header_of(path: Path, model: onnx.ModelProto) -> Header:
    """Header of a model that `read_graph` has read from `path`."""
    import onnx

    def of(value: onnx.ValueInfoProto) -> TensorHeader:
        kind = value.type.tensor_type
        name = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
        axes = tuple(a.dim_value if a.HasField("dim_value") else a.dim_param for a in kind.shape.dim)
        return TensorHeader(value.name, _TYPES.get(name, name), axes)

    return Header(
        path,
        tuple(map(of, model.graph.input)),
        tuple(map(of, model.graph.output)),
        _ours(path, {each.key: each.value for each in model.metadata_props}),
    )


def session_header(path: Path, session: onnxruntime.InferenceSession) -> Header:
    """Header of the file that a session of ONNX Runtime has loaded, without the onnx package."""

    def of(value: Any) -> TensorHeader:
        name = value.type.removeprefix("tensor(").removesuffix(")")
        return TensorHeader(value.name, _TYPES.get(name, name), tuple("" if a is None else a for a in value.shape))

    return Header(
        path,
        tuple(map(of, session.get_inputs())),
        tuple(map(of, session.get_outputs())),
        _ours(path, session.get_modelmeta().custom_metadata_map),
    )


def _ours(path: Path, values: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith(PREFIX):
            try:
                found[key.removeprefix(PREFIX)] = json.loads(value)
            except ValueError as error:
                raise ArtifactError(
                    f"{path} has {key} = {value!r:.100} in its metadata, which is no JSON; export the model again"
                ) from error
    return found
