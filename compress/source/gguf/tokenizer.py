"""The tokenizer in a GGUF file: checked before transformers builds one from it, and completed after."""

from __future__ import annotations

from typing import Any

from compress.errors import ArtifactError, UsageError
from compress.progress import log
from compress.source.gguf.header import GgufHeader

# tokenizer.ggml.model of the architectures that are read: byte-level BPE, and sentencepiece's BPE.
_KINDS = ("gpt2", "llama")
# tokenizer.ggml.pre: how text is split before the merges. GPT-2's way, where each digit stands alone (llama.cpp's
# llama-vocab.cpp), which transformers does not know and splits as GPT-2 does;
_DIGITS = ("smollm", "starcoder", "refact", "codeshell", "command-r")
# and those that it splits rightly.
_KNOWN = (
    *("default", "gpt-2", "gpt2", "llama3", "llama-v3", "llama-bpe", "llama4", "falcon3", "falcon-h1", "pixtral"),
    *("midm-2.0", "lfm2", "dbrx", "smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"),
    *("qwen35", "gpt-4o", "kanana2", "talkie", "minimax-m2", "jina-v5-nano"),
)
_IDS = ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id")


def check_tokenizer(header: GgufHeader) -> None:
    """Raise ArtifactError when the file holds no tokenizer or one that does not add up, UsageError for other kinds."""
    found: dict[str, Any] = {
        key: header.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "tokens", "merges", "token_type", *_IDS)
    }
    tokens, merges, types = found["tokens"], found["merges"], found["token_type"]
    for key in ("model", "tokens"):
        if found[key] is None or len(found[key]) == 0:
            raise ArtifactError(
                f"The GGUF file {header.path} has no tokenizer (tokenizer.ggml.{key} is missing); take a file that has "
                "one, as llama.cpp's converter writes it."
            )
    if found["model"] not in _KINDS:
        raise UsageError(
            f"The GGUF file {header.path} has a tokenizer of the kind {found['model']!r:.100}, which is not supported; "
            f"supported are {', '.join(_KINDS)}."
        )
    if types is not None and len(types) != len(tokens):
        raise _damaged(header, f"it has {len(tokens):,} tokens, but token types for {len(types):,}")
    for merge in () if merges is None else merges:
        if merge.count(" ") != 1 or " " in (merge[0], merge[-1]):
            raise _damaged(header, f"the merge {merge!r:.100} is not a pair of tokens")
    for key in _IDS:
        value = found[key]
        if value is not None and not 0 <= value < len(tokens):
            raise _damaged(header, f"tokenizer.ggml.{key} is {value!r:.100}, and there are {len(tokens):,} tokens")


def split_as_trained(tokenizer: Any, header: GgufHeader) -> None:
    """Make `tokenizer`, built by transformers, split text in the file's way; a warning where that is not known."""
    from tokenizers import pre_tokenizers

    name = header.metadata.get("tokenizer.ggml.pre", "default")
    if header.metadata.get("tokenizer.ggml.model") != "gpt2" or name in _KNOWN:
        return
    if name not in _DIGITS:
        log(
            f"warning: {header.path} splits text in the way {name!r:.100} before it is tokenised, which is not known "
            "here: it is split as GPT-2 does, and some texts get other tokens than the model was trained on"
        )
        return
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _damaged(header: GgufHeader, why: str) -> ArtifactError:
    return ArtifactError(
        f"The tokenizer in the GGUF file {header.path} does not add up ({why}); download the file again, or take "
        "another conversion of the model."
    )
