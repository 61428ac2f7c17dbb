"""config.pbtxt of both models in protobuf's text format: of the text model, and of the network from its ONNX graph.

As text and not by message types: those come with tritonclient, whose protobuf is older than that of onnx. The tests
parse every variant with tritonclient's types in the environment of the server, where a misspelt field is an error.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from compress.errors import UsageError
from export.graph.decoder import MODEL_NAME
from export.graph.header import TensorHeader, read_header
from export.runtime.profiles import DECODE, PREFILL
from export.tensorrt.options import PLAN

Backend = Literal["python", "onnxruntime", "tensorrt"]
Network = Literal["python", "onnxruntime", "tensorrt", "none"]

INPUTS = (
    ("text_input", "TYPE_STRING", 1),
    ("messages", "TYPE_STRING", 1),
    ("stream", "TYPE_BOOL", 1),
    ("max_tokens", "TYPE_INT32", 1),
    ("min_tokens", "TYPE_INT32", 1),
    ("temperature", "TYPE_FP32", 1),
    ("top_k", "TYPE_INT32", 1),
    ("top_p", "TYPE_FP32", 1),
    ("repetition_penalty", "TYPE_FP32", 1),
    ("frequency_penalty", "TYPE_FP32", 1),
    ("presence_penalty", "TYPE_FP32", 1),
    ("seed", "TYPE_UINT64", 1),
    ("stop", "TYPE_STRING", -1),
    ("stop_words", "TYPE_STRING", -1),
    ("logprobs", "TYPE_INT32", 1),
    ("exclude_input_in_output", "TYPE_BOOL", 1),
    ("return_num_input_tokens", "TYPE_BOOL", 1),
    ("return_num_output_tokens", "TYPE_BOOL", 1),
    ("health", "TYPE_BOOL", 1),
)
"""All optional. `return_...` and `stop_words` are what Triton's OpenAI front end sends; counts always come back.
`health` is what probe.py sends in place of all others: the answer is `ready`, or an error."""
OUTPUTS = (
    ("text_output", "TYPE_STRING", 1),
    ("tokens", "TYPE_INT32", -1),
    ("logprobs_output", "TYPE_FP32", -1),
    ("top_logprobs", "TYPE_STRING", 1),
    ("finish_reason", "TYPE_STRING", 1),
    ("num_input_tokens", "TYPE_INT32", 1),
    ("num_output_tokens", "TYPE_INT32", 1),
)
WARMUP: dict[str, tuple[str, bytes]] = {
    "text_input": ("TYPE_STRING", struct.pack("<I", 5) + b"Hello"),
    "max_tokens": ("TYPE_INT32", struct.pack("<i", 2)),
}
"""The request that Triton makes before it calls the model ready: input -> type, and content of its file in warmup/."""

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "int64": "TYPE_INT64"}


@dataclass(frozen=True)
class Tensor:
    """An input or output of an exported graph, as Triton calls it; -1 in `dims` for a size that varies."""

    name: str
    kind: str
    dims: tuple[int, ...]


def text_config(name: str, engine: str, parameters: dict[str, str]) -> str:
    """config.pbtxt of the model that takes text. A batch of one: what Triton's OpenAI front end sends has that axis.
    Requests are batched by the model itself, where sequences of unlike length can come and go."""
    lines = [f"name: {json.dumps(name)}", 'backend: "python"', "max_batch_size: 1"]
    lines.append("model_transaction_policy { decoupled: true }")
    lines += [_tensor("input", Tensor(n, kind, (size,)), optional=True) for n, kind, size in INPUTS]
    lines += [_tensor("output", Tensor(n, kind, (size,))) for n, kind, size in OUTPUTS]
    lines += [_instances(engine == "trt"), *map(_parameter, parameters.items())]
    samples = " ".join(
        f'inputs {{ key: "{key}" value {{ data_type: {kind} dims: [ 1 ] input_data_file: "{key}" }} }}'
        for key, (kind, _) in WARMUP.items()
    )
    lines.append(f'model_warmup [ {{ name: "first words" batch_size: 1 {samples} }} ]')
    return "\n".join(lines) + "\n"


def network_config(
    name: str, backend: Backend, tensors: tuple[Sequence[Tensor], Sequence[Tensor]], parameters: dict[str, str]
) -> str:
    """config.pbtxt of the network by itself, from the inputs and outputs of its graph (`graph_tensors`): tokens, mask,
    positions and cache in, logits and cache out. The batch is an axis like any other, for Triton batches no caches."""
    inputs, outputs = tensors
    lines = [f"name: {json.dumps(name)}", f"backend: {json.dumps(backend)}", "max_batch_size: 0"]
    if backend == "tensorrt":
        lines += ['platform: "tensorrt_plan"', f"default_model_filename: {json.dumps(PLAN)}"]
    elif backend == "onnxruntime":
        lines += ['platform: "onnxruntime_onnx"', f"default_model_filename: {json.dumps(MODEL_NAME)}"]
    lines += [*(_tensor("input", tensor) for tensor in inputs), *(_tensor("output", tensor) for tensor in outputs)]
    lines.append(_instances(backend == "tensorrt", (PREFILL, DECODE) if backend == "tensorrt" else ()))
    lines += map(_parameter, parameters.items())
    return "\n".join(lines) + "\n"


def graph_tensors(onnx: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of an ONNX file; its weights are not read. Raises UsageError for a type that
    Triton does not have."""
    header = read_header(onnx)
    return [_of(value) for value in header.inputs], [_of(value) for value in header.outputs]


def _of(value: TensorHeader) -> Tensor:
    if value.dtype not in _TYPES:
        raise UsageError(
            f"{value.name} is of type {value.dtype}, which a model in Triton cannot have; export with another --dtype, "
            "or with --serve-network none"
        )
    dims = tuple(axis if isinstance(axis, int) else -1 for axis in value.axes)
    return Tensor(value.name, _TYPES[value.dtype], dims)


def _tensor(field: str, tensor: Tensor, *, optional: bool = False) -> str:
    dims, rest = ", ".join(map(str, tensor.dims)), " optional: true" if optional else ""
    return f"{field} [ {{ name: {json.dumps(tensor.name)} data_type: {tensor.kind} dims: [ {dims} ]{rest} }} ]"


def _instances(gpu: bool, profiles: Sequence[int] = ()) -> str:
    """One instance: it has all the requests, and the weights once. profiles: of a TensorRT engine, to choose from."""
    chosen = f" profile: [ {', '.join(json.dumps(str(p)) for p in profiles)} ]" if profiles else ""
    return f"instance_group [ {{ count: 1 kind: {'KIND_GPU' if gpu else 'KIND_CPU'}{chosen} }} ]"


def _parameter(item: tuple[str, str]) -> str:
    key, value = item
    return f"parameters [ {{ key: {json.dumps(key)} value: {{ string_value: {json.dumps(value)} }} }} ]"
