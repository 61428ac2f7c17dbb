"""The values of a model's config.json that decide its shape and arithmetic: of the right type, finite, of a size that
some model could have. Checked before transformers sees them, before a name is made for each of a billion layers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compress.artifact.reading import shown
from compress.errors import ArtifactError

LARGEST: dict[str, int] = {
    "num_layers": 4096,
    "num_heads": 1 << 16,
    "num_kv_heads": 1 << 16,
    "head_dim": 1 << 16,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 24,
    "max_positions": 1 << 31,
}
"""Size of an `Architecture` -> the largest that is believed, each more than ten times that of any model there is."""

DTYPES = (
    "float32",
    "float16",
    "bfloat16",
    "float64",
    "float",
    "half",
    "double",
    "float8_e4m3fn",
    "float8_e5m2",
)
"""What config.json may call the type of the weights; that of the tensors is read from their file."""

_TOKEN_IDS = (-(1 << 31), 1 << 31)  # -1 stands for none in old Llama files

Check = Callable[[Any], str | None]
"""A value -> what is needed instead of it, or None when it will do."""


def whole(largest: int, smallest: int = 1) -> Check:
    """An integer in this range; true is none."""

    def check(value: Any) -> str | None:
        sound = isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest
        return None if sound else f"a whole number from {smallest} to {largest:,} is needed"

    return check


def number(above: float, most: float = math.inf) -> Check:
    """A finite number in this range."""

    def check(value: Any) -> str | None:
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if plain and above < value <= most and value <= sys.float_info.max:  # an integer may be larger than any float
            return None
        return f"a finite number above {above:g} is needed" + ("" if most == math.inf else f", at most {most:g}")

    return check


def boolean(value: Any) -> str | None:
    """true or false."""
    return None if isinstance(value, bool) else "true or false is needed"


def text(value: Any) -> str | None:
    """A string, of the length of a name."""
    return None if isinstance(value, str) and len(value) <= 100 else "a short string is needed"


def token_ids(value: Any) -> str | None:
    """A token id or a list of them."""
    least, most = _TOKEN_IDS
    ids = value if isinstance(value, list) else [value]
    sound = len(ids) <= 1000 and all(type(i) is int and least <= i < most for i in ids)
    return None if sound else "a token id, a list of token ids, or null is needed"


def one_of(*names: str) -> Check:
    """One of these strings."""
    return lambda value: None if value in names else f"one of {', '.join(names)} is needed"


def mapping(value: Any) -> str | None:
    """An object."""
    return None if isinstance(value, Mapping) else "an object is needed"


def optional(check: Check) -> Check:
    """null is as good as leaving the key out."""
    return lambda value: None if value is None else check(value)


_SIZE = {name: whole(largest) for name, largest in LARGEST.items()}

FIELDS: dict[str, Check] = {
    "hidden_size": _SIZE["hidden_size"],
    "word_embed_proj_dim": _SIZE["hidden_size"],
    "intermediate_size": _SIZE["intermediate_size"],
    "ffn_dim": _SIZE["intermediate_size"],
    "num_hidden_layers": _SIZE["num_layers"],
    "num_attention_heads": _SIZE["num_heads"],
    "num_key_value_heads": optional(_SIZE["num_kv_heads"]),
    "head_dim": optional(_SIZE["head_dim"]),
    "vocab_size": _SIZE["vocab_size"],
    "max_position_embeddings": _SIZE["max_positions"],
    "sliding_window": optional(_SIZE["max_positions"]),
    "max_window_layers": optional(whole(1 << 31, smallest=0)),
    "rms_norm_eps": number(0.0, most=1.0),
    "bos_token_id": optional(token_ids),
    "eos_token_id": optional(token_ids),
    "pad_token_id": optional(token_ids),
    "hidden_act": text,
    "activation_function": text,
    "dtype": optional(one_of(*DTYPES)),
    "torch_dtype": optional(one_of(*DTYPES)),
    "quantization_config": optional(mapping),
    # transformers makes a table of this length, though no causal LM has a use for it.
    "num_labels": optional(whole(1 << 20, smallest=0)),
    "tie_word_embeddings": boolean,
    "attention_bias": boolean,
    "mlp_bias": boolean,
    "use_sliding_window": boolean,
    "do_layer_norm_before": boolean,
    "enable_bias": boolean,
    "layer_norm_elementwise_affine": boolean,
    "_remove_final_layer_norm": boolean,
    "rope_theta": number(0.0),
    "partial_rotary_factor": number(0.0, most=1.0),
}
"""Key of config.json -> what it may hold where it is given. Other keys decide nothing here."""

ROPE_FIELDS: dict[str, Check] = {
    "rope_type": text,
    "type": text,
    "rope_theta": number(0.0),
    "partial_rotary_factor": number(0.0, most=1.0),
    "factor": optional(number(0.0)),
    "low_freq_factor": number(0.0),
    "high_freq_factor": number(0.0),
    "original_max_position_embeddings": optional(number(0.0, most=LARGEST["max_positions"])),
    "beta_fast": optional(number(0.0)),
    "beta_slow": optional(number(0.0)),
    "attention_factor": optional(number(0.0)),
    "mscale": optional(number(-1.0)),
    "mscale_all_dim": optional(number(-1.0)),
    "truncate": optional(boolean),
}
"""The same for the rotary parameters."""


ARCHITECTURE_FIELDS: dict[str, Check] = {
    "family": text,
    **_SIZE,
    "norm": one_of("rmsnorm", "layernorm"),
    "norm_eps": number(0.0, most=1.0),
    "positions": one_of("rope", "learned"),
    "position_offset": whole(1 << 10, smallest=0),
    "activation": text,
    **dict.fromkeys(("gated", "attention_bias", "output_bias", "mlp_bias", "qk_norm", "tied"), boolean),
    "sliding_window": optional(_SIZE["max_positions"]),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), optional(token_ids)),
}
"""The same for the fields of an `Architecture`, which config.json of a compressed checkpoint spells out."""


def check_config(values: Mapping[str, Any], path: Path) -> None:
    """Raise ArtifactError, naming the key, when a model's config.json holds what no model can have."""
    fault = fault_of_fields(values, FIELDS)
    for key in ("rope_parameters", "rope_scaling"):  # the first is the name of transformers 5
        if fault is None:
            fault = rope_fault(values.get(key), key, values.get("rope_theta"))
    layers, kinds = values.get("num_hidden_layers"), values.get("layer_types")
    if fault is None and kinds is not None:
        named = isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)
        if not named or (layers is not None and len(kinds) != layers):
            fault = f"layer_types = {shown(kinds)}, but the name of one kind for each of the layers is needed"
    if fault is not None:
        raise ArtifactError(f"The file {path} gives {fault}; take the model's own config.json, unchanged.")


