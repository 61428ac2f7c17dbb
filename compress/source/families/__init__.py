"""Model families by `model_type` of config.json. To add one: a file here, and its line in `_FAMILIES`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.architecture import Architecture
from compress.artifact.reading import shown
from compress.errors import UsageError
from compress.source.families import llama, opt
from compress.source.families.base import Family, LayerNames, ParameterNames, TensorNames, expected_shapes
from compress.source.families.foreign import refuse_foreign

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "Family",
    "LayerNames",
    "ParameterNames",
    "TensorNames",
    "architecture",
    "expected_shapes",
    "family_of",
    "supported_model_types",
    "tensor_names",
]

_FAMILIES = (opt.FAMILY, llama.FAMILY)
_BY_MODEL_TYPE = {model_type: family for family in _FAMILIES for model_type in family.model_types}
_BY_NAME = {family.name: family for family in _FAMILIES}


def supported_model_types() -> tuple[str, ...]:
    """The values of `model_type` in config.json that some family describes."""
    return tuple(_BY_MODEL_TYPE)


def family_of(model_type: str) -> Family:
    """The family that describes `model_type`; UsageError names the supported ones when there is none."""
    if model_type == "procrustes":
        raise UsageError(
            "This is a compressed checkpoint (model_type is 'procrustes'), not a model to compress; name the "
            "original model instead."
        )
    if model_type not in _BY_MODEL_TYPE:
        raise UsageError(
            f"Models of type {shown(model_type)} are not supported (model_type in config.json); supported are "
            f"{', '.join(supported_model_types())}."
        )
    return _BY_MODEL_TYPE[model_type]


def architecture(config: PretrainedConfig) -> Architecture:
    """Describe the model of a Hugging Face config; UsageError when no family supports it, or only a part of it."""
    refuse_foreign(config)
    return family_of(config.model_type).architecture(config)


def tensor_names(architecture: Architecture) -> TensorNames:
    """Where the tensors of a model of this architecture are in its checkpoint."""
    return _BY_NAME[architecture.family].tensor_names(architecture)
