"""Rotary scaling of GGUF files: the very frequencies of transformers, and nothing that is not understood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compress.errors import UsageError
from compress.source.gguf.header import GgufHeader
from compress.source.gguf.rope import Llama3, rope_parameters
from compress.source.resolve import resolve
from tests import tiny

LLAMA_3_1 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def frequencies(rope: dict[str, Any], head_dim: int, context: int) -> tuple[torch.Tensor, float]:
    """inv_freq (head_dim / 2,) and attention factor that transformers computes for these parameters."""
    config = LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=context, rope_parameters=dict(rope)
    )
    if rope["rope_type"] == "default":
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim), 1.0
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))


def header(
    monkeypatch: pytest.MonkeyPatch, divisors: np.ndarray | None, *, context: int = 131072, architecture: str = "llama"
) -> GgufHeader:
    """A header with this context length, whose rope_freqs.weight holds `divisors`."""
    from compress.source.gguf import weights

    monkeypatch.setattr(weights, "read_tensor", lambda header, name: divisors)
    tensors: dict[str, Any] = {} if divisors is None else {"rope_freqs.weight": None}
    metadata = {"general.architecture": architecture, f"{architecture}.context_length": context}
    return GgufHeader(Path("m.gguf"), metadata, tensors)


@pytest.mark.parametrize(
    ("base", "head_dim", "context", "scaling"),
    [
        (500000.0, 128, 131072, LLAMA_3_1),  # Llama 3.1 8B and 70B, 3.3
        (500000.0, 64, 131072, LLAMA_3_1 | {"factor": 32.0}),  # Llama 3.2 1B
        (500000.0, 128, 131072, LLAMA_3_1 | {"factor": 32.0}),  # 3B
        (
            10000.0,
            16,
            128,
            {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | {"original_max_position_embeddings": 32},
        ),
        (100000.0, 96, 65536, LLAMA_3_1 | {"factor": 16.0, "original_max_position_embeddings": 4096}),
    ],
)
def test_llama3_is_recovered_to_the_number(
    base: float, head_dim: int, context: int, scaling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = {"rope_type": "llama3", "rope_theta": base} | scaling
    file = header(monkeypatch, tiny.llama3_divisors(rope, head_dim), context=context)
    assert rope_parameters(file, {"type": "none"}, base=base, head_dim=head_dim) == rope
    assert rope_parameters(file, {}, base=base, head_dim=head_dim) == rope


@pytest.mark.parametrize(
    "scaling",
    [
        {"factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 7.0, "original_max_position_embeddings": 6000},
        {"factor": 3.0, "low_freq_factor": 2.0, "high_freq_factor": 2.5, "original_max_position_embeddings": 20000},
        {"factor": 40.0, "low_freq_factor": 1.0, "high_freq_factor": 1.001, "original_max_position_embeddings": 8192},
    ],
)
def test_thresholds_of_no_known_model(scaling: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Length and thresholds have a scale in common, so the parameters may differ; the frequencies may not.
    rope = {"rope_type": "llama3", "rope_theta": 500000.0} | scaling
    file = header(monkeypatch, tiny.llama3_divisors(rope, 128))
    found = rope_parameters(file, {}, base=500000.0, head_dim=128)
    expected, _ = frequencies(rope, 128, 131072)
    torch.testing.assert_close(frequencies(found, 128, 131072)[0], expected, rtol=1e-5, atol=0)


def test_the_formula_is_that_of_transformers_in_float64() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0} | LLAMA_3_1
    plain = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    expected, _ = frequencies(rope, 128, 131072)
    found = plain / Llama3(8.0, 1.0, 4.0, 8192).divisors(plain)
    np.testing.assert_allclose(found, expected.double().numpy(), rtol=1e-6)


@pytest.mark.parametrize("value", [1.0, 4.0])
def test_one_factor_for_all_frequencies(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rope_parameters(header(monkeypatch, np.full(8, value, np.float32)), {}, base=1e4, head_dim=16)
    expected: dict[str, Any] = {"rope_type": "default"} if value == 1 else {"rope_type": "linear", "factor": value}
    assert found == expected | {"rope_theta": 1e4}


@pytest.mark.parametrize(
    "divisors",
    [
        np.arange(1, 9),
        np.arange(8, 0, -1),
        [1, 1, 3, 1, 4, 4, 4, 4],
        [1, 1, 1, 2, 2.1, 3.9, 4, 4],
        np.ones(7),
        [0] * 8,
        [-1] * 8,
    ],
)
def test_factors_that_no_scaling_gives(divisors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"rope_freqs\.weight"):
        rope_parameters(header(monkeypatch, np.asarray(divisors, np.float32)), {}, base=1e4, head_dim=16)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({}, {"rope_type": "default"}),
        ({"type": "none", "factor": 4.0}, {"rope_type": "default"}),
        ({"type": "linear"}, {"rope_type": "default"}),
        ({"type": "linear", "factor": 4.0, "finetuned": True}, {"rope_type": "linear", "factor": 4.0}),
        ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),  # llama.cpp's default type
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        (
            {"type": "yarn", "factor": 4.0, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "yarn_ext_factor": 1.0},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "original_max_position_embeddings": 128,
            },
        ),
        (
            {"type": "yarn", "factor": np.e, "attn_factor": 0.5, "original_context_length": 32},
            {"rope_type": "yarn", "factor": np.e, "attention_factor": 0.55, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_scaling_in_the_metadata(
    scaling: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rope_parameters(header(monkeypatch, None, context=128), scaling, base=1e4, head_dim=16)
    assert found.keys() == expected.keys() | {"rope_theta"}
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value) if isinstance(value, float) else value)


def yarn_of_llama_cpp(base: float, head_dim: int, factor: float, original: int, fast: float, slow: float) -> np.ndarray:
    """Angles a position as ggml's rope_yarn computes them (ops.cpp), in float64: (head_dim / 2,)."""

    def pair(turns: float) -> float:
        return head_dim * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(base))

    low, high = max(0.0, np.floor(pair(fast))), min(head_dim - 1.0, np.ceil(pair(slow)))
    i = np.arange(head_dim // 2)
    ramp = 1 - np.clip((i - low) / max(0.001, high - low), 0, 1)
    plain = base ** (-2 * i / head_dim)
    return plain / factor * (1 - ramp) + plain * ramp


@pytest.mark.parametrize(("fast", "slow"), [(32.0, 1.0), (8.0, 2.0)])
def test_yarn_rotates_as_llama_cpp_does(fast: float, slow: float, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 32768} | {
        "yarn_beta_fast": fast,
        "yarn_beta_slow": slow,
    }
    rope = rope_parameters(header(monkeypatch, None), scaling, base=1e6, head_dim=128)
    found, attention = frequencies(rope, 128, 131072)
    expected = yarn_of_llama_cpp(1e6, 128, 4.0, 32768, fast, slow)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-5)
    assert attention == pytest.approx(1 + 0.1 * np.log(4.0))


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("attention", [None, 0.5])
def test_attention_factor_of_yarn(factor: float, attention: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """get_mscale of llama.cpp (llama-context.cpp) and of transformers: 1 up to a factor of 1, by whatever the file
    multiplies it. Frequencies below a factor of 1 are compressed by the same formula."""
    scaling = {"type": "yarn", "factor": factor, "original_context_length": 32768}
    rope = rope_parameters(
        header(monkeypatch, None), scaling | ({"attn_factor": attention} if attention else {}), base=1e6, head_dim=128
    )
    found, scale = frequencies(rope, 128, 131072)
    plain, default = frequencies(rope | {"attention_factor": None}, 128, 131072)
    assert scale == pytest.approx((attention or 1.0) * default)
    assert default == (1.0 if factor <= 1 else pytest.approx(1 + 0.1 * np.log(factor)))
    assert torch.equal(found, plain)
    np.testing.assert_allclose(found.double().numpy(), yarn_of_llama_cpp(1e6, 128, factor, 32768, 32.0, 1.0), rtol=1e-5)


@pytest.mark.parametrize("original", [0, -1, 2.5, True, "8192", ["8192"], np.array([8192])], ids=repr)
@pytest.mark.parametrize("scaling", [{}, {"type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 4.0}], ids=str)
def test_an_original_length_that_is_none(
    original: Any, scaling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    divisors = None if scaling else tiny.llama3_divisors({"rope_theta": 500000.0} | LLAMA_3_1, 128)
    with pytest.raises(UsageError, match="original_context_length = "):
        rope_parameters(
            header(monkeypatch, divisors), scaling | {"original_context_length": original}, base=5e5, head_dim=128
        )


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "longrope"},
        {"type": 3},
        {"type": "linear", "factor": "4"},
        {"type": "linear", "factor": float("nan")},
        {"type": "linear", "factor": -1.0},
        {"type": "linear", "factor": 2.0, "attn_factor": 0.5},
        {"type": "yarn", "factor": 4.0, "yarn_log_multiplier": 0.1},
        {"type": "yarn", "factor": 4.0, "yarn_ext_factor": 0.5},
        {"alpha": 1000.0},
        {"something_new": 1},
    ],
)
def test_scaling_that_is_not_understood(scaling: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="rotary scaling that is not understood"):
        rope_parameters(header(monkeypatch, None), scaling, base=1e4, head_dim=16)


@pytest.mark.parametrize(
    ("architecture", "scaling"),
    [
        ("llama", {"type": "linear", "factor": 2.0}),
        ("llama", {"type": "yarn", "factor": 1.0, "attn_factor": 0.5}),
        ("llama", {"type": "yarn", "factor": 1.0, "yarn_beta_fast": 16.0}),
        ("qwen2", {}),
    ],
)
def test_two_scalings_at_once(architecture: str, scaling: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    file = header(monkeypatch, np.ones(8, np.float32), architecture=architecture)
    with pytest.raises(UsageError, match=r"rope_freqs\.weight"):
        rope_parameters(file, scaling, base=1e4, head_dim=16)


def test_logits_of_a_llama_3_1_file(tmp_path: Path) -> None:
    """From the file to the logits: what was dropped without a word (logits off by half their range)."""
    source = resolve(str(tiny.write_gguf("tiny_llama3rope", tmp_path / "m.gguf")))
    assert source.config().rope_parameters == tiny.config("tiny_llama3rope").rope_parameters
    assert source.architecture().rope == tiny.config("tiny_llama3rope").rope_parameters
    ids = tiny.token_ids(2, 100)
    with torch.no_grad():
        expected = tiny.model("tiny_llama3rope", torch.float64)(ids).logits
        found = source.reference_model(torch.float64)(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_logits_of_a_scaled_qwen(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "yarn":
        rope |= {"original_max_position_embeddings": 32}

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(32)

    source = resolve(str(tiny.write_gguf("tiny_qwen2", tmp_path / "m.gguf", add)))
    plain = tiny.CONFIGS["tiny_qwen2"]

    def scaled() -> Any:
        config = plain()
        config.rope_parameters = rope
        return config

    monkeypatch.setitem(tiny.CONFIGS, "tiny_qwen2", scaled)
    ids = tiny.token_ids(2, 100)
    with torch.no_grad():
        expected = tiny.model("tiny_qwen2", torch.float64)(ids).logits
        found = source.reference_model(torch.float64)(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
