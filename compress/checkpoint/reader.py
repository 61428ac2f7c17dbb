"""Reading and writing OUT/checkpoint: config.json, sharded safetensors with an index, the tokenizer, the rotations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from compress.architecture import Architecture
from compress.artifact.reading import RefusedError, parse_json, read_json, reason, shown
from compress.errors import ArtifactError
from compress.linalg import all_finite
from compress.model.config import ProcrustesConfig
from compress.model.skips import SkipForm, skip_from_config
from compress.structures import DenseStructure, Structure
from compress.structures.joint import leader_of

if TYPE_CHECKING:
    from compress.rewrites.rotations import Rotations

INDEX = "model.safetensors.index.json"
ROTATION = "rotation.safetensors"
FORMAT = 1


def read_rotations(folder: Path) -> Rotations:
    """Inverse of `write_rotations`; raises ArtifactError when the file is missing or damaged."""
    from compress.rewrites.rotations import Rotations

    path = folder / ROTATION
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        kind = metadata.get("kind", "block" if "skips" in metadata else "none")
        forms = parse_json(metadata.get("skips", "[]").encode())
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); compress the model again") from error
    names = [f"q.{i}" for i in range(len(tensors))]
    if set(names) != tensors.keys() or (kind == "none") != (not names) or kind not in ("none", "shared", "block"):
        raise ArtifactError(f"{path} does not hold the rotations of kind {kind!r}; compress the model again")
    if not isinstance(forms, list) or (forms and len(forms) != len(names) - 1):
        raise ArtifactError(f"{path} does not give one skip from each rotation to the next; compress the model again")
    return Rotations(kind, tuple(tensors[name] for name in names), tuple(map(skip_from_config, forms)))


def storage_types(structures: Mapping[str, Structure], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Name of each factor in a checkpoint of type `dtype` -> the type in which its structure wants it stored.

    structures: linear "layers.{i}.{role}" -> its structure. What is not in the result is of type `dtype`.
    """
    return {
        f"model.{linear}.{factor}": stored
        for linear, structure in structures.items()
        for factor, stored in structure.storage_dtypes(dtype).items()
    }


