"""Writes an ONNX graph node by node; weights are streamed to external data, functions collected on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from export.graph.external import ONNX_TYPES, ExternalData
from export.graph.ops import DOMAIN, DOMAIN_VERSION, OPSET, Call, op

IR_VERSION = 11
Axes = Sequence[int | str]


@dataclass(frozen=True)
class Weight:
    """A tensor yet to be written: its shape, and its rows in one or more parts that are read when written."""

    name: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]
    dtype: torch.dtype | None = None  # None: that of the graph


class GraphWriter:
    """Values are names. Nodes and the values they make are named after the innermost `scope`."""

    def __init__(self, data: ExternalData, dtype: torch.dtype) -> None:
        self.data, self.dtype = data, dtype
        self.counts: Counter[str] = Counter()
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._functions: dict[str, onnx.FunctionProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._scope = ""
        self._used: set[str] = set()

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Name what is made inside `name/...`."""
        before, self._scope = self._scope, f"{self._scope}{name}/"
        yield
        self._scope = before

    def input(self, name: str, axes: Axes, dtype: torch.dtype | None = None) -> str:
        """A graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, ONNX_TYPES[dtype or self.dtype], list(axes)))
        return name

    def output(self, name: str, axes: Axes) -> None:
        """Declare the value `name` a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, ONNX_TYPES[self.dtype], list(axes)))

    def ops(
        self, op_type: str, *inputs: str, outputs: int, domain: str = "", name: str = "", **attributes: Any
    ) -> list[str]:
        """A node with several outputs."""
        node_name = self._unique(self._scope + (name or op_type))
        made = [node_name if outputs == 1 else f"{node_name}.{i}" for i in range(outputs)]
        self._append(op_type, inputs, made, node_name, domain, attributes)
        return made

    def op(self, op_type: str, *inputs: str, result: str | None = None, domain: str = "", **attributes: Any) -> str:
        """A node with one output, called `result` where that is given."""
        if result is None:
            return self.ops(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]
        self._append(op_type, inputs, [result], self._unique(self._scope + op_type), domain, attributes)
        return result

    def once(self, name: str, op_type: str, *inputs: str, **attributes: Any) -> str:
        """A node made at the first call with `name`, outside every scope; later calls return its value."""
        if name not in self._used:
            self._used.add(name)
            self._append(op_type, inputs, [name], name, "", attributes)
        return name

    def call(self, call: Call, x: str, weights: Sequence[str], result: str | None = None) -> str:
        """A node of a lowered structure; the function of a `procrustes` op is attached to the model."""
        if call.domain == DOMAIN and call.op_type not in self._functions:
            self._functions[call.op_type] = op(call.op_type).function()
        constants = [self.ints(*values) for values in call.constants]
        return self.op(call.op_type, x, *constants, *weights, result=result, domain=call.domain, **call.attributes)

    def weight(self, weight: Weight) -> str:
        """An initializer, written once: a second weight of that name is taken for the same."""
        name, dtype = weight.name, weight.dtype or self.dtype
        if name not in self._initializers:
            self._initializers[name] = self.data.add(name, weight.shape, dtype, weight.parts())
        return name

    def ints(self, *values: int) -> str:
        """An int64 vector, shared by all who ask for the same values."""
        return self._small("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def scalar(self, value: int) -> str:
        """An int64 scalar, shared."""
        return self._small(f"int_{value}", np.array(value, np.int64))

    def model(self, name: str, metadata: dict[str, str]) -> onnx.ModelProto:
        """The whole model."""
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, list(self._initializers.values()))
        domains = [helper.make_opsetid("", OPSET)]
        if self._functions:
            domains.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
        model = helper.make_model(
            graph,
            opset_imports=domains,
            functions=list(self._functions.values()),
            ir_version=IR_VERSION,
            producer_name="procrustes-llm",
        )
        helper.set_model_props(model, metadata)
        return model

    def _small(self, name: str, value: npt.NDArray[np.int64]) -> str:
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(value, name)
        return name

    def _append(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: list[str],
        name: str,
        domain: str,
        attributes: dict[str, Any],
    ) -> None:
        self._nodes.append(helper.make_node(op_type, list(inputs), outputs, name=name, domain=domain, **attributes))
        self.counts[op_type] += 1

    def _unique(self, name: str) -> str:
        candidate, number = name, 1
        while candidate in self._used:
            number += 1
            candidate = f"{name}_{number}"
        self._used.add(candidate)
        return candidate
