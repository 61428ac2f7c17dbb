"""The source model with its norms folded into their neighbours, read a block at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.architecture import WRITERS, Architecture
from compress.model.skips import SliceSkip
from compress.rewrites.rotations import Rotations, Weights, _rotate_rows
from compress.source import families
from compress.source.families import TensorNames
from compress.source.model import ModelSource
from compress.source.readers import WeightReader


class FoldedModel:
    """The source model with its norms folded, read tensor by tensor; nothing is kept.

    All folds are computed in float64 and returned in `dtype`.
    """

    def __init__(
        self, reader: WeightReader, arch: Architecture, names: TensorNames, dtype: torch.dtype = torch.float32
    ) -> None:
        self.reader, self.arch, self.names, self.dtype = reader, arch, names, dtype

    def _get(self, name: str | None) -> Tensor | None:
        return None if name is None else self.reader.get(name).double()

    def _need(self, name: str) -> Tensor:
        return self.reader.get(name).double()

    def block(self, layer: int) -> Weights:
        """Folded weights of block `layer` under their names in the block ("attn.q.weight", "attn.q.bias", ...)."""
        names, folded = self.names.layers[layer], Weights()
        for sub_block, norm in (("attn", names.attn_norm), ("mlp", names.mlp_norm)):
            scale, shift = self._need(norm.weight), self._get(norm.bias)
            for role in self.arch.readers(sub_block):
                weight, bias = self._need(names.linears[role].weight), self._get(names.linears[role].bias)
                if shift is not None:  # y = W (x_hat * scale + shift) + b
                    bias = weight @ shift + (0 if bias is None else bias)
                folded[f"{role}.weight"] = weight * scale
                if bias is not None:
                    folded[f"{role}.bias"] = bias
            writer = WRITERS[sub_block]
            weight, bias = self._need(names.linears[writer].weight), self._get(names.linears[writer].bias)
            folded[f"{writer}.weight"] = self._centred(weight, 0)
            if bias is not None:
                folded[f"{writer}.bias"] = self._centred(bias, 0)
        for name, source in (("attn.q_norm.weight", names.q_norm), ("attn.k_norm.weight", names.k_norm)):
            if source is not None:
                folded[name] = self._need(source)
        return {name: tensor.to(self.dtype) for name, tensor in folded.items()}

    def _centred(self, tensor: Tensor, axis: int) -> Tensor:
        """LayerNorm subtracts the mean of the stream: make every write to it mean-free instead."""
        return tensor - tensor.mean(axis, keepdim=True) if self.arch.norm == "layernorm" else tensor

    def ends(self, rotations: Rotations) -> Weights:
        """Embeddings and head, folded and rotated, under their names in the checkpoint.

        A tied head stays tied: the last norm's scale becomes `head_map` (see modeling.HeadMap), and the mean of an
        OPT token embedding, which its head still needs, is removed from the stream at run time (`model.center`).
        Where the first skip is a slice, the coordinates that it drops are zero in the embeddings; not in tied ones,
        whose head needs them all.
        """
        first, last = rotations.at(0), rotations.at(2 * self.arch.num_layers)
        embedding = self._need(self.names.embed)
        scale, shift = self._need(self.names.final_norm.weight), self._get(self.names.final_norm.bias)
        ends = Weights()
        if self.arch.tied:
            ends["model.embed_tokens.weight"] = _rotate_rows(embedding, first)
            if self.arch.norm == "layernorm":
                d = self.arch.hidden_size
                ends["model.center"] = _rotate_rows(torch.full((d,), d**-0.5, dtype=torch.float64), first)
            # logits = ((x_rot Q_last^T) * scale + shift) Q_first (E Q_first)^T
            if first is None or last is None:
                ends["model.head_map.weight"] = scale
            else:
                ends["model.head_map.weight"] = first.T @ (scale[:, None] * last)
            if shift is not None:
                ends["model.head_map.bias"] = _rotate_rows(shift, first)
        else:
            ends["model.embed_tokens.weight"] = _rotate_rows(self._centred(embedding, 1), first)
            head = self._need(self.names.lm_head or self.names.embed)
            ends["lm_head.weight"] = _rotate_rows(head * scale, last)
            if shift is not None:
                ends["lm_head.bias"] = head @ shift
        if self.names.positions is not None:
            positions = self._need(self.names.positions)
            ends["model.embed_positions.weight"] = _rotate_rows(self._centred(positions, 1), first)
        start = rotations.forms()[:1]
        if start and isinstance(start[0], SliceSkip) and not self.arch.tied:
            for name in ends.keys() & {"model.embed_tokens.weight", "model.embed_positions.weight"}:
                ends[name][:, start[0].kept_in :] = 0
        return {name: tensor.to(self.dtype) for name, tensor in ends.items()}


def folded(source: ModelSource, dtype: torch.dtype = torch.float32) -> FoldedModel:
    """The source with its norms folded, read lazily."""
    arch = source.architecture()
    return FoldedModel(source.reader(), arch, families.tensor_names(arch), dtype)
