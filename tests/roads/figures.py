"""Figures that every road must agree on: what is stored, and which tokens follow a prompt."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROMPTS = ("The mill stands where", "12 minutes", "A ferry crosses twice a day. The first crossing carries the mail")
NEW_TOKENS = 8
TOLERANCE = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 5e-2}
"""Of logits, relative to the largest, by the least type that they have been through; as in validate.parity.ladder."""


def stored_projections(folder: Path) -> int:
    """Numbers that a checkpoint's files have of projections and of what compression adds (skips, the map before a tied
    head, biases that the architecture has not): what --ratio is about. Counted in the headers, not in the config.

    As the structures count them, in numbers of 16 bits: 16 bits of a mask are one, an index is two.
    """
    config = json.loads((folder / "config.json").read_text())
    added = set(config.get("extra_biases") or ())
    total = 0.0
    for path in sorted(folder.glob("model*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, facts in header.items():
            stem, _, factor = name.removeprefix("model.").rpartition(".")
            count = math.prod(facts.get("shape", [0]))
            if stem == "head_map" and factor == "weight" and len(facts["shape"]) == 2:
                total += count
            elif stem.startswith("layers.") and not stem.endswith("norm") and (factor != "bias" or stem in added):
                total += count * {"mask": 0.5, "order": 2}.get(factor, 1)
    return int(total)


def files_of(folder: Path) -> dict[str, bytes]:
    """Name -> content."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@torch.inference_mode()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """(batch, length, vocabulary) float32."""
    logits: Tensor = model(ids, use_cache=False).logits
    return logits.float()


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of `a`."""
    return float((a - b).abs().max() / a.abs().max())


def assert_follows(model: Any, prompt: Sequence[int], tokens: Sequence[int], ends: Sequence[int], kind: str) -> None:
    """The tokens are the greedy ones of `model` after the prompt, but where two are as likely to within the tolerance
    of that type; there are NEW_TOKENS of them, or the last is an end token."""
    assert len(tokens) == NEW_TOKENS or (tokens and tokens[-1] in ends), f"stopped early: {tokens}, ends {ends}"
    assert not set(tokens[:-1]) & set(ends), f"ran on past an end token: {tokens}, ends {ends}"
    logits = logits_of(model, torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1]  # (tokens, vocabulary)
    gaps = logits.amax(-1) - logits[torch.arange(len(tokens)), torch.tensor(tokens)]
    room = 2 * TOLERANCE[kind] * logits.abs().max()
    assert float(gaps.max()) <= room, f"{tokens} are not greedy: gaps {gaps.tolist()}, tolerance {float(room)}"
