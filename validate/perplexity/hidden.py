"""The final hidden states of one model on a set of windows, computed once and kept in a file.

A table of methods compares each of them with the same dense model on the same text. What its head reads takes
length x d numbers a window, its logits length x vocabulary: the former are kept, the head runs again.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.artifact.files import fsync
from compress.artifact.state import mapped, mapped_anew
from compress.progress import log

if TYPE_CHECKING:
    from compress.model.decoder import ProcrustesForCausalLM
    from validate.perplexity.windows import Windows


def window_sha256(windows: Windows) -> str:
    """SHA-256 of the tokens and how they are cut: equal for equal windows."""
    end = windows.length + (windows.count - 1) * windows.stride
    shape = json.dumps([windows.length, windows.stride, windows.count]).encode()
    return hashlib.sha256(shape + windows.ids[:end].contiguous().numpy().tobytes()).hexdigest()


@torch.inference_mode()
def fill_hidden(model: ProcrustesForCausalLM, windows: Windows, path: Path) -> None:
    """Write what the head of `model` reads of every window to `path`, float32, complete or not at all.

    4 x windows x length x d bytes. An interrupted run goes on at the window where it was. Raises OSError when there
    is no space for it.
    """
    partial, count = path.with_suffix(".partial"), path.with_suffix(".count")
    begun, shape = _begun(count), _shape(windows, model.config.hidden_size)
    whole = partial.is_file() and partial.stat().st_size == 4 * math.prod(shape)
    begun = begun if whole else 0
    hidden = mapped(partial, shape) if begun else mapped_anew(partial, shape)
    start = time.monotonic()
    for window, ids in windows.batches(1):
        if window < begun:
            continue
        positions = torch.arange(windows.length)[None]
        hidden[window] = model.model(ids, None, positions, None)[0].float()
        fsync(partial)  # before it is counted: a loss of power must leave no zeros that pass for states
        _write_whole(count, str(window + 1))
        left = (time.monotonic() - start) / (window + 1 - begun) * (windows.count - window - 1)
        log(f"dense hidden states: window {window + 1}/{windows.count}, {left:.0f} s left")
    del hidden
    partial.rename(path)
    count.unlink()


def _begun(count: Path) -> int:
    """How many windows are done; 0 where that is not known."""
    text = count.read_text(encoding="utf-8") if count.is_file() else ""
    return int(text) if text.isascii() and text.isdecimal() else 0


def _write_whole(path: Path, text: str) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(text, encoding="utf-8")
    fsync(draft)
    draft.rename(path)


def read_hidden(windows: Windows, width: int, path: Path) -> Tensor:
    """The file of `fill_hidden`, memory-mapped: (windows, length, width) float32."""
    return mapped(path, _shape(windows, width))


def _shape(windows: Windows, width: int) -> tuple[int, int, int]:
    return (windows.count, windows.length, width)
