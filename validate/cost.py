"""What a model must read and compute: the limit of any speed-up, from its own sizes.

Counted on the model that config.json describes, built without memory for its weights (meta device). Decode is
bound by bytes: every weight that a step uses is read once, whatever the batch. Prefill is bound by FLOPs.

    decode bytes   = factors + biases + skips + head (map) + scales          once a step
                   + rows of the embedding and position tables               batch x (1 or 2) x d
                   + keys and values: `past` rows read, one written          batch x 2 L kv d_h x (past + 1)
    prefill FLOPs  = 2 x multiply-accumulates of factors, skips, head map    x tokens
                   + 2 x d x vocabulary                                      x positions with logits
                   + 4 x heads x head_dim x keys for each query              (masked entries too)

These are the minimum that the arithmetic needs: copies that a runtime makes (concatenating the cache) are not
in them, so the share of the limit that is reached charges the runtime with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from compress.architecture import Architecture
from compress.structures import Structure

if TYPE_CHECKING:
    from compress.model.config import ProcrustesConfig


@dataclass(frozen=True)
class ModelCost:
    """Sizes in elements. `factors`: linear name -> structure; `other`: what else a step reads, by kind."""

    arch: Architecture
    factors: dict[str, Structure]
    other: dict[str, int] = field(default_factory=dict)
    head_elements: int = 0
    head_macs: int = 0
    embedding_rank: int = 0
    head_map_macs: int = 0
    skip_macs: int = 0
    tables: int = 0

    @classmethod
    def of(cls, config: ProcrustesConfig) -> ModelCost:
        """Count the model of a config.json."""
        from compress.model.blocks import StructuredLinear, StructuredSkip
        from compress.model.decoder import ProcrustesForCausalLM

        with torch.device("meta"):
            model = ProcrustesForCausalLM(config)
        factors, inside, skip_macs = {}, set(), 0
        for name, module in model.model.named_modules():
            if isinstance(module, StructuredLinear):
                factors[name] = module.structure
                inside |= {f"model.{name}.{factor}" for factor in module.factor_names}
            elif isinstance(module, StructuredSkip):
                skip_macs += module.form.macs(1)
        other = dict.fromkeys(("bias", "skip", "head_map", "scale"), 0)
        tables = head = head_macs = tied = head_map_macs = 0
        for name, parameter in model.named_parameters(remove_duplicate=False):
            size = parameter.numel()
            if name in inside:
                continue
            if name.startswith("lm_head."):
                head += size
                head_macs += size if parameter.dim() == 2 else 0
                tied += size if parameter.dim() == 2 and config.tie_word_embeddings else 0
            elif "embed_" in name:
                tables += size
            elif "_skip." in name:
                other["skip"] += size
            elif ".head_map." in name:
                other["head_map"] += size
                head_map_macs += size if parameter.dim() == 2 else 0
            elif name.endswith(".bias"):
                other["bias"] += size
            else:  # q/k norms of Qwen 3, the centre of a tied OPT
                other["scale"] += size
        return cls(
            arch=config.parsed_architecture(),
            factors=factors,
            other=other,
            head_elements=head,
            head_macs=head_macs,
            embedding_rank=config.embedding_rank,
            head_map_macs=head_map_macs,
            skip_macs=skip_macs,
            tables=tables - tied,  # a tied table is counted as the head, stored once
        )

    # -- parameters ----------------------------------------------------------------------------------------

    def projection_parameters(self) -> int:
        """Factors of all projections and the skip matrices: what the kept ratio is taken of."""
        return sum(s.parameter_count() for s in self.factors.values()) + self.other["skip"]

    def parameters(self) -> int:
        """Everything stored, a tied table once."""
        total = sum(s.parameter_count() for s in self.factors.values())
        return total + sum(self.other.values()) + self.head_elements + self.tables

    # -- decode --------------------------------------------------------------------------------------------

    def decode_bytes(self, batch: int, past: int, dtype: torch.dtype) -> dict[str, int]:
        """Bytes moved by one decode step of `batch` sequences with `past` cached tokens each, by part."""
        size, d, rank = dtype.itemsize, self.arch.hidden_size, self.embedding_rank
        row = (rank or d) + (d if self.arch.positions == "learned" else 0)
        return {
            "projections": sum(s.bytes(dtype) for s in self.factors.values()),
            "head": self.head_elements * size,
            **{kind: count * size for kind, count in self.other.items()},
            "embedding_rows": (batch * row + rank * d) * size,
            "kv_cache": batch * self._kv_elements() * (past + 1) * size,
        }

    def _kv_elements(self) -> int:
        """Key and value elements of one token over all layers."""
        return 2 * self.arch.num_layers * self.arch.num_kv_heads * self.arch.head_dim

    # -- prefill -------------------------------------------------------------------------------------------

    def flops(self, batch: int, tokens: int, past: int = 0, logits: int | None = None) -> dict[str, int]:
        """Floating-point operations (a multiply and an add are two) of a pass over batch x tokens, by part.

        `logits` is how many positions of each sequence go through the head; None: all of them.
        """
        arch = self.arch
        rows = batch * tokens
        head_rows = rows if logits is None else batch * logits
        width = arch.num_heads * arch.head_dim
        return {
            "projections": 2 * sum(s.macs(rows) for s in self.factors.values()),
            "skip": 2 * rows * self.skip_macs,
            "attention": 4 * arch.num_layers * rows * (past + tokens) * width,
            "head_map": 2 * rows * self.head_map_macs,
            "embedding": 2 * rows * self.embedding_rank * arch.hidden_size,
            "head": 2 * head_rows * self.head_macs,
        }


@dataclass(frozen=True)
class Limit:
    """The speed-up that the counts allow: dense over compressed."""

    dense: int
    compressed: int
    unit: str

    @property
    def speedup(self) -> float:
        """Dimensionless; above 1 where the compressed model does less."""
        return self.dense / self.compressed


def decode_limit(dense: ModelCost, compressed: ModelCost, batch: int, past: int, dtype: torch.dtype) -> Limit:
    """What the bytes of one decode step allow."""
    a, b = (sum(c.decode_bytes(batch, past, dtype).values()) for c in (dense, compressed))
    return Limit(a, b, "bytes")


def flops_limit(
    dense: ModelCost, compressed: ModelCost, batch: int, tokens: int, past: int = 0, logits: int | None = None
) -> Limit:
    """What the arithmetic of a pass allows."""
    a, b = (sum(c.flops(batch, tokens, past, logits).values()) for c in (dense, compressed))
    return Limit(a, b, "FLOPs")
