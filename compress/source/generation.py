"""What ends an answer, and generation_config.json: the union of both files' end tokens.

Chat models name their second end token (<|eot_id|>, <|im_end|>) in generation_config.json alone; a model that knows
only config.json's runs on past the end of its answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.artifact.reading import shown
from compress.errors import ArtifactError

GENERATION_CONFIG = "generation_config.json"


def end_tokens(vocab_size: int, said: Mapping[str, Any]) -> int | list[int] | None:
    """The end tokens that several files give together: None, one id, or several in the order in which they come.

    `said`: file -> its eos_token_id, which is absent (None), an id or a list. Ids outside of the vocabulary can never
    be generated and are left out. Raises ArtifactError for what is no id.
    """
    found: dict[int, None] = {}
    for file, value in said.items():
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if not isinstance(token, int) or isinstance(token, bool):
                raise ArtifactError(
                    f"{file} has eos_token_id = {shown(value)}, but a token id or a list of token ids is needed."
                )
            if 0 <= token < vocab_size:
                found[token] = None
    ids = list(found)
    return ids[0] if len(ids) == 1 else ids or None


def read_generation_config(folder: Path) -> dict[str, Any] | None:
    """The content of generation_config.json, None where `folder` has none. Raises ArtifactError when it is damaged."""
    from compress.source.weight_files import read_json

    path = folder / GENERATION_CONFIG
    return read_json(path) if os.path.lexists(path) else None


def write_generation_config(folder: Path, content: Mapping[str, Any] | None) -> None:
    """Write generation_config.json as the source has it; nothing for None.

    As it is, and not through transformers, which refuses to write values that it reads (temperature beside
    do_sample = false, as Llama 2 has it).
    """
    if content is not None:
        (folder / GENERATION_CONFIG).write_text(json.dumps(dict(content), indent=2, sort_keys=True) + "\n")
