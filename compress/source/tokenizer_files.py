"""The files of a tokenizer, which may come from anybody: bounds before transformers reads them, and a sentence for what
the Rust library behind it raises."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.artifact.reading import RefusedError, fault_of, read_bytes, read_json, reason, refuse_pointer, shown
from compress.config_values import Check, boolean, fault_of_fields, mapping, optional, text, whole
from compress.errors import ArtifactError, UsageError
from compress.lazy import require

# One of these must be there. Without any, transformers makes up an empty tokenizer instead of failing.
ANY_OF = ("tokenizer.json", "tokenizer.model", "vocab.json")
OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
TEXTS = ("merges.txt", "chat_template.jinja")
MAX_TEXT_BYTES = 32 << 20
MODELS = ("tokenizer.json", "tokenizer.model")
MAX_MODEL_BYTES = 256 << 20
"""Limit of a vocabulary with its merges; the largest known, of 262,000 tokens, takes 33 MB."""

MAX_TOKEN_ID = (1 << 31) - 1

PROBE = "It takes 2 words, <s>and a mark.\n"


def tokenizer_class(folder: Path, model_type: str, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """The class whose `from_pretrained` reads the tokenizer in `folder`, and the options to give it.

    Raises ArtifactError when there is none or its file is damaged, UsageError when it is code that is not trusted,
    MissingDependencyError when the package that reads tokenizer.model is not installed.
    """
    from transformers import AutoTokenizer, LlamaTokenizer

    present = [file for file in ANY_OF if (folder / file).is_file()]
    check_files(folder)
    config = folder / "tokenizer_config.json"
    said = read_json(config, unique=False) if config.is_file() else {}
    if "tokenizer.json" in present:
        return AutoTokenizer, {}  # complete by itself, whatever class it was written by
    if "auto_map" in said:  # whose files may have any name
        if trust_remote_code:
            return AutoTokenizer, {}
        raise UsageError(
            f"The tokenizer in {folder} is Python code of the model's authors (auto_map in tokenizer_config.json), "
            "which is not run unless you say so: read it, then add --trust-remote-code; or save the tokenizer as "
            "tokenizer.json."
        )
    if not present:
        raise ArtifactError(
            f"The folder {folder} has no tokenizer: one of {', '.join(ANY_OF)} is needed; copy the original model's "
            "tokenizer files there."
        )
    if present == ["tokenizer.model"]:
        named = str(said.get("tokenizer_class", "LlamaTokenizer" if model_type in ("llama", "mistral") else ""))
        if _check_model(folder / "tokenizer.model") and named.removesuffix("Fast") == "LlamaTokenizer":
            # Where nothing names a class, transformers 5 takes one that adds no leading space, and no BOS unless
            # it is asked for: Llama's own tokenizer, and that of transformers 4, does both.
            return LlamaTokenizer, {} if "add_bos_token" in said else {"add_bos_token": True}
    return AutoTokenizer, {}


def _check_model(path: Path) -> bool:
    """True if `path` is of sentencepiece, not of tiktoken (Llama 3's original files); its package is there."""
    with path.open("rb") as file:
        is_sentencepiece = file.read(1) == b"\n"  # the first field of the protocol buffer; tiktoken's is base64
    if not is_sentencepiece:
        require("tiktoken", pip="'procrustes-llm[tiktoken]'", purpose=f"read {path}, a tokenizer in tiktoken's format")
        return False
    sentencepiece = require("sentencepiece", pip="'sentencepiece>=0.2'", purpose=f"read {path}")
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, ValueError) as error:
        raise ArtifactError(
            f"The tokenizer file {path} cannot be read ({reason(error)}); it is truncated or damaged: download it "
            "again."
        ) from error
    return True


def check_files(folder: Path) -> None:
    """Raise ArtifactError for a file of the tokenizer in `folder` that is no file, too large, or not of its kind."""
    for name in (*OBJECTS, *TEXTS, *MODELS):
        path = folder / name
        if not os.path.lexists(path):
            continue
        if fault_of(path) is None:
            refuse_pointer(path)
        try:
            if name in OBJECTS:
                # transformers has written a key twice itself, and reads such files.
                if not isinstance(value := read_json(path, unique=False), dict):
                    raise RefusedError(f"is not a JSON object but {shown(value)}")
                if (fault := _fault_of(name, value)) is not None:
                    raise RefusedError(f"gives {fault}")
            elif name in TEXTS:
                read_bytes(path, MAX_TEXT_BYTES).decode()
            elif (fault := fault_of(path)) is not None:
                raise RefusedError(fault)
            elif path.stat().st_size > MAX_MODEL_BYTES:
                raise RefusedError(f"has more than the {MAX_MODEL_BYTES:,} bytes that such a file can need")
        except UnicodeDecodeError as error:
            raise _damaged(path, f"is not UTF-8 text ({error.reason} at offset {error.start})") from error
        except RefusedError as error:
            raise _damaged(path, str(error)) from error


