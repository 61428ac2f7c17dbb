"""The description of each family, held against the Hugging Face model that it describes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from compress.errors import ArtifactError, ProcrustesError, UsageError
from compress.source import families
from compress.source.resolve import resolve
from tests import tiny

# The published configs, by size. Only shapes are made of them, so any size will do.
PUBLISHED: dict[str, PretrainedConfig] = {
    "opt-125m": OPTConfig(),
    "opt-13b": OPTConfig(hidden_size=5120, ffn_dim=20480, num_hidden_layers=40, num_attention_heads=40),
    "opt-66b": OPTConfig(hidden_size=9216, ffn_dim=36864, num_hidden_layers=64, num_attention_heads=72),
    "llama-2-7b": LlamaConfig(),
    "llama-3.2-1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "mistral-7b": MistralConfig(),
    "smollm2-135m": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "qwen3-0.6b": Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
}


def hf_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of the Hugging Face model; a tied head is listed once, as the embedding."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def described_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    architecture = families.architecture(config)
    return families.expected_shapes(architecture, families.tensor_names(architecture))


def test_tiny_models_leave_no_tensor_unaccounted(tiny_model_dir: Path) -> None:
    config = resolve(str(tiny_model_dir)).config()
    assert described_shapes(config) == hf_shapes(config)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_models_leave_no_tensor_unaccounted(name: str) -> None:
    assert described_shapes(PUBLISHED[name]) == hf_shapes(PUBLISHED[name])


def test_parameter_count_of_the_real_model() -> None:
    # 134,515,008 parameters: the figure that the model's authors publish.
    shapes = described_shapes(PUBLISHED["smollm2-135m"])
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 134_515_008


@pytest.mark.parametrize("name", sorted(tiny.CONFIGS))
def test_roles_name_the_projections_that_they_mean(name: str) -> None:
    config = tiny.config(name)
    architecture = families.architecture(config)
    model = tiny.model(name)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    described = [
        (linear.weight.removesuffix(".weight"), role, linear.bias is not None)
        for layer in families.tensor_names(architecture).layers
        for role, linear in layer.linears.items()
    ]
    assert sorted(name for name, _, _ in described) == sorted(linears)
    ends = {"attn.q": ("q_proj",), "attn.k": ("k_proj",), "attn.v": ("v_proj",)}
    ends |= {"attn.o": ("o_proj", "out_proj"), "mlp.gate": ("gate_proj",)}
    ends |= {"mlp.up": ("up_proj", "fc1"), "mlp.down": ("down_proj", "fc2")}
    for module_name, role, has_bias in described:
        module = linears[module_name]
        assert module_name.endswith(ends[role])
        assert (module.out_features, module.in_features) == architecture.linears()[role]
        assert (module.bias is not None) == has_bias


def test_facts_of_opt() -> None:
    architecture = families.architecture(tiny.config("tiny_opt"))
    assert (architecture.family, architecture.norm, architecture.norm_eps) == ("opt", "layernorm", 1e-5)
    assert (architecture.positions, architecture.position_offset) == ("learned", 2)
    assert architecture.rope is None
    assert architecture.activation == "relu"
    assert not architecture.gated
    assert architecture.tied
    model = tiny.model("tiny_opt")
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {architecture.norm_eps}  # not in the config, so the model says it


def test_facts_of_llama_like_models() -> None:
    qwen2, qwen3, mistral, llama3 = (
        families.architecture(tiny.config(name))
        for name in ("tiny_qwen2", "tiny_qwen3", "tiny_mistral", "tiny_llama3rope")
    )
    assert (qwen2.attention_bias, qwen2.output_bias, qwen2.mlp_bias) == (True, False, False)
    assert qwen3.qk_norm
    assert qwen3.head_dim * qwen3.num_heads != qwen3.hidden_size
    assert mistral.sliding_window == 8
    assert llama3.rope is not None
    assert (llama3.rope["rope_type"], llama3.rope["factor"], llama3.rope["rope_theta"]) == (
        "llama3",
        4.0,
        10000.0,
    )
    for architecture in (qwen2, qwen3, llama3):
        assert architecture.sliding_window is None


def test_pretraining_tp_changes_nothing() -> None:
    plain, split = (families.architecture(LlamaConfig(pretraining_tp=tp)) for tp in (1, 2))
    assert plain == split


def test_qwen_with_a_window_in_every_layer() -> None:
    config = Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=0)
    assert families.architecture(config).sliding_window == 64


def test_mistral_without_a_window() -> None:
    assert families.architecture(MistralConfig(sliding_window=None)).sliding_window is None


def test_galactica_has_no_biases_and_exact_gelu() -> None:
    config = OPTConfig(enable_bias=False, activation_function="gelu")
    assert families.architecture(config).activation == "gelu"
    assert described_shapes(config) == hf_shapes(config)


def with_rope(**rope: object) -> LlamaConfig:
    return LlamaConfig(rope_parameters={"rope_theta": 10000.0, **rope})


def with_attribute(config: PretrainedConfig, name: str, value: object) -> PretrainedConfig:
    setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (OPTConfig(do_layer_norm_before=False), "opt-350m"),
        (OPTConfig(word_embed_proj_dim=512, hidden_size=1024, num_attention_heads=16), "word_embed_proj_dim"),
        (OPTConfig(_remove_final_layer_norm=True), "_remove_final_layer_norm"),
        (OPTConfig(layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine"),
        (OPTConfig(activation_function="tanh"), "activation_function = 'tanh'"),
        (OPTConfig(hidden_size=70, word_embed_proj_dim=70), "multiple of num_attention_heads"),
        (LlamaConfig(hidden_act="relu6"), "hidden_act = 'relu6'"),
        (with_rope(rope_type="dynamic", factor=2.0), "'dynamic'"),
        (
            with_rope(
                rope_type="longrope",
                factor=2.0,
                short_factor=[1.0] * 64,
                long_factor=[1.0] * 64,
                original_max_position_embeddings=1024,
            ),
            "'longrope'",
        ),
        (with_attribute(LlamaConfig(head_dim=3), "rope_parameters", {"rope_type": "default"}), "head_dim = 3"),
        (
            with_attribute(LlamaConfig(), "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
            "partial_rotary_factor",
        ),
        (Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=2), "mixes kinds"),
        (
            Qwen3Config(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"]),
            "mixes kinds",
        ),
        (
            with_attribute(LlamaConfig(), "quantization_config", {"quant_method": "gptq", "bits": 4}),
            "quantization_config (gptq)",
        ),
    ],
)
def test_what_a_family_does_not_support_is_refused(config: PretrainedConfig, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        families.architecture(config)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LlamaConfig(num_hidden_layers=0), "num_layers = 0"),
        (LlamaConfig(num_attention_heads=32, num_key_value_heads=5), "multiple of the second"),
        (LlamaConfig(vocab_size=-1), "vocab_size = -1"),
    ],
)
def test_sizes_that_no_model_has_are_an_artifact_error(config: PretrainedConfig, says: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        families.architecture(config)
    assert says in str(caught.value)


@pytest.mark.parametrize("model_type", ["gpt2", "llama4", "Llama", "", "procrustes"])
def test_other_model_types_are_refused_with_exit_code_2(model_type: str) -> None:
    with pytest.raises(ProcrustesError) as caught:
        families.family_of(model_type)
    assert caught.value.exit_code == 2
    if model_type != "procrustes":
        assert all(supported in str(caught.value) for supported in families.supported_model_types())


def test_importing_the_registry_is_light() -> None:
    code = (
        "import sys, compress.source.families, compress.source.resolve\n"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("logit_scale", 0.25),
        ("logits_scaling", 8.0),
        ("residual_multiplier", 0.22),
        ("final_logit_softcapping", 30.0),
        ("query_pre_attn_scalar", 256),
        ("clip_qkv", 8.0),
        ("num_local_experts", 8),
        ("n_routed_experts", 64),
        ("use_qk_norm", True),
        ("position_embedding_type", "alibi"),
        ("no_rope_layers", [0, 1, 0]),
        ("rotary_pct", 0.25),
        ("partial_rotary_factor", 0.5),
        ("sliding_window", 16),
    ],
)
def test_keys_that_change_the_model_and_that_transformers_passes_over(key: str, value: object) -> None:
    config = tiny.config("tiny_llama").to_dict() | {key: value}
    with pytest.raises(UsageError, match=key):
        families.architecture(LlamaConfig(**config))


@pytest.mark.parametrize(
    ("key", "value"),
    [("logit_scale", 1.0), ("num_experts", None), ("alibi", False), ("sliding_window", 4096), ("some_note", "text")],
)
def test_keys_that_change_nothing(key: str, value: object) -> None:
    config = tiny.config("tiny_llama").to_dict() | {key: value}
    assert families.architecture(LlamaConfig(**config)) == families.architecture(tiny.config("tiny_llama"))


@pytest.mark.parametrize("key", ["attn_factor", "mscale", "alpha", "short_factor"])
def test_rotary_parameters_that_transformers_passes_over(key: str) -> None:
    config = tiny.config("tiny_llama")
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, key: 0.5}
    with pytest.raises(UsageError, match=key):
        families.architecture(config)


def test_marks_beside_the_rotary_parameters() -> None:
    config = tiny.config("tiny_llama")
    rope = {
        "rope_type": "linear",
        "rope_theta": 1e4,
        "factor": 2.0,
        "type": "linear",
        "finetuned": True,
        "mscale": None,
    }
    config.rope_parameters = dict(rope)
    assert families.architecture(config).rope == rope
