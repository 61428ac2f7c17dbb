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

    `dense_embeddings` and `embeddings` are the token embedding and the head, a tied one once. `rest` is everything
    else (positions, biases, norms) and is the same for both models.
    """

    dense_projections: int
    projections: int
    overhead: int
    dense_embeddings: int
    embeddings: int
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
        return self.parameters / self.dense_parameters

    @property
    def parameters(self) -> int:
        """Parameters of the whole compressed model."""
        return self.projections + self.overhead + self.embeddings + self.rest

    @property
    def dense_parameters(self) -> int:
        """Parameters of the whole model as it was."""
        return self.dense_projections + self.dense_embeddings + self.rest


def overhead_parameters(arch: Architecture, rotation: str, skip_parameters: int | None = None) -> int:
    """Parameters that a rotation adds at run time: skips, and the d x d head map of a tied head.

    `skip_parameters` is what all skips of rotation "block" take together (`skips.parameters_of`); dense ones when None.
    """
    d = arch.hidden_size
    dense = 2 * arch.num_layers * d * d if skip_parameters is None else skip_parameters
    skips = dense if rotation == "block" else 0
    head = d * d if arch.tied and rotation != "none" else 0
    return skips + head


def embedding_parameters(arch: Architecture, embedding_rank: int = 0, head_rank: int = 0) -> int:
    """Parameters of the token embedding and of a head of its own, dense or in factors U (vocabulary, r) and R (r, d).

    A rank of 0 stands for dense; a tied head costs nothing, and has no rank.
    """
    ranks = (embedding_rank,) if arch.tied else (embedding_rank, head_rank)
    d, vocabulary = arch.hidden_size, arch.vocab_size
    return sum(rank * (vocabulary + d) if rank else vocabulary * d for rank in ranks)


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
    embedding_rank: int = 0,
    head_rank: int = 0,
) -> ModelSize:
    """Count; linears that `structures` does not name are dense. skip_parameters: as `overhead_parameters`; ranks: as
    `embedding_parameters`."""
    d, rest = arch.hidden_size, 0
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
        embedding_parameters(arch),
        embedding_parameters(arch, embedding_rank, head_rank),
        rest,
        len(structures),
        linears - len(structures),
    )
