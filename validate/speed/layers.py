"""One layer at a time: each structure over dense in ONNX Runtime, at the shapes of large models.

The graphs are made of the real op function bodies (export/graph/ops), one layer each, float32. Weights come from
memory, as in a model: each side has as many copies of its layer, run in turn, as fill `WORKING_SET` bytes,
which is more than a cache holds. Nothing here depends on the weights' values; they are random.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.progress import log
from validate.report.markdown import markdown_table, with_table
from validate.speed.timing import Paired, paired

if TYPE_CHECKING:
    import onnx

    from compress.structures import Structure

WORKING_SET = 256 << 20
KEPT = 0.75
TOKENS = (1, 8, 64, 512)
UNIT = 64
STRUCTURES = ("kron (explicit mix)", "kron (leading)", "gs")


@dataclass(frozen=True)
class Shape:
    """A projection of a model; `side` says on which side the residual stream lies."""

    model: str
    roles: str
    in_features: int
    out_features: int
    side: str


SHAPES = (
    Shape("opt-13b", "q, k, v", 5120, 5120, "in"),
    Shape("opt-13b", "fc1", 5120, 20480, "in"),
    Shape("opt-13b", "fc2", 20480, 5120, "out"),
    Shape("llama-2-7b", "q, k, v", 4096, 4096, "in"),
    Shape("llama-2-7b", "gate, up", 4096, 11008, "in"),
    Shape("llama-2-7b", "down", 11008, 4096, "out"),
)


@dataclass(frozen=True)
class Row:
    """One cell of the table: `timing` is dense over structure."""

    shape: Shape
    structure: str
    config: dict[str, Any]
    kept: float
    macs_kept: float
    tokens: int
    timing: Paired

    def to_dict(self) -> dict[str, Any]:
        """For json."""
        return {
            "model": self.shape.model,
            "roles": self.shape.roles,
            "in_features": self.shape.in_features,
            "out_features": self.shape.out_features,
            "structure": self.structure,
            "config": self.config,
            "kept": self.kept,
            "macs_kept": self.macs_kept,
            "tokens": self.tokens,
            **self.timing.to_dict(),
        }


def known() -> tuple[str, ...]:
    """What can be measured: `STRUCTURES`, and every other structure that is a layer by itself."""
    from compress.structures import registry

    return (*STRUCTURES, *(name for name in registry() if name not in ("kron", "gs", "dense", "select")))


def choose(name: str, shape: Shape, kept: float = KEPT) -> Structure:
    """The structure of that name at `kept` of the layer's weights, chosen as the compressor chooses it.

    Raises UsageError for a name that is not `known`.
    """
    from compress.structures import KroneckerStructure, registry

    if name not in known():
        raise UsageError(f"the layer benchmark does not know {name!r}; it has {', '.join(known())}")
    n, m = shape.out_features, shape.in_features
    side: Any = shape.side
    if not name.startswith("kron"):
        return registry()[name].for_ratio(m, n, side, kept, UNIT)
    mix: Any = "leading" if "leading" in name else "explicit"
    return KroneckerStructure.for_ratio(m, n, side, kept, UNIT, mix=mix)


def layer_model(structure: Structure, seed: int = 0) -> onnx.ModelProto:
    """x (tokens, in) -> y (tokens, out): one layer, random weights, no bias, as the exporter lowers it.

    Raises UsageError for a selection: what lies between its kept features is a layer of its own.
    """
    import torch
    from onnx import TensorProto, helper, numpy_helper

    from export.graph.ops import DOMAIN, DOMAIN_VERSION, OPSET, graph_factors, lower, op
    from export.graph.writer import IR_VERSION

    weights = graph_factors(structure, structure.random_factors(torch.Generator().manual_seed(seed)))
    nodes, functions, value = [], {}, "x"
    calls = lower(structure, bias=False)
    if any(call.constants for call in calls):
        raise UsageError(f"a {structure.name} structure is measured by what lies between its kept features")
    for i, call in enumerate(calls):
        result = "y" if i == len(calls) - 1 else f"inner_{i}"
        attributes: dict[str, Any] = dict(call.attributes)
        nodes.append(helper.make_node(call.op_type, [value, *call.factors], [result], domain=call.domain, **attributes))
        if call.domain == DOMAIN:
            functions[call.op_type] = op(call.op_type).function()
        value = result
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", structure.in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", structure.out_features])],
        [numpy_helper.from_array(weight.numpy(), name) for name, weight in weights.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opsets, functions=list(functions.values()))


class Copies:
    """Sessions over the same layer, each with weights of its own, run in turn."""

    def __init__(self, structure: Structure, threads: int = 1, working_set: int = WORKING_SET) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Weights are packed once for the kernel, as in a real session.
        made = layer_model(structure)
        size = sum(4 * math.prod(weight.dims) for weight in made.graph.initializer)
        model = made.SerializeToString()
        self.structure = structure
        self.sessions = [
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            for _ in range(max(1, math.ceil(working_set / size)))
        ]

    def runner(self, tokens: int) -> Callable[[], object]:
        """A function that runs the next copy; input and output are allocated once."""
        import numpy as np
        import onnxruntime

        x = np.random.default_rng(1).standard_normal((tokens, self.structure.in_features), np.float32)
        y = np.empty((tokens, self.structure.out_features), np.float32)
        source, target = (onnxruntime.OrtValue.ortvalue_from_numpy(v) for v in (x, y))
        bound = []
        for session in self.sessions:
            binding = session.io_binding()
            binding.bind_ortvalue_input("x", source)
            binding.bind_ortvalue_output("y", target)
            bound.append((session, binding, source, target))  # a binding does not keep its arrays alive
        turn = itertools.cycle(bound)

        def run() -> None:
            session, binding, *_ = next(turn)
            session.run_with_iobinding(binding)

        return run


def benchmark(
    shapes: Sequence[Shape] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    structures: Sequence[str] = STRUCTURES,
    *,
    kept: float = KEPT,
    threads: int = 1,
    seconds: float = 2.0,
    working_set: int = WORKING_SET,
) -> Iterator[Row]:
    """Measure every combination; at most two layers' copies are in memory at a time."""
    from compress.structures import DenseStructure

    for shape in shapes:
        dense = Copies(DenseStructure(shape.in_features, shape.out_features), threads, working_set)
        for name in structures:
            structure = choose(name, shape, kept)
            copies = Copies(structure, threads, working_set)
            full = shape.in_features * shape.out_features
            for count in tokens:
                warm_up = max(len(dense.sessions), len(copies.sessions))
                timing = paired(
                    dense.runner(count),
                    copies.runner(count),
                    seconds=seconds,
                    warm_up=warm_up,
                    one_thread=threads == 1,
                )
                log(f"{shape.model} {shape.roles} {name} {count} tokens: {timing.ratio.median:.3f}")
                yield Row(
                    shape,
                    name,
                    structure.to_config(),
                    structure.parameter_count() / full,
                    structure.macs(count) / (count * full),
                    count,
                    timing,
                )


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each layer and structure, a column for each number of tokens."""
    counts = sorted({row.tokens for row in rows})
    groups: dict[tuple[Shape, str], dict[int, Row]] = {}
    for row in rows:
        groups.setdefault((row.shape, row.structure), {})[row.tokens] = row
    lines = []
    for (shape, _), cells in groups.items():
        one = next(iter(cells.values()))
        layer = f"{shape.roles} ({shape.in_features} -> {shape.out_features})"
        figures = (f"{cells[c].timing.ratio.median:.2f}" if c in cells else "" for c in counts)
        lines.append((shape.model, layer, sizes(one.config), f"{one.kept:.3f}", f"{1 / one.macs_kept:.2f}", *figures))
    header = ("model", "layer (in -> out)", "structure", "kept", "limit", *(f"{c} tokens" for c in counts))
    return markdown_table(header, lines)


def sizes(config: dict[str, Any]) -> str:
    """`kron 3/4 leading`, `gs 4x2 rank 320`, `lowrank 128`."""
    name = config["structure"]
    if name == "kron":
        return f"kron {config['terms']}/{config['blocks']} {config['mix']}"
    if name == "gs":
        return f"gs {config['left_blocks']}x{config['right_blocks']} rank {config['rank']}"
    if "atoms" in config:
        return f"{name} {config['kept']} of {config['atoms']}"
    return f"{name} {config['rank']}" if "rank" in config else str(name)


MARK = "layers"


def beginning(file: Path) -> str:
    """First lines of a new document."""
    shown = file.name if file.is_absolute() else file.as_posix()
    return f"# Speed\n\nPrinted by `python -m validate.speed --layers --write-docs {shown}`.\n\n"


def document(rows: Sequence[Row], file: Path, threads: int) -> str:
    """The text of `file` with the table between its marks. Raises as `markdown.surroundings`."""
    from validate.report.machine import machine_facts

    facts = machine_facts()
    ratios = [row.timing.ratio.median for row in rows]
    lines = [
        f"Time of dense over time of the structure, float32, {threads} thread(s), {rows[0].timing.clock}, medians of",
        f"pairwise ratios. Smallest {min(ratios):.2f}, median {statistics.median(ratios):.2f}. `limit` is what the",
        f"multiply-accumulates allow. {facts['processor']}, onnxruntime {facts['versions']['onnxruntime']}.",
        "",
        table(rows),
    ]
    return with_table(file, MARK, beginning(file), "\n".join(lines))