def _fault_of(name: str, value: Mapping[str, Any]) -> str | None:
    """What no tokenizer can have in one of OBJECTS, in the words of `fault_of_fields`; None where there is nothing."""
    if name in ("added_tokens.json", "vocab.json"):
        needed = whole(MAX_TOKEN_ID, smallest=0)
        return next((f"{shown(k)} = {shown(v)}, but {why}" for k, v in value.items() if (why := needed(v))), None)
    return fault_of_fields(value, FIELDS)


def _token(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, Mapping) else value
    return None if isinstance(content, str) else "a string, or an object with the string `content`, is needed"


def _tokens(value: Any) -> str | None:
    tokens = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [None]
    return None if not any(map(_token, tokens)) else "a list of tokens, each a string or an object, is needed"


def _added(value: Any) -> str | None:
    sound = isinstance(value, Mapping) and all(
        key.isdecimal() and isinstance(token, Mapping) and not _token(token) for key, token in value.items()
    )
    return None if sound else "an object of token ids is needed, each with an object that has the string `content`"


def _template(value: Any) -> str | None:
    named = value if isinstance(value, list) else []
    if isinstance(value, str) or (
        named
        and all(isinstance(n, Mapping) and isinstance(n.get("name"), str) for n in named)
        and all(isinstance(n.get("template"), str) for n in named)
    ):
        return None
    return "a string, or a list of objects with the strings `name` and `template`, is needed"


def _length(value: Any) -> str | None:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return None if plain and value > 0 else "a number above 0 is needed"


FIELDS: dict[str, Check] = {
    **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"), optional(_token)),
    "mask_token": optional(_token),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), optional(_tokens)),
    "added_tokens_decoder": optional(_added),
    "chat_template": optional(_template),
    "model_max_length": optional(_length),  # 1e30 stands for none
    "tokenizer_class": optional(text),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "legacy"), optional(boolean)),
    "auto_map": optional(mapping),
}
"""Key of tokenizer_config.json or special_tokens_map.json -> what it may hold where it is given."""


def check_use(tokenizer: Any) -> None:
    """Use the tokenizer once, as calibration and the checkpoint will: what is wrong with it shows now.

    Raises RefusedError when it cannot take a text apart and put it together again, and whatever transformers raises
    for a value of tokenizer_config.json that has the wrong type.
    """
    with rust_errors():
        ids = tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"]
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise RefusedError(f"gives no list of tokens for a text but {shown(ids)}")
        if not ids:
            raise RefusedError("gives no token at all for a text")
        tokenizer.decode(ids)
        tokenizer(PROBE, verbose=False)


@contextmanager
def _held_back(stream: int) -> Iterator[None]:
    """Write what is written to this descriptor when the block ends, and not at all when it ends in a panic."""
    try:
        real = os.dup(stream)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        yield  # closed: nothing can be written there
        return
    panic = False
    with tempfile.TemporaryFile() as held:
        if sys.stderr:  # None where it was closed at the start
            sys.stderr.flush()
        os.dup2(held.fileno(), stream)
        try:
            yield
        except BaseException as error:
            panic = type(error).__name__ == "PanicException"
            raise
        finally:
            if sys.stderr:  # None where it was closed at the start
                sys.stderr.flush()
            os.dup2(real, stream)
            os.close(real)
            held.seek(0)
            while not panic and (piece := held.read(1 << 16)):
                os.write(stream, piece)


@contextmanager
def rust_errors() -> Iterator[None]:
    """What the library tokenizers raises, a plain Exception or Rust's panic, as RefusedError. What a panic writes to
    the standard error stream by itself is dropped; what else is written there comes at the end of the block."""
    try:
        with _held_back(2):
            yield
    except BaseException as error:
        if type(error) is Exception or type(error).__name__ == "PanicException":
            raise RefusedError(f"is refused by the library tokenizers ({reason(error)})") from error
        raise


def _damaged(path: Path, fault: str) -> ArtifactError:
    return ArtifactError(f"The file {path} {fault}; copy the original model's tokenizer files there.")
