"""From a GGUF file's metadata to a Hugging Face config.

Every key of the model's own (`llama.*`, `qwen2.*`, ...) is either translated, or known to change nothing at the value
it has, or refused: a key that is passed over in silence gives another model. Defaults are llama.cpp's (`load_hparams`
in llama-model.cpp), since the format is defined by what its own program does with a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.config_values import FIELDS, fault_of_fields, rope_fault
from compress.errors import ArtifactError, UsageError
from compress.source.gguf.header import GgufHeader
from compress.source.gguf.rope import rope_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Values of general.architecture that are read; the model_type of the config has the same name."""

_ROTARY_BASE = 10000.0  # where rope.freq_base is absent

_NOTHING: tuple[Any, ...] = (None, 0, 0.0, False)
# Keys that change nothing at these values -> the values. Any other value of theirs is refused.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": _NOTHING,
    "attention.max_alibi_bias": _NOTHING,
    "attention.scale": _NOTHING,
    "attention.sliding_window": _NOTHING,
    "attn_logit_softcapping": _NOTHING,
    "final_logit_softcapping": _NOTHING,
    "embedding_scale": (*_NOTHING, 1.0),
    "residual_scale": (*_NOTHING, 1.0),
    "logit_scale": (*_NOTHING, 1.0),
    "leading_dense_block_count": _NOTHING,
    "expert_count": _NOTHING,
    "expert_used_count": _NOTHING,
    "nextn_predict_layers": _NOTHING,
    "pooling_type": _NOTHING,
    "use_parallel_residual": _NOTHING,
    # How the converter of 2023 called the order of rotary features that all llama files have.
    "tensor_data_layout": ("Meta AI original pth",),
}


def config_of(header: GgufHeader) -> PretrainedConfig:
    """The config of the model in a GGUF file, end tokens included.

    Raises UsageError for architectures and keys that are not supported, ArtifactError for keys that are missing or of
    no possible value. Checked against the table of tensors, so that no size is believed that the file does not have.
    """
    from transformers import AutoConfig

    name = header.architecture
    if name not in ARCHITECTURES:
        kind = header.metadata.get("general.type", "model")
        what = f"the architecture {name!r}" if kind in ("model", name) else f"a {kind} of the architecture {name!r}"
        raise UsageError(
            f"The GGUF file {header.path} holds {what} (general.architecture), which is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}."
        )
    if (kind := header.metadata.get("general.type", "model")) != "model":
        raise UsageError(
            f"The GGUF file {header.path} has general.type = {kind!r:.100}, so it holds no model, only what goes with "
            "one; give the file of the model itself (an adapter is merged into it first, with llama-export-lora)."
        )
    keys = _Keys(header)
    width, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    kv_heads = keys.count("attention.head_count_kv", heads)
    head_dim = keys.count("attention.key_length", width // heads if width % heads == 0 else None)
    values: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": _layers(header, keys.count("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "vocab_size": keys.count("vocab_size", _vocabulary(header)),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.count(key, head_dim) != head_dim:
            raise UsageError(
                f"The GGUF file {header.path} has {name}.{key} = {keys.count(key, head_dim)} where heads are "
                f"{head_dim} wide; parts of a head that are not rotated, and values of another width than keys, are "
                "not supported."
            )
    if heads % kv_heads or head_dim % 2:
        raise ArtifactError(
            f"The GGUF file {header.path} has {heads} heads of {head_dim} features and {kv_heads} key/value heads "
            f"({name}.attention.*), but an even width is needed, and a multiple of the key/value heads; it is damaged: "
            "download it again."
        )
    if name == "llama":
        values["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        values["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    values["rope_parameters"] = rope_parameters(
        header, keys.scaling(), base=keys.real("rope.freq_base", _ROTARY_BASE), head_dim=head_dim
    )
    fault = fault_of_fields(values, FIELDS) or rope_fault(values["rope_parameters"])
    if fault is not None:
        raise ArtifactError(f"The metadata of the GGUF file {header.path} gives {fault}; download it again.")
    keys.refuse_the_rest()
    config = AutoConfig.for_model(name, **values, **_tokens(header, values["vocab_size"]))
    config.name_or_path = str(header.metadata.get("general.name", header.path.stem))
    return config


@dataclass
class _Keys:
    """The keys `ARCHITECTURE.*`, each taken by name; what was not taken is refused at the end."""

    header: GgufHeader
    taken: set[str] = field(default_factory=set)

    def take(self, key: str) -> Any:
        full = f"{self.header.architecture}.{key}"
        self.taken.add(full)
        return self.header.metadata.get(full)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number, the same in every layer."""
        return int(self._checked(key, default, int, "a positive whole number, the same for all layers"))

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        return float(self._checked(key, default, (int, float), "a positive number"))

    def _checked(self, key: str, default: Any, kind: Any, wanted: str) -> Any:
        value = self.take(key)
        if value is None:
            value = default
        if value is None:
            raise ArtifactError(
                f"The GGUF file {self.header.path} lacks the key {self.header.architecture}.{key}, which has no "
                "default; convert the model again."
            )
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ArtifactError(
                f"The GGUF file {self.header.path} has {self.header.architecture}.{key} = {value!r:.100}, but "
                f"{wanted} is needed."
            )
        return value

    def scaling(self) -> dict[str, Any]:
        """The keys of `rope.scaling.` that are there, without the prefix; and rope.scale_linear of 2023 as `factor`."""
        prefix = f"{self.header.architecture}.rope.scaling."
        names = [key.removeprefix(prefix) for key in self.header.metadata if key.startswith(prefix)]
        found = {name: self.take(f"rope.scaling.{name}") for name in names}
        old = self.take("rope.scale_linear")
        return found if old is None else {"factor": self.real("rope.scale_linear")} | found

    def refuse_the_rest(self) -> None:
        prefix = f"{self.header.architecture}."
        for key, value in self.header.metadata.items():
            if key in self.taken or not key.startswith(prefix):
                continue
            value = value.tolist() if isinstance(value, np.ndarray) else value
            if value not in _HARMLESS.get(key.removeprefix(prefix), ()):
                raise UsageError(
                    f"The GGUF file {self.header.path} has {key} = {value!r:.100}, which is not understood here and "
                    "may change what the model computes; take the model's safetensors, or another conversion of it."
                )


def _layers(header: GgufHeader, said: int) -> int:
    """block_count, held against the tensors: nothing is laid out for layers that are not there."""
    found = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if said != len(found):
        raise ArtifactError(
            f"The GGUF file {header.path} has {header.architecture}.block_count = {said:,}, but tensors of "
            f"{len(found):,} layers; it is damaged: download it again."
        )
    return said


def _vocabulary(header: GgufHeader) -> int | None:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else None


def _tokens(header: GgufHeader, vocab_size: int) -> dict[str, Any]:
    """Ids of special tokens. Generation ends at any of eos, eot (end of turn) and eom (end of message)."""
    from compress.source.generation import end_tokens

    def single(key: str) -> int | None:
        value = header.metadata.get(f"tokenizer.ggml.{key}")
        return value if value is not None and 0 <= value < vocab_size else None

    ends = [header.metadata.get(f"tokenizer.ggml.{key}") for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    several = header.metadata.get("tokenizer.ggml.eos_token_ids")
    return {
        "bos_token_id": single("bos_token_id"),
        "eos_token_id": end_tokens(
            vocab_size, {str(header.path): [*ends, *([] if several is None else list(map(int, several)))]}
        ),
        "pad_token_id": single("padding_token_id"),
    }
