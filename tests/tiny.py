"""Tiny random models with a real tokenizer, written as Hugging Face checkpoints: what most tests run on.

Nothing is left at a value that hides a mistake: norm scales are not 1, biases are not 0, the embedding has a
mean that is not 0, and logits spread over several units. The same name always gives the same weights.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCAB_SIZE = 320
MAX_POSITIONS = 128

TEXT = """\
The mill stands where the river bends, a mile below the bridge. In winter the wheel is still, and ice hangs
from its boards; in spring the water comes down brown and loud, and the miller opens the gate by one hand's
width. A stone that turns too fast burns the flour, and a stone that turns too slowly leaves the bran in it.
So he listens more than he looks. The pitch of the stone tells him the speed, the smell tells him the heat,
and the dust on the beam tells him how long it is since anyone swept.

Rotating a set of points changes none of the distances between them. Given two sets and the pairs that
belong together, the rotation that brings the first closest to the second follows from one singular value
decomposition: multiply one set by the transpose of the other, take the singular vectors, and drop the
singular values. What is left over after the rotation is the part that no rotation can explain. The name
comes from an inn-keeper who made his guests fit the bed, and who was in the end made to fit it himself.

A ferry crosses twice a day. The first crossing carries the mail, the bread and the people who work in the
town; the second carries them back. If there is fog the captain rings a bell every minute, counts to three,
and listens for the bell on the far side. 12 minutes is a good crossing, 20 is a slow one, and once, in
1962, it took 7 hours. Nobody was hurt. They shared the bread, sorted the mail, and by the evening everyone
on board knew everyone else.

