"""A transformers model that is in memory as a source: its own weights and config, and the tokenizer given with it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compress.config_values import check_config
from compress.errors import UsageError
from compress.source import families
from compress.source.families import expected_shapes, tensor_names
from compress.source.families.base import LM_HEAD
from compress.source.generation import end_tokens
from compress.source.model import ModelSource
from compress.source.vocabulary import warn_beyond

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from compress.source.readers import WeightReader

PLACE = Path("the model in memory")
"""What messages call the place of its config and weights."""


@dataclass(frozen=True)
class MemorySource(ModelSource):
    """A model in memory, of kind "memory". It must not change while it is compressed; only its hashes are kept.

    `source_id` is what its config calls it (the name that it was loaded by), or its class.
    """

    model: PreTrainedModel | None = field(default=None, repr=False)
    given_tokenizer: PreTrainedTokenizerFast | None = field(default=None, repr=False)

    @classmethod
    def of(cls, model: object, tokenizer: object) -> MemorySource:
        """The source of a causal LM and its tokenizer. Raises UsageError for what is not one, or has none beside it."""
        from transformers import PreTrainedModel, PreTrainedTokenizerBase

        if not isinstance(model, PreTrainedModel):
            raise UsageError(
                f"model is a {type(model).__name__}: give a name, a path, or a causal LM of transformers "
                f"(AutoModelForCausalLM) with its tokenizer"
            )
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UsageError(
                f"a model in memory needs its tokenizer beside it, not {type(tokenizer).__name__}: "
                f"compress(model, ..., tokenizer=AutoTokenizer.from_pretrained(...))"
            )
        families.family_of(model.config.model_type)
        name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
        label = Path(name).name or type(model).__name__  # no path of this machine in the artifact
        quantised = getattr(model.config, "quantization_config", None)
        if quantised is not None or any(p.device.type == "meta" for p in model.parameters()):
            state = "quantised" if quantised is not None else "without weights (device 'meta')"
            raise UsageError(f"the model {label!r} in memory is {state}: give it in float16, bfloat16 or float32")
        return cls(
            name=label,
            kind="memory",
            path=PLACE,
            gguf_file=None,
            source_id=label,
            revision=None,
            model=model,
            given_tokenizer=cast("PreTrainedTokenizerFast", tokenizer),
        )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        assert self.given_tokenizer is not None
        warn_beyond(self.given_tokenizer, self._config.vocab_size, self.name)
        return self.given_tokenizer

    def reader(self) -> WeightReader:
        from compress.source import readers

        architecture = self.architecture()
        names, state = tensor_names(architecture), self._model.state_dict()
        if architecture.tied:
            state.pop(LM_HEAD, None)
        found = readers.MemoryReader({name: tensor.detach().cpu() for name, tensor in state.items()}, str(PLACE))
        readers.check_shapes(found, architecture, names, "model.config")
        return found

    def reference_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """A copy in `dtype` on the CPU; the user's own stays as it is."""
        return self._filled(self.reader(), dtype)

    @cached_property
    def sha256(self) -> dict[str, str]:
        return content_hashes(self)

    def generation_config(self) -> dict[str, Any] | None:
        given = getattr(self._model, "generation_config", None)
        content = {} if given is None else given.to_diff_dict()
        content.pop("_from_model_config", None)
        return None if not content else {**content, "eos_token_id": self._config.eos_token_id}

    @property
    def _model(self) -> PreTrainedModel:
        assert self.model is not None
        return self.model

    @cached_property
    def _config(self) -> PretrainedConfig:
        """A copy of model.config, its end tokens those of config and generation config."""
        config = type(self._model.config).from_dict(self._model.config.to_dict())
        check_config(config.to_dict(), PLACE / "config")
        generation = getattr(self._model, "generation_config", None)
        ends = {"config": config.eos_token_id, "generation_config": getattr(generation, "eos_token_id", None)}
        config.eos_token_id = end_tokens(config.vocab_size, {f"model.{name}": value for name, value in ends.items()})
        return config


def content_hashes(source: ModelSource) -> dict[str, str]:
    """SHA-256 of what a model is, whatever it is stored in: its weights as float32, its architecture, its vocabulary.

    A model in memory is known by these, and so is the folder or file that it was saved to.
    """
    import torch

    architecture, reader = source.architecture(), source.reader()
    weights = hashlib.sha256()
    for name in sorted(expected_shapes(architecture, tensor_names(architecture))):
        tensor = reader.get(name, torch.float32).contiguous()
        weights.update(f"{name} {tuple(tensor.shape)}\n".encode())
        weights.update(tensor.numpy().data)
    vocabulary = sorted(source.tokenizer().get_vocab().items())
    return {
        "weights": weights.hexdigest(),
        "architecture": _digest(architecture.to_dict()),
        "vocabulary": _digest(vocabulary),
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
