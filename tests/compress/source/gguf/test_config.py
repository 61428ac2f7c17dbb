"""Metadata of GGUF files: translated, at a documented default, or refused; nothing is passed over in silence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.errors import ArtifactError, ProcrustesError, UsageError
from compress.source.gguf import GgufHeader, config_of, read_header
from compress.source.model import ModelSource
from compress.source.resolve import resolve
from tests import tiny

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
    "hidden_act",
    "model_type",
)


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> GgufHeader:
    """The header of a tiny Llama."""
    return read_header(tiny.write_gguf("tiny_llama", tmp_path_factory.mktemp("gguf") / "m.gguf"))


def changed(header: GgufHeader, **values: Any) -> GgufHeader:
    """`header` with other values of `llama.*` keys (`__` for the point), None to remove one."""
    metadata = dict(header.metadata)
    for name, value in values.items():
        metadata[f"llama.{name.replace('__', '.')}"] = value
    return replace(header, metadata={key: value for key, value in metadata.items() if value is not None})


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_tied", "tiny_llama_bias", "tiny_qwen2", "tiny_qwen3"])
def test_the_config_is_the_one_that_was_written(name: str, tmp_path: Path) -> None:
    source = resolve(str(tiny.write_gguf(name, tmp_path / "m.gguf")))
    found, expected = source.config(), tiny.config(name)
    for field in SIZES:
        assert getattr(found, field) == getattr(expected, field), field
    assert found.rope_parameters == expected.rope_parameters
    assert found.rms_norm_eps == pytest.approx(expected.rms_norm_eps)
    architecture = resolve_like(source, expected)
    assert replace(source.architecture(), norm_eps=architecture.norm_eps) == architecture


def resolve_like(source: ModelSource, expected: Any) -> Any:
    from compress.source import families

    return replace(families.architecture(expected), max_positions=source.config().max_position_embeddings)


@pytest.mark.slow
def test_the_config_of_the_real_model_is_that_of_transformers(real_model: ModelSource) -> None:
    from transformers import AutoConfig

    expected = AutoConfig.from_pretrained(str(real_model.path), gguf_file=real_model.gguf_file).to_dict()
    found = real_model.config().to_dict()
    assert {k for k, v in found.items() if expected.get(k) != v} <= {"_name_or_path"}


@pytest.mark.parametrize(
    ("missing", "field", "value"),
    [
        ("rope__freq_base", "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
        ("attention__head_count_kv", "num_key_value_heads", 4),
        ("rope__dimension_count", "head_dim", 16),
        ("vocab_size", "vocab_size", tiny.VOCAB_SIZE),
    ],
)
def test_defaults_of_keys_that_older_files_leave_out(header: GgufHeader, missing: str, field: str, value: Any) -> None:
    assert getattr(config_of(changed(header, **{missing: None})), field) == value


@pytest.mark.parametrize(
    "missing", ["embedding_length", "block_count", "context_length", "attention__layer_norm_rms_epsilon"]
)
def test_keys_that_have_no_default(header: GgufHeader, missing: str) -> None:
    with pytest.raises(ArtifactError, match=f"lacks the key llama.{missing.replace('__', '.')}"):
        config_of(changed(header, **{missing: None}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention__sliding_window", 4096),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.25),
        ("residual_scale", 0.2),
        ("embedding_scale", 12.0),
        ("attention__scale", 0.1),
        ("attention__clamp_kqv", 8.0),
        ("attention__max_alibi_bias", 8.0),
        ("attention__causal", False),
        ("expert_count", 8),
        ("use_parallel_residual", True),
        ("rope__dimension_sections", [16, 24, 24]),
        ("rope__scaling__alpha", 1000.0),
        ("a_key_of_tomorrow", 1),
        ("rope__dimension_count", 8),
        ("attention__value_length", 32),
    ],
)
def test_keys_that_change_the_model_are_refused(header: GgufHeader, key: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        config_of(changed(header, **{key: value}))
    assert key.replace("__", ".") in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention__sliding_window", 0),
        ("expert_count", 0),
        ("logit_scale", 1.0),
        ("attention__causal", True),
        ("attention__key_length", 16),
        ("tensor_data_layout", "Meta AI original pth"),
        ("rope__scaling__type", "none"),
        ("rope__scale_linear", 1.0),
    ],
)
def test_keys_that_change_nothing(header: GgufHeader, key: str, value: Any) -> None:
    assert config_of(changed(header, **{key: value})).to_dict() == config_of(header).to_dict()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"attention__head_count_kv": 3}, "4 heads of 16 features and 3 key/value heads"),
        ({"attention__key_length": 15, "rope__dimension_count": 15}, "heads of 15 features"),
        ({"context_length": 1 << 40}, "max_position_embeddings = 1099511627776"),
        ({"attention__layer_norm_rms_epsilon": 7.0}, "rms_norm_eps = 7.0"),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__freq_base": 1.0}, "rope_theta"),
    ],
)
def test_sizes_that_do_not_go_together(header: GgufHeader, values: dict[str, Any], says: str) -> None:
    with pytest.raises(ArtifactError, match=says) as caught:
        config_of(changed(header, **values))
    assert "config.json" not in str(caught.value)


def test_linear_scaling_of_old_files(header: GgufHeader) -> None:
    rope = config_of(changed(header, rope__scale_linear=2.0)).rope_parameters
    assert rope == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize("value", [0, -1, 1 << 63, 2.5, "64", True, [64, 64], float("nan")])
@pytest.mark.parametrize(
    "key", ["embedding_length", "attention__head_count", "attention__head_count_kv", "block_count"]
)
def test_sizes_that_no_model_has(header: GgufHeader, key: str, value: Any) -> None:
    with pytest.raises(ProcrustesError):
        source_of(changed(header, **{key: value})).reader()


@pytest.mark.parametrize("layers", [2, 4, 1_000_000, 1 << 62])
def test_layers_that_are_not_there(header: GgufHeader, layers: int) -> None:
    with pytest.raises(ArtifactError, match=f"block_count = {layers:,}, but tensors of 3 layers"):
        config_of(changed(header, block_count=layers))


@pytest.mark.parametrize("key", ["embedding_length", "feed_forward_length", "vocab_size"])
def test_sizes_that_the_tensors_have_not(header: GgufHeader, key: str) -> None:
    with pytest.raises(ArtifactError, match="the metadata of the GGUF file calls for"):
        source_of(changed(header, **{key: 4096, "attention__key_length": 16})).reader()


def source_of(header: GgufHeader) -> ModelSource:
    """A source of this header, whatever its file says."""
    source = ModelSource("m", "gguf", header.path.parent, header.path.name, "m.gguf", None)
    source.__dict__["_gguf_header"] = header
    return source


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"general.architecture": "gemma3"}, "the architecture 'gemma3'"),
        ({"general.architecture": "clip", "general.type": "mmproj"}, "a mmproj of the architecture 'clip'"),
        ({"general.architecture": 3}, "has no general.architecture"),
    ],
)
def test_architectures_that_are_not_supported(header: GgufHeader, values: dict[str, Any], says: str) -> None:
    with pytest.raises(ProcrustesError, match=says) as caught:
        config_of(replace(header, metadata=header.metadata | values))
    assert "config.json" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({}, 2),
        ({"eot_token_id": 7}, [2, 7]),
        ({"eot_token_id": 7, "eom_token_id": 9}, [2, 7, 9]),
        ({"eot_token_id": 2}, 2),
        ({"eot_token_id": 4_000_000}, 2),  # can never be generated
        ({"eos_token_id": None, "eot_token_id": 7}, 7),
        ({"eos_token_ids": np.array([5, 7])}, [2, 5, 7]),
    ],
)
def test_end_tokens(header: GgufHeader, tokens: dict[str, Any], expected: Any) -> None:
    metadata = header.metadata | {f"tokenizer.ggml.{key}": value for key, value in tokens.items()}
    given = {key: value for key, value in metadata.items() if value is not None}
    assert config_of(replace(header, metadata=given)).eos_token_id == expected


# What no key of the kind can hold, in the types that the reader gives.
NUMBERS, STRINGS = np.array([1, 2]), ["a", "b"]
WRONG: dict[str, list[Any]] = {
    "text": [3, -1, 2.5, True, STRINGS, NUMBERS, np.array([1.5])],
    "whole": ["3", 2.5, float("nan"), float("inf"), True, STRINGS, NUMBERS, np.array([1]), np.array([])],
    "positive": ["3", 0, -1, 2.5, float("nan"), float("inf"), True, STRINGS, NUMBERS, np.array([1]), np.array([])],
    "real": ["3", -1.0, float("nan"), float("inf"), True, STRINGS, NUMBERS, np.array([1.5])],
    "truth": ["true", 2.5, 2, STRINGS, NUMBERS, np.array([True, True])],
    "texts": [3, 2.5, True, "ab", NUMBERS, np.array([1.5])],
    "wholes": [3, 2.5, True, "12", STRINGS, np.array([1.5]), np.array([True])],
    "reals": [3, 2.5, True, "12", STRINGS],
}
KEYS = {
    "text": ["general.type", "general.name", "llama.rope.scaling.type"]
    + [f"tokenizer.{key}" for key in ("ggml.model", "ggml.pre", "chat_template")],
    "whole": ["general.alignment", "general.quantization_version", "split.count"]
    + [f"tokenizer.ggml.{key}_token_id" for key in ("bos", "eos", "eot", "eom", "unknown", "padding")],
    "positive": ["llama.embedding_length", "llama.context_length", "llama.rope.scaling.original_context_length"]
    + [f"llama.{key}" for key in ("block_count", "feed_forward_length", "attention.head_count", "vocab_size")]
    + [f"llama.attention.{key}" for key in ("head_count_kv", "key_length", "value_length")],
    "real": ["llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon", "llama.rope.scale_linear"]
    + [f"llama.rope.scaling.{key}" for key in ("factor", "attn_factor", "yarn_beta_fast", "yarn_beta_slow")],
    "truth": ["llama.rope.scaling.finetuned", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"],
    "texts": ["tokenizer.ggml.tokens", "tokenizer.ggml.merges"],
    "wholes": ["tokenizer.ggml.token_type", "tokenizer.ggml.eos_token_ids"],
    "reals": ["tokenizer.ggml.scores"],
}


@pytest.mark.parametrize("scaling", ["none", "yarn"])
def test_no_key_is_read_as_another_type(header: GgufHeader, scaling: str) -> None:
    """A value of the wrong type was an absent key, another value, or a traceback; each names its key now."""
    sound = header.metadata | {"llama.rope.scaling.type": scaling}
    for kind, keys in KEYS.items():
        for key in keys:
            for value in WRONG[kind]:
                with pytest.raises(ProcrustesError, match=r"is needed|is not understood") as caught:
                    config_of(replace(header, metadata=sound | {key: value}))
                assert key in str(caught.value), (key, value)


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix", ""])
def test_what_goes_with_a_model_is_none(header: GgufHeader, kind: str) -> None:
    with pytest.raises(UsageError, match=f"general.type = '{kind}', so it holds no model"):
        config_of(replace(header, metadata=header.metadata | {"general.type": kind}))
