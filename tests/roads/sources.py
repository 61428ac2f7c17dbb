"""Every kind of source that a model may come from, written from one tiny model: folders, GGUF files, a hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from tests import tiny
from tests.fake_hub import serve
from tests.roads.sentencepiece import write_pieces

SHARD = 100_000
"""Bytes of a shard: some three tensors of a tiny model."""

Write = Callable[[str, Path], None]


def _safetensors(name: str, folder: Path) -> None:
    tiny.model(name).save_pretrained(folder)


def _sharded(name: str, folder: Path) -> None:
    tiny.model(name).save_pretrained(folder, max_shard_size=SHARD)


def _bin(name: str, folder: Path) -> None:
    """As transformers wrote until 4.35: one pickle of tensors."""
    model = tiny.model(name)
    model.config.save_pretrained(folder)
    torch.save(_state(model), folder / "pytorch_model.bin")


def _sharded_bin(name: str, folder: Path) -> None:
    model = tiny.model(name)
    model.config.save_pretrained(folder)
    state, shards = _state(model), list[dict[str, torch.Tensor]]()
    for key, tensor in state.items():
        if not shards or sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD:
            shards.append({})
        shards[-1][key] = tensor
    files = {f"pytorch_model-{i + 1:05d}-of-{len(shards):05d}.bin": shard for i, shard in enumerate(shards)}
    for file, shard in files.items():
        torch.save(shard, folder / file)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in state.values())},
        "weight_map": {key: file for file, shard in files.items() for key in shard},
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What save_pretrained stores: a tied head once."""
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    return state


ENTRIES: dict[str, Write] = {
    "model.safetensors": _safetensors,
    "model.safetensors.index.json": _sharded,
    "pytorch_model.bin": _bin,
    "pytorch_model.bin.index.json": _sharded_bin,
}
"""First file of a folder's weights -> what writes such a folder; as compress.source.weight_files.ENTRIES."""

SOURCES = (*ENTRIES, "gguf", "hub")
"""Folders by their first file, and the other values of compress.source.model.Kind."""


# --- Tokenizers ---


def _tokenizer_json(folder: Path) -> None:
    tiny.tokenizer().save_pretrained(folder)


def _vocab_json(folder: Path) -> None:
    """As GPT-2 and OPT have it: vocab.json and merges.txt."""
    bpe = json.loads(tiny.tokenizer().backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in bpe["merges"]))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))


def _tokenizer_model(folder: Path) -> None:
    """As Llama 1 and 2 have it: a sentencepiece model."""
    write_pieces(folder / "tokenizer.model")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **special}))


TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "tokenizer.json": _tokenizer_json,
    "vocab.json": _vocab_json,
    "tokenizer.model": _tokenizer_model,
}
"""First file of a tokenizer -> what writes it; as compress.source.tokenizer_files.ANY_OF."""
MODELS_OF = {
    "vocab.json": ("opt", "llama", "qwen2", "qwen3"),
    "tokenizer.model": ("llama", "mistral"),
}
"""Model types whose repositories have had tokenizers without a tokenizer.json; transformers goes by both."""


# --- GGUF ---

GGUF: dict[str, str] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""model_type -> architecture of the GGUF files of such models."""
NOT_IN_GGUF = {"opt": "llama.cpp has no OPT", "mistral": "llama.cpp writes it as a llama, without a window"}


def write_gguf(name: str, path: Path) -> None:
    """A tiny model and its tokenizer as a float32 GGUF file, as llama.cpp's converter would."""
    import gguf

    config = tiny.config(name)
    architecture = GGUF[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    names = gguf.get_tensor_name_map(
        {label: arch for arch, label in gguf.MODEL_ARCH_NAMES.items()}[architecture], config.num_hidden_layers
    )
    for parameter_name, parameter in _state(tiny.model(name)).items():
        stem, _, suffix = parameter_name.rpartition(".")
        if architecture == "llama":
            parameter = _neighbours(parameter, stem, config)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", parameter.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def head_dim(config: PretrainedConfig) -> int:
    """Of any config of the Llama family."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@cache
def in_gguf(name: str) -> bool:
    """Whether a tiny model can be told in a GGUF file: Llama files have no biases, nor (here) a rotary scaling."""
    config = tiny.config(name)
    plain = not getattr(config, "attention_bias", False) and not getattr(config, "mlp_bias", False)
    rope = getattr(config, "rope_parameters", None) or {}
    return config.model_type in GGUF and plain and rope.get("rope_type") == "default"


def _neighbours(parameter: torch.Tensor, stem: str, config: PretrainedConfig) -> torch.Tensor:
    """(heads, 2, half, d) -> (heads, half, 2, d): llama.cpp's llama rotates neighbours, Hugging Face's the halves."""
    for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if stem.endswith(projection):
            width = parameter.shape[-1]
            return parameter.view(heads, 2, -1, width).transpose(1, 2).reshape(-1, width)
    return parameter


def _add_tokenizer(writer: object) -> None:
    import gguf

    assert isinstance(writer, gguf.GGUFWriter)
    bpe = json.loads(tiny.tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    tokens.append("<|endoftext|>")  # transformers adds it to every GGUF tokenizer of this kind that lacks it
    tokens += [f"<unused{i}>" for i in range(tiny.VOCAB_SIZE - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (tiny.VOCAB_SIZE - 3))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


# --- All of them ---


@contextmanager
def source(kind: str, name: str, tokenizer: str, folder: Path) -> Iterator[str]:
    """Write the tiny model `name` as a source of that kind below `folder`; what --model takes is yielded."""
    folder.mkdir(parents=True)
    if kind == "gguf":
        write_gguf(name, folder / f"{name}.gguf")
        yield str(folder / f"{name}.gguf")
        return
    model = folder / name
    model.mkdir()
    ENTRIES.get(kind, _safetensors)(name, model)
    TOKENIZERS[tokenizer](model)
    if kind != "hub":
        yield str(model)
        return
    with serve() as hub, pytest.MonkeyPatch.context() as patch:
        hub.repositories[f"roads/{name}"] = model
        constants = "huggingface_hub.constants."
        patch.setattr(constants + "ENDPOINT", hub.url)
        patch.setattr(constants + "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants + "HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr(constants + "HF_HUB_OFFLINE", False)
        patch.setattr(constants + "HF_HUB_DISABLE_XET", True)
        yield f"hf:roads/{name}"
    shutil.rmtree(folder / "cache", ignore_errors=True)