To measure a machine you must first leave it alone. Close what else is running, wait until the fan is quiet,
and run the thing you measure more than once: the first run fills the caches, the second finds them full.
Take the median and not the mean, for one slow run out of ten says more about the machine than about the
program. Then change one thing, and only one, and measure again, the old way and the new way in turn, so
that a warm afternoon is as kind to both of them.
"""
"""Some prose, about 2,000 characters: the tokenizer is trained on it, and it serves as text to run."""


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `TEXT`: encodes any text, fewer than VOCAB_SIZE tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 8,  # as real models have it: the table is padded past the tokenizer's last id
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=MAX_POSITIONS,
    )


_IDS = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _opt(**options: object) -> PretrainedConfig:
    defaults: dict[str, object] = {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "architectures": ["OPTForCausalLM"],
    }
    return OPTConfig(**{**_IDS, **defaults, **options})


def _llama_like(config: Callable[..., PretrainedConfig], **options: object) -> PretrainedConfig:
    defaults: dict[str, object] = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
    }
    return config(**{**_IDS, **defaults, **options})


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "tiny_opt": lambda: _opt(),
    "tiny_opt_untied": lambda: _opt(tie_word_embeddings=False),
    "tiny_llama": lambda: _llama_like(LlamaConfig),
    "tiny_llama_tied": lambda: _llama_like(LlamaConfig, tie_word_embeddings=True),
    # Every bias that a Llama config can ask for, o and mlp included; full multi-head attention.
    "tiny_llama_bias": lambda: _llama_like(LlamaConfig, attention_bias=True, mlp_bias=True, num_key_value_heads=4),
    "tiny_llama3rope": lambda: _llama_like(
        LlamaConfig,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "tiny_qwen2": lambda: _llama_like(Qwen2Config, tie_word_embeddings=True),
    # 4 heads of 24 on a stream of 64: q is wider than the stream, as in Qwen3-0.6B.
    "tiny_qwen3": lambda: _llama_like(Qwen3Config, head_dim=24),
    # A window that the tests' sequences exceed.
    "tiny_mistral": lambda: _llama_like(MistralConfig, sliding_window=8),
}
"""Name -> config of every tiny model."""


def config(name: str) -> PretrainedConfig:
    """The config of a tiny model."""
    return CONFIGS[name]()


def model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model with random weights, in eval mode; the values are drawn in float32 whatever the dtype."""
    module = AutoModelForCausalLM.from_config(config(name), dtype=torch.float32)
    randomize(module, seed=zlib.crc32(name.encode()))
    return module.to(dtype).eval()


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int) -> None:
    """Overwrite every parameter by random values of the sizes that trained models have."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: torch.Tensor, std: float, mean: float = 0.0) -> None:
        parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))

    for name, parameter in module.named_parameters():
        if "embed_positions" in name:
            normal(parameter, 0.2)
        elif "embed_tokens" in name or "lm_head" in name:
            normal(parameter, 0.3, mean=0.1)
        elif "norm" in name and name.endswith("weight"):
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
        elif name.endswith("bias"):
            normal(parameter, 0.2)
        else:
            normal(parameter, parameter.shape[1] ** -0.5)


def write(name: str, folder: Path, max_shard_size: str = "1GB") -> Path:
    """Write a tiny model and its tokenizer to `folder` as a safetensors checkpoint; return `folder`."""
    model(name).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer().save_pretrained(folder)
    return folder


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them special: (batch, length), int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE - 8, (batch, length), generator=generator)


def write_gguf(
    name: str,
    path: Path,
    metadata: Callable[[Any], None] | None = None,
    quantize: str = "F32",
    tensors: dict[str, Any] | None = None,
) -> Path:
    """Write a tiny model and its tokenizer as a GGUF file, as llama.cpp's converter would.

    `metadata` gets the writer, to add keys; `quantize` is the storage type of the linears; `tensors` are added. A
    llama3 scaling is written as the converter does, as the tensor rope_freqs.weight.
    """
    import gguf

    source = config(name)
    parameters = {n: p.detach() for n, p in model(name).named_parameters()}
    bpe = json.loads(tokenizer().backend_tokenizer.to_str())["model"]
    architecture = {"mistral": "llama"}.get(source.model_type, source.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_context_length(source.max_position_embeddings)
    writer.add_embedding_length(source.hidden_size)
    writer.add_block_count(source.num_hidden_layers)
    writer.add_feed_forward_length(source.intermediate_size)
    writer.add_head_count(source.num_attention_heads)
    writer.add_head_count_kv(source.num_key_value_heads)
    writer.add_layer_norm_rms_eps(source.rms_norm_eps)
    writer.add_rope_freq_base(source.rope_parameters["rope_theta"])
    head_dim = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
    if head_dim * source.num_attention_heads != source.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_vocab_size(source.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    tokens.append("<|endoftext|>")  # transformers adds it to every GGUF tokenizer of this kind that lacks it
    tokens += [f"<unused{i}>" for i in range(VOCAB_SIZE - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (VOCAB_SIZE - 3))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if quantize != "F32":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if metadata is not None:
        metadata(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], source.num_hidden_layers)
    heads = {"q_proj": source.num_attention_heads, "k_proj": source.num_key_value_heads}
    extra = dict(tensors or {})
    if source.rope_parameters.get("rope_type") == "llama3":
        extra["rope_freqs.weight"] = llama3_divisors(source.rope_parameters, head_dim)
    for stored, values in extra.items():
        writer.add_tensor(stored, values)
    for parameter_name, parameter in parameters.items():
        stem, _, suffix = parameter_name.rpartition(".")
        for projection, count in heads.items():
            if stem.endswith(projection) and architecture == "llama":
                # (heads, 2, half, d) -> (heads, half, 2, d): GGUF rotates neighbours, HF the two halves.
                shape = parameter.shape
                parameter = parameter.reshape(count, 2, shape[0] // count // 2, -1).transpose(1, 2).reshape(shape)
        values, kind = parameter.contiguous().numpy(), None
        if quantize != "F32" and parameter.ndim == 2 and parameter.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType[quantize]
            values = gguf.quantize(values, kind)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_divisors(rope: dict[str, Any], head_dim: int) -> Any:
    """What llama.cpp's converter writes as rope_freqs.weight, in its float32: (head_dim / 2,)."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    found = []
    for wavelength in 2 * math.pi / frequencies:
        if wavelength < rope["original_max_position_embeddings"] / rope["high_freq_factor"]:
            found.append(torch.tensor(1.0))
        elif wavelength > rope["original_max_position_embeddings"] / rope["low_freq_factor"]:
            found.append(torch.tensor(rope["factor"]))
        else:
            waves = rope["original_max_position_embeddings"] / wavelength
            smooth = (waves - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.stack(found).to(torch.float32).numpy()
