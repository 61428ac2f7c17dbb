"""What every family of ops is made of: an op with its body, a node, the registry by structure, and the lowering."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper
from torch import Tensor

from compress.errors import ArtifactError
from compress.structures import Structure, core_of

DOMAIN = "procrustes"
DOMAIN_VERSION = 1
OPSET = 23
"""Opset of graphs and bodies: the first with Attention, RMSNormalization, RotaryEmbedding. 24 measures alike."""

PLUGIN_VERSION = "1"
BIAS_SUFFIX = "Bias"
PLUGIN_ATTRIBUTES = ("plugin_version", "plugin_namespace")
SIZES = ("in_features", "out_features")

Attribute = int | str | list[int]
Attributes = dict[str, Attribute]
Array = npt.NDArray[np.float64]
Arrays = Mapping[str, Array]


class Body:
    """Writes the nodes of one function, in order. Every method returns the name of the value it makes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def op(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """One standard node."""
        output = output or f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        return output

    def split(self, x: str, pieces: int, axis: int) -> list[str]:
        """`pieces` equal parts of x along `axis`."""
        outputs = [f"split_{len(self.nodes)}_{i}" for i in range(pieces)]
        self.nodes.append(helper.make_node("Split", [x], outputs, axis=axis, num_outputs=pieces))
        return outputs

    def ints(self, values: list[int]) -> str:
        """A constant int64 vector."""
        output = f"constant_{len(self.nodes)}"
        self.nodes.append(helper.make_node("Constant", [], [output], value_ints=values))
        return output

    def attribute(self, name: str) -> str:
        """The int64 vector that the calling node gives as attribute `name`."""
        node = helper.make_node("Constant", [], [f"{name}_{len(self.nodes)}"])
        reference = onnx.AttributeProto()
        reference.name, reference.ref_attr_name, reference.type = "value_ints", name, onnx.AttributeProto.INTS
        node.attribute.append(reference)
        self.nodes.append(node)
        return str(node.output[0])

    def gemm(self, x: str, weight: str, *bias: str, output: str | None = None) -> str:
        """x @ weight.T (+ bias)."""
        return self.op("Gemm", x, weight, *bias, output=output, transB=1)


Writer = Callable[[Body, tuple[str, ...]], None]
"""Writes the body that leaves its result in "y"; the tuple is ("bias",) or ()."""


@dataclass(frozen=True)
class Op:
    """One op_type. `attributes` are those beyond PLUGIN_ATTRIBUTES; `dense` is its matrix, independently.

    `plugin`: the attributes that its TensorRT plugin reads (trt_plugins/csrc/ops), None where it has no plugin and the
    body runs. `types`: the inputs that are not of the type of x, in numpy's words.
    """

    op_type: str
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    write: Writer
    dense: Callable[[Arrays, Attributes], Array]
    plugin: tuple[str, ...] | None = None
    types: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_bias(self) -> bool:
        """True if the last input is a bias."""
        return self.inputs[-1] == "bias"

    def reference(self, inputs: Arrays, attributes: Attributes) -> Array:
        """y (tokens, out_features) in float64, through the dense matrix. inputs: by name, as `self.inputs`."""
        wide = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
        y = wide["x"] @ self.dense(wide, attributes).T
        return np.asarray(y + wide["bias"] if self.has_bias else y)

    def function(self) -> onnx.FunctionProto:
        """The model-local function."""
        body = Body()
        self.write(body, ("bias",) if self.has_bias else ())
        return helper.make_function(
            DOMAIN,
            self.op_type,
            list(self.inputs),
            ["y"],
            body.nodes,
            [helper.make_opsetid("", OPSET)],
            [*self.attributes, *PLUGIN_ATTRIBUTES],
        )


@dataclass(frozen=True)
class Call:
    """One node. Its first input is the activation, then come constants (int64 vectors) and the named factors ("bias"
    for the bias)."""

    op_type: str
    domain: str
    factors: tuple[str, ...]
    attributes: Attributes = field(default_factory=dict)
    constants: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Derived:
    """A factor that a graph holds in another form than a checkpoint: `make` makes it, of `shape`, of the stored factors
    `sources`."""

    sources: tuple[str, ...]
    shape: Callable[[Any], tuple[int, ...]]
    make: Callable[[Any, Mapping[str, Tensor]], Tensor]


def _never(one: Any, other: Any) -> bool:
    return False


def _none(op_type: str) -> Op | None:
    return None


@dataclass(frozen=True)
class Family:
    """What a graph knows of one structure. Functions take that structure, which is why it is Any here.

    lower: (structure, has a bias) -> its nodes, each of which feeds the next.
    ops: the ops of the family without "Bias"; a family of ops whose names are generated has `named` as well: an op by
        its name without "Bias", or None.
    derived: factors of the nodes that are stored otherwise.
    stacks: whether two linears that read one input may become one node with the rows of both, provided that their
        factors `compared` are equal. `once`: the factors of which such a node has those of its first linear alone.
    """

    lower: Callable[[Any, bool], tuple[Call, ...]]
    ops: tuple[Op, ...] = ()
    named: Callable[[str], Op | None] = _none
    derived: Mapping[str, Derived] = field(default_factory=dict)
    stacks: Callable[[Any, Any], bool] = _never
    compared: tuple[str, ...] = ()
    once: tuple[str, ...] = ()

    def find(self, op_type: str) -> Op | None:
        """The op of that name, without "Bias"."""
        return next((known for known in self.ops if known.op_type == op_type), None) or self.named(op_type)


_FAMILIES: dict[str, Family] = {}


def register(structure: str, family: Family) -> Family:
    """Make the family of a structure known under the structure's `name`."""
    if structure in _FAMILIES:
        raise ValueError(f"two families of ops are those of structure {structure!r}")
    _FAMILIES[structure] = family
    return family


def families() -> dict[str, Family]:
    """Name of a structure -> its family. Imports the modules of this package, so a new file is all it takes."""
    package = import_module("export.graph.ops")
    for module in iter_modules(package.__path__, package.__name__ + "."):
        import_module(module.name)
    return dict(sorted(_FAMILIES.items()))


def family_of(structure: Structure) -> Family:
    """The family of a structure; raises ArtifactError for one that this version cannot export."""
    known = families()
    if structure.name not in known:
        raise ArtifactError(f"structure {structure.name!r} has no ONNX op; compress with {', '.join(known)}")
    return known[structure.name]


def lower(structure: Structure, bias: bool) -> tuple[Call, ...]:
    """The nodes that compute `structure` on x (tokens, in_features); each feeds the next.

    Raises ArtifactError for a structure that this version cannot export.
    """
    return family_of(structure).lower(structure, bias)


def op(op_type: str) -> Op:
    """The op of that name; raises ArtifactError when the contract has none."""
    base = op_type.removesuffix(BIAS_SUFFIX)
    found = _find(base)
    if found is None:
        raise ArtifactError(f"{op_type!r} is not an op of domain {DOMAIN!r} version {DOMAIN_VERSION}")
    return found if base == op_type else replace(found, op_type=op_type, inputs=(*found.inputs, "bias"))


def is_ours(op_type: str) -> bool:
    """True if the contract has an op of that name."""
    return _find(op_type.removesuffix(BIAS_SUFFIX)) is not None


def op_types() -> tuple[str, ...]:
    """Every op_type but those of GroupShuffleLinear, which `GROUP_SHUFFLE_GRIDS` enumerates."""
    known = (known for family in families().values() for known in family.ops)
    return tuple(found.op_type + suffix for found in known for suffix in ("", BIAS_SUFFIX))


def _find(op_type: str) -> Op | None:
    return next((found for family in families().values() if (found := family.find(op_type)) is not None), None)


def graph_factors(structure: Structure, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors of `structure` as a graph holds them, by the names that its nodes use.

    factors: as `structure.shapes()` names them.
    """
    core, found = core_of(structure), dict[str, Tensor]()
    derived = family_of(core).derived
    for name in (name for call in lower(structure, False) for name in call.factors):
        found[name] = derived[name].make(core, factors) if name in derived else factors[name]
    return found


# --- What lowerings are written with. ---


def gemm(weight: str, bias: bool) -> Call:
    """x @ weight.T (+ bias)."""
    return Call("Gemm", "", (weight, "bias") if bias else (weight,), {"transB": 1})


def standard(op_type: str, *constants: tuple[int, ...], factors: tuple[str, ...] = ()) -> Call:
    """One node of a standard operator without attributes."""
    return Call(op_type, "", factors, {}, constants)


def custom(op_type: str, structure: Structure, factors: tuple[str, ...], bias: bool, attributes: Attributes) -> Call:
    """One node of an op of ours, with "Bias" and the bias where there is one."""
    sizes: Attributes = {"in_features": structure.in_features, "out_features": structure.out_features}
    plugin: Attributes = {"plugin_version": PLUGIN_VERSION, "plugin_namespace": DOMAIN}
    if bias:
        op_type, factors = op_type + BIAS_SUFFIX, (*factors, "bias")
    return Call(op_type, DOMAIN, factors, {**sizes, **attributes, **plugin})


# --- What bodies and dense forms are written with. ---


def finish(body: Body, z: str, bias: tuple[str, ...], flat: str) -> None:
    """View z as (tokens, n) and add the bias."""
    y = body.op("Reshape", z, flat, output=None if bias else "y")
    if bias:
        body.op("Add", y, *bias, output="y")


def integer(attributes: Attributes, name: str) -> int:
    """An attribute that is one integer."""
    value = attributes[name]
    assert isinstance(value, int)
    return value