class CheckpointReader:
    """Lazy access to a compressed checkpoint: one tensor at a time, never the whole model.

    Raises ArtifactError when a file is missing or damaged or a tensor has another shape than its structure.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        raw, index = self._json("config.json"), self._json(INDEX)
        if raw.get("model_type") != ProcrustesConfig.model_type:
            raise ArtifactError(f"{folder}/config.json has model_type {shown(raw.get('model_type'))}, not 'procrustes'")
        if raw.get("format_version") != FORMAT:
            raise ArtifactError(
                f"{folder}/config.json has format_version {shown(raw.get('format_version'))}, this program reads "
                f"{FORMAT}; compress the model again"
            )
        self.config = _config(self.folder)
        self.architecture: Architecture = self.config.parsed_architecture()
        _check_copies(self.config, self.architecture)
        self._structures = self.config.parsed_structures()
        self._skips = self.config.parsed_skips()
        self.extra_biases = self.config.parsed_extra_biases()
        if unknown := sorted(self._structures.keys() - set(self.linears())):
            raise ArtifactError(
                f"{folder}/config.json has a structure for {shown(unknown[0])}, which is no linear of its model"
            )
        for linear, structure in self._structures.items():
            n, m = self.architecture.linears()[linear.split(".", 2)[2]]
            if (structure.out_features, structure.in_features) != (n, m):
                raise ArtifactError(
                    f"{folder}/config.json gives {linear} a structure of {structure.out_features} x "
                    f"{structure.in_features} features, where its model has {n} x {m}; compress the model again"
                )
            leader_of(self._structures, linear)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ArtifactError(f"{self.folder / INDEX} has no weight_map of names to files; compress the model again")
        self._weight_map: dict[str, str] = weight_map
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file:
                raise ArtifactError(f"{self.folder / INDEX} points outside its folder: {shown(file)}")
        # Before a module is made for each layer that config.json claims.
        stored = {name.split(".")[2] for name in weight_map if name.startswith("model.layers.")}
        if stored != {str(i) for i in range(self.architecture.num_layers)}:
            raise ArtifactError(
                f"{folder}/config.json has {self.architecture.num_layers} layers, but {INDEX} has tensors of "
                f"{len(stored)}; compress the model again"
            )

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            value = read_json(path)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read ({error.strerror}); change its permissions") from error
        except RefusedError as error:
            raise ArtifactError(
                f"{self.folder} is not a compressed checkpoint ({name} {error}); run compress.run first"
            ) from error
        if not isinstance(value, dict):
            raise ArtifactError(f"{path} is not a JSON object; compress the model again")
        return value

    def names(self) -> list[str]:
        """All tensor names."""
        return sorted(self._weight_map)

    def linears(self) -> list[str]:
        """All linear names, "layers.{i}.{role}", in execution order."""
        arch = self.architecture
        return [f"layers.{i}.{role}" for i in range(arch.num_layers) for role in arch.linears()]

    def structure(self, linear: str) -> Structure:
        """The structure of "layers.{i}.{role}"; dense where config.json names none."""
        if linear in self._structures:
            return self._structures[linear]
        n, m = self.architecture.linears()[linear.split(".", 2)[2]]
        return DenseStructure(in_features=m, out_features=n)

    def skip(self, layer: int, sub_block: str) -> SkipForm | None:
        """The form of the skip past "attn" or "mlp" of block `layer`, None where the stream passes unchanged."""
        return self._skips[2 * layer + (sub_block == "mlp")] if self._skips else None

    def get(self, name: str) -> Tensor:
        """One tensor by its state-dict name. Raises ArtifactError when it is missing, damaged or not finite."""
        if name not in self._weight_map:
            raise ArtifactError(f"{self.folder} has no tensor {name}; compress the model again")
        path = self.folder / self._weight_map[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}); compress the model again") from error
        if not all_finite(tensor):
            raise ArtifactError(f"{name} in {path} has NaN or infinite values; compress the model again")
        return tensor

    def factors(self, linear: str) -> dict[str, Tensor]:
        """The factors of one linear, checked against the shapes of its structure; a shared V is that of its leader."""
        leader = leader_of(self._structures, linear)
        found = {} if leader is None else {"V": self._factor(leader, "V")}
        structure = self.structure(linear)
        own = {name: self._factor(linear, name) for name in structure.shapes()}
        structure.check_factors(own)
        return found | own

    def _factor(self, linear: str, name: str) -> Tensor:
        tensor, shape = self.get(f"model.{linear}.{name}"), self.structure(linear).shapes()[name]
        if tuple(tensor.shape) != tuple(shape):
            raise ArtifactError(
                f"model.{linear}.{name} is {tuple(tensor.shape)} in {self.folder}, expected {tuple(shape)}"
            )
        return tensor

    def has_bias(self, linear: str) -> bool:
        """True if "layers.{i}.{role}" has a bias: by the architecture, or one that bias correction added."""
        return linear in self.extra_biases or self.architecture.has_bias(linear.split(".", 2)[2])

    def bias(self, linear: str) -> Tensor | None:
        """The bias of one linear, or None."""
        name = f"model.{linear}.bias"
        return self.get(name) if name in self._weight_map else None


def _config(folder: Path) -> ProcrustesConfig:
    """config.json as transformers reads it; ArtifactError for values that it refuses."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return ProcrustesConfig.from_pretrained(folder)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, StrictDataclassError) as error:
        raise ArtifactError(
            f"transformers refuses {folder / 'config.json'} ({reason(error)}); compress the model again"
        ) from error


def _check_copies(config: ProcrustesConfig, arch: Architecture) -> None:
    """The values that transformers itself reads are those of the architecture; ArtifactError otherwise."""
    copies = {
        "num_hidden_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_positions,
        "tie_word_embeddings": arch.tied,
    }
    for name, value in copies.items():
        if getattr(config, name) is not value and getattr(config, name) != value:
            raise ArtifactError(
                f"config.json has {name} = {shown(getattr(config, name))} beside an architecture with {value}; "
                "compress the model again"
            )
    for name in ("center_embedding", "head_map", "head_bias", "use_cache"):
        if not isinstance(getattr(config, name), bool):
            raise ArtifactError(
                f"config.json has {name} = {shown(getattr(config, name))}, but true or false is needed; compress the "
                "model again"
            )
    if config.rotation not in ("none", "shared", "block"):
        raise ArtifactError(f"config.json has the rotation {shown(config.rotation)}; compress the model again")
