"""config.json of a compressed model."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from compress.architecture import Architecture, check_sizes
from compress.artifact.reading import shown
from compress.errors import ArtifactError
from compress.model.blocks import ACTIVATIONS
from compress.model.skips import SkipForm, skips_from_config
from compress.structures import Structure, structure_from_config


class ProcrustesConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """config.json of a compressed checkpoint: the architecture and every linear's structure."""

    model_type = "procrustes"

    architecture: dict[str, Any] | None = None
    structures: dict[str, Any] | None = None
    extra_biases: list[str] | None = None
    rotation: str = "none"
    skip: str = "none"
    skip_config: list[dict[str, Any]] | None = None
    center_embedding: bool = False
    head_map: bool = False
    head_bias: bool = False
    embedding_rank: int = 0
    head_rank: int = 0
    format_version: int = 1
    num_hidden_layers: int = 0
    hidden_size: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    vocab_size: int = 0
    max_position_embeddings: int = 0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def from_architecture(
        cls, arch: Architecture, structures: Mapping[str, Structure], **choices: Any
    ) -> ProcrustesConfig:
        """The config of a model.

        `choices` are rotation, skip, skip_config, center_embedding, head_map, head_bias, tie_word_embeddings,
        extra_biases, and embedding_rank and head_rank (0 for dense; that of a tied head is the embedding's).
        """
        return cls(
            architecture=arch.to_dict(),
            structures={name: s.to_config() for name, s in structures.items() if s.name != "dense"},
            num_hidden_layers=arch.num_layers,
            hidden_size=arch.hidden_size,
            num_attention_heads=arch.num_heads,
            num_key_value_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            vocab_size=arch.vocab_size,
            max_position_embeddings=arch.max_positions,
            bos_token_id=arch.bos_token_id,
            eos_token_id=arch.eos_token_id,
            pad_token_id=arch.pad_token_id,
            **choices,
        )

    def save_pretrained(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **options: Any) -> None:
        """config.json, and beside it the Python files that it names for where this package is not installed."""
        from compress.model.bundle import AUTO_MAP, write_bundle

        self.auto_map = dict(AUTO_MAP)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_bundle(folder)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **options)

    def parsed_architecture(self) -> Architecture:
        """The `Architecture`; raises ArtifactError when config.json lacks it."""
        if not isinstance(self.architecture, dict):
            raise ArtifactError("config.json has model_type procrustes but no `architecture`: compress the model again")
        arch = check_sizes(Architecture.from_dict(self.architecture))
        if arch.activation not in ACTIVATIONS:
            raise ArtifactError(
                f"config.json gives the activation {shown(arch.activation)}, which this version has not"
            )
        return arch

    def parsed_skips(self) -> tuple[SkipForm, ...]:
        """The forms of the 2L skips in order of position, none where the stream needs none."""
        arch = self.parsed_architecture()
        return skips_from_config(self.skip, self.skip_config, arch.hidden_size, arch.num_layers)

    def parsed_structures(self) -> dict[str, Structure]:
        """Linear name -> structure, for the linears that are not dense."""
        structures = {} if self.structures is None else self.structures
        if not isinstance(structures, dict):
            raise ArtifactError("config.json has `structures` that are not a JSON object: compress the model again")
        return {name: structure_from_config(c) for name, c in structures.items()}

    def parsed_ranks(self) -> tuple[int, int]:
        """Inner dimensions of embedding and head, 0 where dense; of a tied head that of the embedding.

        Raises ArtifactError for anything but whole numbers up to the full rank, and for a tied head with its own.
        """
        arch = self.parsed_architecture()
        for name, rank in (("embedding_rank", self.embedding_rank), ("head_rank", self.head_rank)):
            full = min(arch.hidden_size, arch.vocab_size)
            if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank <= full:
                raise ArtifactError(f"config.json has {name} {shown(rank)}, not 0 to {full}: compress the model again")
        if self.tie_word_embeddings and self.head_rank:
            raise ArtifactError(
                f"config.json has head_rank {shown(self.head_rank)} but its head is tied to the embedding: "
                f"compress the model again"
            )
        return self.embedding_rank, self.embedding_rank if self.tie_word_embeddings else self.head_rank

    def parsed_extra_biases(self) -> frozenset[str]:
        """Linears ("layers.{i}.{role}") with a bias that the architecture has not: what bias correction added.

        Raises ArtifactError for anything but a list of such names.
        """
        arch, names = self.parsed_architecture(), self.extra_biases
        if names is None:
            return frozenset()
        known = {f"layers.{i}.{role}" for i in range(arch.num_layers) for role in arch.linears()}
        if not isinstance(names, list) or any(not isinstance(name, str) or name not in known for name in names):
            raise ArtifactError(
                f"config.json has `extra_biases` that are no list of this model's linears: {shown(names)}; "
                f"compress the model again"
            )
        return frozenset(names)
