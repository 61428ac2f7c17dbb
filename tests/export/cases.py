"""Models of two to four layers with every structure, skip and shape that an export must take, and their export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.architecture import Architecture
from compress.model.skips import CSSkip, HouseholderSkip, SkipForm, SliceSkip
from compress.structures import (
    GroupShuffleStructure,
    KroneckerStructure,
    LowRankStructure,
    PivotedStructure,
    Structure,
)
from export.graph.decoder import ExportInfo, export_onnx
from tests.export.helpers import llama, opt, write_checkpoint

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}

Chooser = Callable[[str, int, int, str], Structure | None]
"""(name, out_features, in_features, side) -> the structure of a linear, None for dense."""


def every(arch: Architecture, choose: Chooser) -> dict[str, Structure]:
    chosen = {
        f"layers.{i}.{role}": choose(f"layers.{i}.{role}", n, m, arch.side(role))
        for i in range(arch.num_layers)
        for role, (n, m) in arch.linears().items()
    }
    return {name: structure for name, structure in chosen.items() if structure is not None}


def kron(mix: Any) -> Chooser:
    return lambda name, n, m, side: KroneckerStructure(m, n, 4, 3, side=side, mix=mix)  # type: ignore[arg-type]


def mixed_kron(name: str, n: int, m: int, side: str) -> Structure | None:
    """As an allocator leaves it: several widths, some layers dense, k apart from q and v."""
    if name in ("layers.0.attn.o", "layers.1.mlp.down", "layers.1.attn.v"):
        return None
    terms = 2 if name.endswith(("attn.k", "mlp.up")) else 3
    return KroneckerStructure(m, n, 4, terms, side=side, mix="leading")  # type: ignore[arg-type]


def gs(name: str, n: int, m: int, side: str) -> Structure:
    left, right = (4, 2) if name.endswith("attn.o") else (2, 4)
    return GroupShuffleStructure(m, n, left, right, 3)


def low_rank(name: str, n: int, m: int, side: str) -> Structure:
    return LowRankStructure(m, n, 5 if name.endswith("attn.k") else 9)


def pivoted(name: str, n: int, m: int, side: str) -> Structure:
    return PivotedStructure(m, n, 5 if name.endswith("attn.k") else 9, "in" if m < n else "out")


def joint(name: str, n: int, m: int, side: str) -> Structure | None:
    """q, k, v share a V that is wider than k and v; gate and up share one in the second layer only."""
    layer, role = name[7:].split(".", 1)
    if role in ("attn.q", "attn.k", "attn.v"):
        return LowRankStructure(m, n, 20, None if role == "attn.q" else "attn.q")
    if layer == "0" or role not in ("mlp.gate", "mlp.up"):
        return low_rank(name, n, m, side)
    return LowRankStructure(m, n, 9, "mlp.gate" if role == "mlp.up" else None)


def partly_joint(name: str, n: int, m: int, side: str) -> Structure | None:
    """Sharing beside linears that do not: q dense, v with the V of k; and q with k, v alone."""
    layer, role = name[7:].split(".", 1)
    if layer == "0":
        groups = {"attn.k": LowRankStructure(m, n, 6), "attn.v": LowRankStructure(m, n, 6, "attn.k")}
    else:
        groups = {"attn.q": LowRankStructure(m, n, 6), "attn.k": LowRankStructure(m, n, 6, "attn.q")}
        groups["attn.v"] = LowRankStructure(m, n, 5)
    return groups.get(role)


def two_sided(name: str, n: int, m: int, side: str) -> Structure:
    return KroneckerStructure(m, n, 8, 4, side="both", n1=4 if side == "in" else 2, m1=2 if side == "in" else 4)


def mixture(name: str, n: int, m: int, side: str) -> Structure | None:
    """Every structure in one model."""
    kinds: list[Chooser] = [kron("leading"), kron("explicit"), gs, low_rank, pivoted, two_sided, lambda *_: None]
    return kinds[sum(map(ord, name)) % len(kinds)](name, n, m, side)


def block_skips(attn: SkipForm, mlp: SkipForm) -> dict[str, Any]:
    """The choices of a model of two layers with these skips in each."""
    return {"rotation": "block", "skip": attn.name, "skip_config": [attn.to_config(), mlp.to_config()] * 2}


@dataclass(frozen=True)
class Case:
    arch: Architecture
    choose: Chooser = lambda *_: None
    choices: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "dense": Case(llama()),
    "untied": Case(llama(tied=False)),
    "no grouping": Case(llama(num_kv_heads=4)),
    "heads wider than the stream": Case(llama(num_heads=6, num_kv_heads=3, head_dim=16)),
    "qkv bias": Case(llama(attention_bias=True, activation="gelu_tanh"), kron("leading")),
    "qk norm": Case(llama(qk_norm=True), kron("explicit")),
    "sliding window": Case(llama(sliding_window=4)),
    "llama3 rope": Case(llama(rope=LLAMA3)),
    "yarn rope": Case(llama(rope=YARN)),
    "head map": Case(llama(), mixed_kron, {"head_map": True, "rotation": "shared"}),
    "head scale": Case(llama(), choices={"head_map": True}),
    "block skips": Case(llama(), kron("explicit"), {"rotation": "block", "skip": "dense"}),
    "cs skips": Case(llama(), kron("leading"), block_skips(CSSkip(32, 24, 8), CSSkip(32, 24, 5))),
    "householder skips": Case(llama(), kron("leading"), block_skips(HouseholderSkip(32, 6), HouseholderSkip(32, 1))),
    "slice skips": Case(llama(), kron("leading"), block_skips(SliceSkip(32, 24, 16), SliceSkip(32, 16, 32))),
    "kron leading": Case(llama(), kron("leading")),
    "kron mixed sizes": Case(llama(num_layers=3), mixed_kron),
    "kron explicit": Case(llama(), kron("explicit")),
    "kron both sides": Case(llama(), two_sided),
    "gs": Case(llama(), gs),
    "lowrank": Case(llama(), low_rank),
    "pifa": Case(llama(attention_bias=True), pivoted),
    "joint": Case(llama(), joint),
    "joint, biased": Case(llama(attention_bias=True, qk_norm=True), joint),
    "joint, one of three biased": Case(llama(), joint, {"extra_biases": ["layers.0.attn.v", "layers.1.mlp.gate"]}),
    "partly joint": Case(llama(), partly_joint),
    "opt joint": Case(opt(), partly_joint, {"center_embedding": True, "head_map": True}),
    "embedding": Case(llama(), choices={"embedding_rank": 8, "head_map": True, "rotation": "shared"}),
    "embedding, untied": Case(llama(tied=False), choices={"embedding_rank": 8, "head_rank": 12}),
    "head alone": Case(llama(tied=False), low_rank, {"head_rank": 12}),
    "opt embedding": Case(opt(), choices={"embedding_rank": 8, "center_embedding": True, "head_map": True}),
    "opt embedding, untied": Case(opt(tied=False), choices={"embedding_rank": 8, "head_rank": 12, "head_bias": True}),
    "mixture": Case(llama(num_layers=4), mixture),
    "opt": Case(opt(), choices={"center_embedding": True, "head_map": True, "rotation": "shared"}),
    "opt unrotated": Case(opt(), choices={"center_embedding": True, "head_map": True}),
    "opt gelu, untied": Case(opt(tied=False, activation="gelu"), choices={"head_bias": True}),
    "opt mixture": Case(opt(num_layers=4), mixture, {"center_embedding": True, "head_map": True}),
    "opt skips": Case(opt(), kron("leading"), {"rotation": "block", "skip": "dense"}),
}

ROUNDING = 3e-5
"""Of float32 logits over a few layers, relative to the largest; ONNX Runtime 1.24 comes to 1.2e-5."""

PADDED = ([7, 8, 9, 10, 11, 12, 13, 14, 15], [3], [20, 21, 22, 23])


def export(case: Case, folder: Path, **options: Any) -> tuple[Any, ExportInfo]:
    model = write_checkpoint(folder / "checkpoint", case.arch, every(case.arch, case.choose), **case.choices)
    return model, export_onnx(folder / "checkpoint", folder / "onnx", **options)


def torch_logits(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), use_cache=False).logits
    return np.asarray(logits.numpy())
