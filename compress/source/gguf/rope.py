"""Rotary scaling of a GGUF file in transformers' terms.

llama.cpp rotates pair i by the angle position * base^(-2i/d) / (ff_i * factor), with the factors ff_i of the tensor
rope_freqs.weight (1 where there is none) and the factor of the metadata (linear), or by YaRN's blend of both. Llama
3.1's scaling is stored in ff_i alone: its converter writes no parameters, so they are recovered here, and used only if
they give the very factors of the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from compress.errors import UsageError
from compress.source.gguf.header import GgufHeader

FREQUENCIES = "rope_freqs.weight"

Array = npt.NDArray[np.float64]

_TOLERANCE = 4 * float(np.finfo(np.float32).eps)  # the converter computes in float32
_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
# What llama.cpp takes for "not given" or for no change; any other value is refused.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "attn_factor": (0.0, 1.0),
    "alpha": (0.0,),
    "yarn_log_multiplier": (0.0,),
    "yarn_ext_factor": (-1.0, 1.0),
    "yarn_attn_factor": (-1.0, 1.0),
}


class Llama3(NamedTuple):
    """Parameters of Llama 3.1's scaling: wavelengths up to `original` / high stay, from `original` / low on they are
    multiplied by `factor`, and frequencies between are blended."""

    factor: float
    low: float
    high: float
    original: int

    def divisors(self, frequencies: Array) -> Array:
        """What the frequencies (radians a position) are divided by."""
        smooth = (self.original * frequencies / (2 * math.pi) - self.low) / (self.high - self.low)
        smooth = np.clip(smooth, 0.0, 1.0)
        return np.asarray(1 / ((1 - smooth) / self.factor + smooth))


def rope_parameters(header: GgufHeader, scaling: dict[str, Any], *, base: float, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of a Hugging Face config. `scaling`: the keys of ARCHITECTURE.rope.scaling, without it.

    Raises UsageError for a scaling that is not one of linear, yarn and llama3, or that is not understood to the last
    number: it would be another model.
    """
    plain = {"rope_type": "default", "rope_theta": base}
    found = dict(scaling)
    kind = found.pop("type", "linear")  # llama.cpp's own default
    if not isinstance(kind, str) or kind not in ("none", "linear", "yarn"):
        raise _refused(header, f"{header.architecture}.rope.scaling.type = {kind!r:.100}")
    factor = _number(header, "factor", found.pop("factor", 0.0)) or 1.0
    original = found.pop("original_context_length", None)
    if original is not None and (type(original) is not int or original < 1):
        raise _refused(header, f"{header.architecture}.rope.scaling.original_context_length = {original!r:.100}")
    # finetuned records whether the model was trained with the scaling, and changes nothing.
    if not isinstance(finetuned := found.pop("finetuned", False), bool):
        raise _refused(header, f"{header.architecture}.rope.scaling.finetuned = {finetuned!r:.100}")
    attention = _number(header, "attn_factor", found.get("attn_factor", 1.0)) or 1.0
    if kind == "yarn":
        found.pop("attn_factor", None)
    options = {new: _number(header, old, found.pop(old)) for old, new in _YARN.items() if old in found}
    for name, value in found.items():
        if name not in _NEUTRAL or type(value) not in (int, float) or value not in _NEUTRAL[name]:
            raise _refused(header, f"{header.architecture}.rope.scaling.{name} = {value!r:.100}")
    scaled = kind != "none" and factor != 1.0
    if FREQUENCIES in header.tensors:
        if scaled or options or attention != 1.0 or header.architecture != "llama":
            raise _refused(header, f"both rope.scaling.type = {kind} and the tensor {FREQUENCIES}")
        return plain | _from_divisors(header, base, head_dim, original)
    if kind == "yarn":
        context = header.metadata[f"{header.architecture}.context_length"]
        options["original_max_position_embeddings"] = context if original is None else original
        if attention != 1.0:
            options["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
        return plain | {"rope_type": "yarn", "factor": factor} | options
    return plain | {"rope_type": "linear", "factor": factor} if scaled else plain


def _from_divisors(header: GgufHeader, base: float, head_dim: int, original: int | None) -> dict[str, Any]:
    """The scaling that gives the factors of rope_freqs.weight: default, linear or llama3."""
    from compress.source.gguf.weights import read_tensor

    divisors = read_tensor(header, FREQUENCIES).astype(np.float64).ravel()
    if divisors.shape != (head_dim // 2,) or not np.isfinite(divisors).all() or divisors.min() <= 0:
        raise _refused(header, f"a tensor {FREQUENCIES} of {divisors.size} values for heads of {head_dim}")
    if np.ptp(divisors) == 0:
        factor = float(divisors[0])
        return {} if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    frequencies = base ** (-np.arange(0, head_dim, 2) / head_dim)
    context = header.metadata.get(f"{header.architecture}.context_length", 0)
    for candidate in _candidates(frequencies, divisors, original, context):
        if np.allclose(candidate.divisors(frequencies), divisors, rtol=_TOLERANCE * 8, atol=0.0):
            return {
                "rope_type": "llama3",
                "factor": candidate.factor,
                "low_freq_factor": candidate.low,
                "high_freq_factor": candidate.high,
                "original_max_position_embeddings": candidate.original,
            }
    raise _refused(header, f"a tensor {FREQUENCIES} whose factors Llama 3.1's scaling does not give")


def _candidates(frequencies: Array, divisors: Array, original: int | None, context: Any) -> Iterator[Llama3]:
    """Llama 3's own thresholds at likely lengths, then the ones that a line through the blended frequencies gives.

    1 / ff is 1/F + (1 - 1/F) * smooth, and smooth is linear in the frequency: its zero and its one are the thresholds,
    low = original * zero / 2 pi and high = original * one / 2 pi. Length and thresholds have one scale in common.
    """
    factor = float(divisors.max())
    likely = [8192, original, context / factor if isinstance(context, int) else None]
    lengths = [int(length) for length in likely if length is not None and length >= 1]
    yield from (Llama3(factor, 1.0, 4.0, length) for length in lengths)
    smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    rounding = 64 * _TOLERANCE
    between = (smooth > rounding) & (smooth < 1 - rounding)
    stays, scaled = frequencies[smooth >= 1 - rounding], frequencies[smooth <= rounding]
    edges: list[tuple[float, float]] = []
    if between.sum() >= 2:
        slope, offset = np.polyfit(frequencies[between], smooth[between], 1)
        edges = [(-offset / slope, (1 - offset) / slope)]
    elif between.sum() == 1:
        # One blended frequency leaves the width open: high = 4 low as in all models, or half of what has room.
        at, share = float(frequencies[between][0]), float(smooth[between][0])
        room = min((at - scaled.max(initial=0.0)) / share, (stays.min(initial=2 * at) - at) / (1 - share))
        zero = at / (1 + 3 * share)
        edges = [(zero, 4 * zero), (at - share * room / 2, at + (1 - share) * room / 2)]
    elif stays.size and scaled.size:
        # Nothing is blended: any two thresholds between the last that stays and the first that is scaled.
        ratio = stays.min() / scaled.max()
        edges = [(scaled.max() * ratio ** (1 / 3), scaled.max() * ratio ** (2 / 3))]
    length = next(iter(lengths[1:]), 8192)
    for zero, one in edges:
        low, high = (float(length * edge / (2 * math.pi)) for edge in (zero, one))
        if 0 < low < high:
            yield Llama3(factor, float(f"{low:.6g}"), float(f"{high:.6g}"), length)
            yield Llama3(factor, low, high, length)


def _number(header: GgufHeader, name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise _refused(header, f"{header.architecture}.rope.scaling.{name} = {value!r:.100}")
    return float(value)


def _refused(header: GgufHeader, what: str) -> UsageError:
    return UsageError(
        f"The GGUF file {header.path} has {what}, a rotary scaling that is not understood here; take the model's "
        "safetensors, or another conversion of it."
    )
