"""What a decoder looks like, as plain data.

An `Architecture` is all that the rest of the project needs to know of a model family: sizes, which
normalisation, which positions, where biases are. It has no weights and does no arithmetic.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from compress.artifact.reading import shown
from compress.config_values import ARCHITECTURE_FIELDS, fault_of_fields, rope_fault
from compress.errors import ArtifactError

if TYPE_CHECKING:
    pass


READERS: dict[str, tuple[str, ...]] = {
    "attn": ("attn.q", "attn.k", "attn.v"),
    "mlp": ("mlp.gate", "mlp.up"),
}
"""Linears that read the normalised residual stream, by sub-block; the members of one tuple share their input."""

WRITERS: dict[str, str] = {"attn": "attn.o", "mlp": "mlp.down"}
"""The linear of each sub-block whose output is added to the residual stream."""


@dataclass(frozen=True)
class Architecture:
    """Sizes and choices of a pre-norm decoder.

    Widths are in features; `rope` is the `rope_parameters` dictionary of a Hugging Face config (rope_type,
    rope_theta, scaling keys) or None for learned positions; `position_offset` rows of the position table
    precede position 0 (OPT: 2).
    """

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm: str
    norm_eps: float
    positions: str
    position_offset: int
    rope: dict[str, Any] | None
    activation: str
    gated: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    sliding_window: int | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None

    def linears(self) -> dict[str, tuple[int, int]]:
        """Role -> (out_features, in_features) of the projections of one block, in execution order."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = {"attn.q": (q, d), "attn.k": (kv, d), "attn.v": (kv, d), "attn.o": (d, q)}
        if self.gated:
            shapes["mlp.gate"] = (f, d)
        shapes["mlp.up"] = (f, d)
        shapes["mlp.down"] = (d, f)
        return shapes

    def readers(self, sub_block: str) -> tuple[str, ...]:
        """Roles that read the normalised stream in `sub_block` ("attn" or "mlp")."""
        return tuple(role for role in READERS[sub_block] if role in self.linears())

    def has_bias(self, role: str) -> bool:
        """True if `role` has a bias once norms are folded: a LayerNorm's shift ends up in the linears that read it."""
        if role == "attn.o":
            return self.output_bias
        shifted = self.norm == "layernorm" and role not in WRITERS.values()
        return shifted or (self.attention_bias if role.startswith("attn.") else self.mlp_bias)

    def side(self, role: str) -> Literal["in", "out"]:
        """Which side of `role` lies in the residual stream: "in" for readers, "out" for writers."""
        return "out" if role in WRITERS.values() else "in"

    def projection_parameters(self) -> int:
        """Weight parameters of all projections of all blocks, biases not counted: what `--ratio` is a ratio of."""
        return self.num_layers * sum(n * m for n, m in self.linears().values())

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        """Inverse of `to_dict`; raises ArtifactError when a field is missing or unknown."""
        known = {field.name for field in fields(cls)}
        wrong = sorted(known ^ set(values))
        if wrong:
            raise ArtifactError(f"the architecture in config.json has missing or unknown fields: {', '.join(wrong)}")
        return cls(**values)


def check_sizes(architecture: Architecture) -> Architecture:
    """Return `architecture`; raise ArtifactError when config.json holds types, sizes or rotary parameters that no model
    can have."""
    fault = fault_of_fields(asdict(architecture), ARCHITECTURE_FIELDS) or rope_fault(architecture.rope, "rope")
    if fault is not None:
        raise ArtifactError(f"config.json gives {fault}; take the model's own config.json, unchanged.")
    if architecture.num_heads % architecture.num_kv_heads:
        raise ArtifactError(
            f"config.json gives {architecture.num_heads} attention heads and {architecture.num_kv_heads} "
            "key/value heads, but the first must be a multiple of the second."
        )
    if (architecture.positions == "rope") != (architecture.rope is not None):
        raise ArtifactError(
            f"config.json gives positions of kind {architecture.positions!r} with the rotary parameters "
            f"{shown(architecture.rope)}; rotary positions need them, learned ones have none."
        )
    if architecture.rope is not None and architecture.head_dim % 2:
        raise ArtifactError(f"config.json gives head_dim = {architecture.head_dim}, but rotary positions need it even.")
    return architecture


SUB_BLOCKS = ("attn", "mlp")


def position_of(layer: int, role: str) -> int:
    """The position of the stream, 0 ... 2L, that a linear reads or writes; each has its rotation with kind "block"."""
    sub_block = role.partition(".")[0]
    return 2 * layer + SUB_BLOCKS.index(sub_block) + (role in WRITERS.values())


def extra_biases(arch: Architecture, roles: tuple[str, ...]) -> list[str]:
    """The linears of these roles that have no bias, in all layers: what bias correction adds one to
    (`ProcrustesConfig.extra_biases`)."""
    return [f"layers.{i}.{role}" for i in range(arch.num_layers) for role in roles if not arch.has_bias(role)]
