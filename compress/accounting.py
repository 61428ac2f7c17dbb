"""What a compressed model stores and computes, counted from its architecture and structures alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from compress.architecture import Architecture
from compress.structures import Structure


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts. `overhead` is what compression adds beside the projections: skip matrices, the head map
    of a tied head, and the biases of bias correction.

    `rest` is everything that is not a projection (embeddings, head, biases, norms) and is the same for both models.
    """

    dense_projections: int
    projections: int
    overhead: int
    rest: int
    structured_linears: int
    dense_linears: int

    @property
    def ratio(self) -> float:
        """Kept fraction of the projection parameters, overhead counted: what `--ratio` asks for."""
        return (self.projections + self.overhead) / self.dense_projections

    @property
    def model_ratio(self) -> float:
        """Kept fraction of all parameters of the model."""
        return (self.projections + self.overhead + self.rest) / (self.dense_projections + self.rest)


def overhead_parameters(arch: Architecture, rotation: str, skip_parameters: int | None = None) -> int:
    """Parameters that a rotation adds at run time: skips, and the d x d head map of a tied head.

    `skip_parameters` is what all skips of rotation "block" take together (`skips.parameters_of`); dense ones when None.
    """
    d = arch.hidden_size
    dense = 2 * arch.num_layers * d * d if skip_parameters is None else skip_parameters
    skips = dense if rotation == "block" else 0
    head = d * d if arch.tied and rotation != "none" else 0
    return skips + head


def bias_parameters(arch: Architecture, extra_biases: Collection[str]) -> int:
    """Parameters of the biases that these linears ("layers.{i}.{role}") have beyond those of the architecture."""
    roles = (name.split(".", 2)[2] for name in extra_biases)
    return sum(arch.linears()[role][0] for role in roles if not arch.has_bias(role))


def model_size(
    arch: Architecture,
    structures: Mapping[str, Structure],
    rotation: str,
    extra_biases: Collection[str] = (),
    skip_parameters: int | None = None,
) -> ModelSize:
    """Count; linears that `structures` does not name are dense. skip_parameters: as `overhead_parameters`."""
    d, rest = arch.hidden_size, arch.vocab_size * arch.hidden_size * (1 if arch.tied else 2)
    if arch.positions == "learned":
        rest += (arch.max_positions + arch.position_offset) * d
    rest += (2 * arch.num_layers + 1) * d * (2 if arch.norm == "layernorm" else 1)
    rest += 2 * arch.num_layers * arch.head_dim * arch.qk_norm
    projections = 0
    for role, (n, m) in arch.linears().items():
        rest += arch.num_layers * n * arch.has_bias(role)
        for layer in range(arch.num_layers):
            structure = structures.get(f"layers.{layer}.{role}")
            projections += n * m if structure is None else structure.parameter_count()
    linears = arch.num_layers * len(arch.linears())
    return ModelSize(
        arch.projection_parameters(),
        projections,
        overhead_parameters(arch, rotation, skip_parameters) + bias_parameters(arch, extra_biases),
        rest,
        len(structures),
        linears - len(structures),
    )
