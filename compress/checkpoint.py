"""Reading and writing OUT/checkpoint: config.json, sharded safetensors with an index, the tokenizer, the rotations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.architecture import Architecture
from compress.artifact.reading import RefusedError, parse_json, read_json, reason, shown
from compress.errors import ArtifactError
from compress.linalg import all_finite
from compress.model.blocks import StructuredLinear
from compress.model.config import ProcrustesConfig
from compress.model.decoder import ProcrustesForCausalLM
from compress.model.skips import SkipForm, skip_from_config
from compress.source.generation import write_generation_config
from compress.structures import DenseStructure, Structure
from compress.structures.joint import leader_of

if TYPE_CHECKING:
    from compress.rewrites.rotations import Rotations

INDEX = "model.safetensors.index.json"
ROTATION = "rotation.safetensors"
FORMAT = 1


class ShardWriter:
    """Writes tensors to numbered safetensors shards as they come; memory is bounded by one shard.

    with ShardWriter(folder) as writer: writer.add(name, tensor). The index is written on a clean exit only.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, max_shard_bytes: int = 2 << 30) -> None:
        self.folder, self.dtype, self.max_shard_bytes = folder, dtype, max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total = 0
        self._shards: list[list[str]] = []
        self._seen: set[str] = set()

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor. Raises ArtifactError when it is not finite: a broken weight is never written."""
        if name in self._seen:
            raise ValueError(f"{name} was already written")
        if not all_finite(tensor):
            raise ArtifactError(f"{name} came out with NaN or infinite values; it was not written. Please report this")
        tensor = tensor.detach().to("cpu", self._stored_dtype(name, tensor)).contiguous().clone()
        if not all_finite(tensor):
            raise ArtifactError(
                f"{name} has values beyond the range of {str(self.dtype).removeprefix('torch.')}; it was not written. "
                f"Use --checkpoint-dtype bfloat16 or float32"
            )
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        self._seen.add(name)
        self._pending[name] = tensor
        self._pending_bytes += size
        self._total += size

    def _stored_dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        # The float32 mix of a Kronecker structure is tiny and stays float32 (op contract).
        if name.endswith(".A") and tensor.dtype == torch.float32:
            return torch.float32
        # Integers stay what they are, and the bits of a sparsity mask bytes, even where the factors were cast together
        # on their way here.
        if name.endswith(".mask"):
            return torch.uint8
        return self.dtype if tensor.is_floating_point() else tensor.dtype

    def _flush(self) -> None:
        number = len(self._shards) + 1
        save_file(self._pending, self.folder / f"shard-{number}.safetensors", metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        if self._pending:
            self._flush()
        weight_map, count = {}, len(self._shards)
        for number, names in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.folder / f"shard-{number}.safetensors").rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_config(
    folder: Path, config: ProcrustesConfig, dtype: torch.dtype, generation: Mapping[str, Any] | None = None
) -> None:
    """config.json, and generation_config.json with the content `generation`, None where the source has none."""
    config.architectures = ["ProcrustesForCausalLM"]
    config.dtype = dtype
    config.save_pretrained(folder)
    write_generation_config(folder, generation)


def write_rotations(folder: Path, rotations: Rotations) -> None:
    """rotation.safetensors: float64 (d, d) matrices "q.{position}", none for an unrotated stream; its metadata name the
    kind, or the forms of the skips where they are not dense, which only kind "block" has."""
    tensors = {f"q.{i}": q.contiguous() for i, q in enumerate(rotations.matrices)}
    # One entry only: safetensors writes several in random order, and equal requests give equal bytes.
    metadata = {"kind": rotations.kind}
    if rotations.skips:
        metadata = {"skips": json.dumps([form.to_config() for form in rotations.skips])}
    save_file(tensors, folder / ROTATION, metadata=metadata)


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
        """Whether "layers.{i}.{role}" has a bias: by the architecture, or one that bias correction added."""
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


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> ProcrustesForCausalLM:
    """The whole checkpoint as a PyTorch model in eval mode. Raises ArtifactError on missing or surplus tensors."""
    reader = CheckpointReader(folder)
    with torch.device("meta"):
        model = ProcrustesForCausalLM(reader.config)
    state = {name: reader.get(name) for name in reader.names()}
    state = {n: t.to(dtype) if t.is_floating_point() and not n.endswith(".A") else t for n, t in state.items()}
    if reader.config.tie_word_embeddings:
        tied = {n: t for n, t in state.items() if n.startswith("model.embed_tokens.")}
        state |= {n.replace("model.embed_tokens", "lm_head"): t for n, t in tied.items()}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ArtifactError(f"{folder} does not hold the model its config.json describes: {error}") from error
    for linear in model.modules():
        if isinstance(linear, StructuredLinear):
            linear.structure.check_factors({name: getattr(linear, name) for name in linear.factor_names})
    if reader.config.tie_word_embeddings:
        model.tie_weights()
    model.requires_grad_(False)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know the model type procrustes. Safe to call again."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register(ProcrustesConfig.model_type, ProcrustesConfig, exist_ok=True)
    AutoModelForCausalLM.register(ProcrustesConfig, ProcrustesForCausalLM, exist_ok=True)
