"""The inner freedoms (`--inner vo,neurons`): exact rewrites of a block.

Between gate, up and down the neurons may stand in any order; between v and o the values of a key-value head may stand
in any basis, because attention mixes tokens and not coordinates. Both change nothing, and bring what matters to the
front, where `structures.SelectStructure` cuts (compress/allocation/selection.py finds order and
basis; docs/method.md#inner-features).
Neither touches the residual stream, so both commute with its rotations. Weights are (out, in), by name as
`FoldedModel.block`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.architecture import Architecture
from compress.artifact.state import save_whole
from compress.errors import UsageError
from compress.linalg import block_diagonal
from compress.rewrites.folding import FoldedModel
from compress.rewrites.rotations import Weights


def permute_neurons(weights: Weights, arch: Architecture, order: Tensor) -> Weights:
    """The block with neuron order[i] (int64, a permutation) at place i: rows and biases of gate and up, columns of
    down. Exact. Raises UsageError when `order` is no permutation of the neurons."""
    if not torch.equal(order.sort().values.cpu(), torch.arange(arch.intermediate_size)):
        raise UsageError(f"the order of neurons must be a permutation of all {arch.intermediate_size}")
    made, order = dict(weights), order.to(weights["mlp.down.weight"].device)
    for role in arch.readers("mlp"):
        for name in (f"{role}.weight", f"{role}.bias"):
            if name in weights:
                made[name] = weights[name][order]
    made["mlp.down.weight"] = weights["mlp.down.weight"][:, order]
    return made


def change_value_basis(weights: Weights, arch: Architecture, basis: Tensor) -> Weights:
    """The block with the values of key-value head g in the coordinates basis[g] z.

    basis R (kv_heads, head_dim, head_dim), invertible: rows of v become R W_v, the columns of o of every head in the
    group W_o R^{-1}. Where o has a bias, that of v moves there, because the weights of a softmax sum to 1:
    b_o += W_o [b_v of every head's group], b_v = 0, so that a value coordinate that is dropped takes no constant along.
    Exact: computed in float64, returned in the dtype of `weights`. Raises UsageError when a shape does not match.
    """
    kv, size, per_group = arch.num_kv_heads, arch.head_dim, arch.num_heads // arch.num_kv_heads
    if basis.shape != (kv, size, size):
        raise UsageError(f"the basis of the values is {tuple(basis.shape)}, this model needs {(kv, size, size)}")
    v, o = weights["attn.v.weight"], weights["attn.o.weight"]
    made, r = dict(weights), basis.double().to(v.device)
    made["attn.v.weight"] = (r @ v.double().reshape(kv, size, -1)).reshape(v.shape).to(v.dtype)
    columns = o.double().reshape(len(o), kv, per_group, size)  # (d, kv_heads, heads of the group, head_dim)
    turned = torch.einsum("okhi,kij->okhj", columns, torch.linalg.inv(r))
    made["attn.o.weight"] = turned.reshape(o.shape).to(o.dtype)
    if "attn.v.bias" in weights:
        bias = weights["attn.v.bias"].double().reshape(kv, size)
        if "attn.o.bias" in weights:
            moved = torch.einsum("okhi,ki->o", columns, bias)
            made["attn.o.bias"] = (weights["attn.o.bias"].double() + moved).to(o.dtype)
            bias = torch.zeros_like(bias)
        made["attn.v.bias"] = torch.einsum("kij,kj->ki", r, bias).reshape(-1).to(v.dtype)
    return made


@dataclass(frozen=True)
class InnerRewrites:
    """By layer: the order of its neurons (inner,), and the basis of its values (kv_heads, head_dim, head_dim)."""

    orders: Mapping[int, Tensor] = field(default_factory=dict)
    bases: Mapping[int, Tensor] = field(default_factory=dict)

    def block(self, weights: Weights, arch: Architecture, layer: int) -> Weights:
        """The weights of block `layer`, rewritten; the same function."""
        if layer in self.bases:
            weights = change_value_basis(weights, arch, self.bases[layer])
        return permute_neurons(weights, arch, self.orders[layer]) if layer in self.orders else weights

    def input_moment(self, moment: Tensor, arch: Architecture, layer: int, role: str) -> Tensor:
        """The second moment (in, in) of what `role` reads, as if it had been collected on the rewritten model.

        Readers of the stream see no difference. One thing is not in it: where the bias of v has moved to o, the moment
        of what o reads still holds that bias (without the mean it cannot be taken out).
        """
        if role == "mlp.down" and layer in self.orders:
            order = self.orders[layer].to(moment.device)
            return moment[order][:, order]
        if role == "attn.o" and layer in self.bases:
            per_group = arch.num_heads // arch.num_kv_heads
            heads = block_diagonal(self.bases[layer].double().to(moment.device).repeat_interleave(per_group, dim=0))
            return heads @ moment.double() @ heads.T
        return moment

    def gradient_moment(self, moment: Tensor, arch: Architecture, layer: int, role: str) -> Tensor:
        """The second moment (out, out) of the gradient at the output of `role`, likewise: g -> R^{-T} g at v."""
        if role in arch.readers("mlp") and layer in self.orders:
            order = self.orders[layer].to(moment.device)
            return moment[order][:, order]
        if role == "attn.v" and layer in self.bases:
            back: Tensor = torch.linalg.inv(block_diagonal(self.bases[layer].double().to(moment.device)))
            return back.T @ moment.double() @ back
        return moment

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {f"order.{i}": order for i, order in self.orders.items()}
        save_whole({**tensors, **{f"basis.{i}": basis for i, basis in self.bases.items()}}, path)

    @classmethod
    def load(cls, path: Path) -> InnerRewrites:
        """Inverse of `save`."""
        tensors, found = load_file(path), {"order": dict[int, Tensor](), "basis": dict[int, Tensor]()}
        for name, tensor in tensors.items():
            kind, _, layer = name.partition(".")
            found[kind][int(layer)] = tensor
        return cls(found["order"], found["basis"])


class RewrittenModel(FoldedModel):
    """A folded model with the rewrites applied to each block that is read: the same function, other coordinates."""

    def __init__(self, model: FoldedModel, rewrites: InnerRewrites) -> None:
        super().__init__(model.reader, model.arch, model.names, model.dtype)
        self.rewrites = rewrites

    def block(self, layer: int) -> Weights:
        """See `FoldedModel.block`."""
        return self.rewrites.block(super().block(layer), self.arch, layer)