def fault_of_fields(values: Mapping[str, Any], fields: Mapping[str, Check]) -> str | None:
    """`head_dim = -1, but a whole number from 1 to 65,536 is needed` for the first value that will not do, or None."""
    for name, check in fields.items():
        if name in values and (needed := check(values[name])) is not None:
            return f"{name} = {shown(values[name])}, but {needed}"
    return None


def rope_fault(rope: Any, key: str = "rope_parameters", theta: float | None = None) -> str | None:
    """Fault of rotary parameters, in the words of `fault_of_fields`; None for sound ones, and for none at all.

    `theta` is the base where it stands beside them, as in older files.
    """
    if rope is None:
        return None
    if not isinstance(rope, Mapping):
        return f"{key} = {shown(rope)}, but an object is needed"
    fault = fault_of_fields(rope, ROPE_FIELDS)
    if fault is not None:
        return f"{key} with {fault}"
    kind = rope.get("rope_type", rope.get("type"))
    base = rope.get("rope_theta", theta)
    if kind == "yarn" and base is not None and base <= 1:  # its bounds divide by log(rope_theta)
        return f"{key} with rope_theta = {shown(base)}, but yarn needs a number above 1"
    low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    if kind == "llama3" and low >= high:
        return f"{key} with low_freq_factor = {low:g}, but llama3 needs a number below high_freq_factor = {high:g}"
    if kind in ("linear", "llama3") and rope.get("factor") is None:
        return f"{key} of type {kind!r} without its factor"
    return None
