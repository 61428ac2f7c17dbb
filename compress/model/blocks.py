"""One pre-norm decoder block for every family: attention and feed-forward over structured linears in factors.

Normalisation is parameter-free RMS everywhere: scales, biases and LayerNorm's mean subtraction have been
folded into the neighbouring weights (compress/rewrites/rotations.py), which leaves the output unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers.cache_utils import Cache

from compress.architecture import WRITERS, Architecture
from compress.artifact.reading import reason, shown
from compress.errors import ArtifactError
from compress.model.attention import Mixed, fused_attention
from compress.model.skips import DenseSkip, SkipForm
from compress.structures import DenseStructure, Structure
from compress.structures.joint import leader_of

Tap = Callable[[str, Tensor], None]
"""Called while a block runs with a place and the tensor there: "attn.in" and "mlp.in" (the normalised stream that
the readers see), "attn.o" and "mlp.down" (the inputs of the writers), "attn.out" and "mlp.out" (their outputs)."""

Attend = Callable[..., Mixed]
"""A function of transformers' attention interface, see `compress.model.attention`."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, computed in float32 at the least. Shape is kept."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rope_frequencies(arch: Architecture) -> tuple[Tensor, float]:
    """Inverse frequencies (head_dim / 2,) in float32 and the factor on cos and sin, by transformers' own rules.

    Raises ArtifactError for parameters from which these rules make no finite numbers.
    """
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=arch.num_heads * arch.head_dim,  # not read: head_dim is given
        num_attention_heads=arch.num_heads,
        head_dim=arch.head_dim,
        max_position_embeddings=arch.max_positions,
        rope_parameters=dict(arch.rope or {}),
    )
    try:
        rotary = LlamaRotaryEmbedding(config)
        frequencies, scaling = rotary.inv_freq.float(), float(rotary.attention_scaling)
    except (ArithmeticError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"the rotary parameters {shown(arch.rope, 300)} cannot be computed with ({type(error).__name__}: "
            f"{reason(error)}); take the model's own config.json, unchanged"
        ) from error
    if not bool(torch.isfinite(frequencies).all()) or not math.isfinite(scaling):
        raise ArtifactError(f"the rotary parameters {arch.rope} give frequencies that are not finite")
    return frequencies, scaling


@dataclass(frozen=True)
class Rotary:
    """cos and sin, each (batch, 1, sequence, head_dim / 2), in the half-split convention."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """x: (batch, heads, sequence, head_dim)."""
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class RotaryFrequencies(nn.Module):
    """The frequencies of a model's rotary positions, computed once: (batch, length) positions -> cos and sin.

    They stay in float32 when the model is cast, and are themselves again where a loader has put an empty buffer.
    """

    frequencies: Tensor

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        with torch.device("cpu"):  # not on "meta", where a loader makes the model
            frequencies, self.scaling = rope_frequencies(arch)
        self._computed = (frequencies.clone(),)  # a tuple, so that nobody moves, casts or empties it
        self.register_buffer("frequencies", frequencies.clone(), persistent=False)

    def restore(self) -> None:
        """Fill the buffer, on the device where it is."""
        self.frequencies = self._computed[0].to(self.frequencies.device, copy=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryFrequencies:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.restore()
        return self

    def forward(self, position_ids: Tensor) -> Rotary:
        angles = position_ids[:, None, :, None].float() * self.frequencies
        return Rotary(angles.cos() * self.scaling, angles.sin() * self.scaling)


def rotary_for(arch: Architecture, position_ids: Tensor) -> Rotary | None:
    """cos and sin for (batch, length) positions, in float32; None where positions are learned."""
    if arch.positions != "rope":
        return None
    rotary: Rotary = RotaryFrequencies(arch).to(position_ids.device)(position_ids)
    return rotary


def _silent(place: str, value: Tensor) -> None:
    """The tap of a block that nobody listens to."""


class StructuredLinear(nn.Module):
    """A linear layer whose weight is a structure; runs in factors. (..., in_features) -> (..., out_features).

    `leader` is the linear whose V this one uses (LowRankStructure.shares), or None.
    """

    def __init__(self, structure: Structure, bias: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.structure = structure
        self.factor_names = tuple(structure.shapes())
        stored = structure.storage_dtypes(dtype or torch.get_default_dtype())
        for name, shape in structure.shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=stored[name]), requires_grad=False))
        self.bias = (
            nn.Parameter(torch.empty(structure.out_features, dtype=dtype), requires_grad=False) if bias else None
        )
        self._leader: tuple[StructuredLinear, ...] = ()

    @property
    def leader(self) -> StructuredLinear | None:
        """See the class."""
        return self._leader[0] if self._leader else None

    def share(self, leader: StructuredLinear) -> None:
        """Use the V of `leader`. Kept in a tuple, so that its parameters do not become this module's as well."""
        self._leader = (leader,)

    def factors(self) -> dict[str, Tensor]:
        """The structure's factors by name: its own parameters, and the V of its leader."""
        own = {name: getattr(self, name) for name in self.factor_names}
        return own if self.leader is None else {"V": self.leader.factors()["V"], **own}

    def forward(self, x: Tensor, latent: Tensor | None = None) -> Tensor:
        """y for x; `latent` is x V^T of a low-rank structure, where it has been computed already."""
        factors = self.factors()
        y = self.structure.apply(factors, x) if latent is None else F.linear(latent, factors["U"])
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return repr(self.structure)


def read_together(linears: Sequence[StructuredLinear], x: Tensor) -> list[Tensor]:
    """The output of every linear on the same x (..., in_features); a V that several share is multiplied once."""
    latents: dict[StructuredLinear, Tensor] = {}
    for linear in linears:  # loops: torch.compile reads no variable of a comprehension's own
        leader = linear.leader
        if leader is not None and leader not in latents:
            latents[leader] = F.linear(x, leader.factors()["V"])
    return [linear(x, latents.get(linear if linear.leader is None else linear.leader)) for linear in linears]


class StructuredSkip(nn.Module):
    """What turns the residual stream from one rotation into the next (`--rotation block`), in factors."""

    def __init__(self, form: SkipForm) -> None:
        super().__init__()
        self.form = form
        for name, shape in form.shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))

    def factors(self) -> dict[str, Tensor]:
        """The form's parameters by name."""
        return {name: getattr(self, name) for name in self.form.shapes()}

    def forward(self, x: Tensor) -> Tensor:
        return self.form.apply(self.factors(), x)

    def extra_repr(self) -> str:
        return repr(self.form)


class HeadNorm(nn.Module):
    """RMS normalisation of each head's queries or keys with a learned scale (Qwen 3)."""

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalise(x, self.eps) * self.weight


class Attention(nn.Module):
    """Grouped-query attention over structured projections."""

    q: StructuredLinear
    k: StructuredLinear
    v: StructuredLinear
    o: StructuredLinear

    def __init__(
        self, arch: Architecture, structures: Mapping[str, Structure], layer: int, biases: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.arch = arch
        self.config: Any = None
        # What functions of transformers' attention interface ask of the module that they are given.
        self.layer_idx, self.is_causal = layer, True
        self.num_key_value_groups = arch.num_heads // arch.num_kv_heads
        self.scaling = arch.head_dim**-0.5
        for role in ("q", "k", "v", "o"):
            self.add_module(role, _linear(arch, structures, layer, f"attn.{role}", biases))
        if arch.qk_norm:
            self.q_norm = HeadNorm(arch.head_dim, arch.norm_eps)
            self.k_norm = HeadNorm(arch.head_dim, arch.norm_eps)
        _share(self, arch, structures, layer, "attn")

    def inner(
        self,
        h: Tensor,
        rotary: Rotary | None,
        mask: Any,
        cache: Cache | None = None,
        attend: Attend = fused_attention,
        **options: Any,
    ) -> Tensor:
        """What `o` reads: the heads' mixed values, (batch, length, heads * head_dim); mask as `mask_unless_causal`, or
        what else `attend`, a function of transformers' attention interface, takes; it is given `options` too."""
        batch, length, _ = h.shape

        def heads(x: Tensor, count: int) -> Tensor:
            # (batch, length, heads, head_dim) -> (batch, heads, length, head_dim)
            return x.view(batch, length, count, self.arch.head_dim).transpose(1, 2)

        read = read_together((self.q, self.k, self.v), h)
        counts = (self.arch.num_heads, self.arch.num_kv_heads, self.arch.num_kv_heads)
        q, k, v = (heads(x, count) for x, count in zip(read, counts, strict=True))
        if self.arch.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotary.rotate(q), rotary.rotate(k)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        mixed, _ = attend(self, q, k, v, mask, scaling=self.scaling, dropout=0.0, **options)
        return mixed.reshape(batch, length, self.arch.num_heads * self.arch.head_dim)


class FeedForward(nn.Module):
    """down(act(gate(h)) * up(h)), or down(act(up(h))) where the architecture is not gated."""

    gate: StructuredLinear
    up: StructuredLinear
    down: StructuredLinear

    def __init__(
        self, arch: Architecture, structures: Mapping[str, Structure], layer: int, biases: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[arch.activation]
        self.gated = arch.gated
        for role in arch.linears():
            block, _, short = role.partition(".")
            if block == "mlp":
                self.add_module(short, _linear(arch, structures, layer, role, biases))
        _share(self, arch, structures, layer, "mlp")

    def inner(self, h: Tensor) -> Tensor:
        """What `down` reads, (batch, length, intermediate_size)."""
        if not self.gated:
            return self.activation(self.up(h))
        gate, up = read_together((self.gate, self.up), h)
        return self.activation(gate) * up


class Block(nn.Module):
    """One decoder block. `structures` maps "layers.{i}.{role}" to a structure; what is absent is dense. `biases` names
    the linears that have a bias beyond those of the architecture (bias correction). `skips` are the forms of the skips
    past attention and MLP; False or empty for none, True for dense ones."""

    def __init__(
        self,
        arch: Architecture,
        structures: Mapping[str, Structure],
        layer: int,
        skips: Sequence[SkipForm] | bool,
        biases: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.eps = arch.norm_eps
        self.attn = Attention(arch, structures, layer, biases)
        self.mlp = FeedForward(arch, structures, layer, biases)
        forms = [DenseSkip(arch.hidden_size)] * 2 if skips is True else list(skips or ())
        self.attn_skip: nn.Module = StructuredSkip(forms[0]) if forms else nn.Identity()
        self.mlp_skip: nn.Module = StructuredSkip(forms[1]) if forms else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        mask: Any,
        cache: Cache | None = None,
        tap: Tap | None = None,
        **options: Any,
    ) -> Tensor:
        """x: (batch, length, d) -> the same shape; mask and options as `Attention.inner`."""
        say = tap or _silent
        say("attn.in", h := rms_normalise(x, self.eps))
        say("attn.o", inner := self.attn.inner(h, rotary, mask, cache, **options))
        say("attn.out", out := self.attn.o(inner))
        x = self.attn_skip(x) + out
        say("mlp.in", h := rms_normalise(x, self.eps))
        say("mlp.down", inner := self.mlp.inner(h))
        say("mlp.out", out := self.mlp.down(inner))
        result: Tensor = self.mlp_skip(x) + out
        return result


def _share(
    parent: nn.Module, arch: Architecture, structures: Mapping[str, Structure], layer: int, sub_block: str
) -> None:
    """Tell every follower of the sub-block which linear has its V. Raises ArtifactError, see `leader_of`."""
    for role in (*arch.readers(sub_block), WRITERS[sub_block]):
        leader = leader_of(structures, f"layers.{layer}.{role}")
        if leader is not None:
            follower, source = (parent.get_submodule(name.rpartition(".")[2]) for name in (role, leader))
            assert isinstance(follower, StructuredLinear)
            assert isinstance(source, StructuredLinear)
            follower.share(source)


def _linear(
    arch: Architecture, structures: Mapping[str, Structure], layer: int, role: str, biases: Collection[str]
) -> StructuredLinear:
    n, m = arch.linears()[role]
    structure = structures.get(f"layers.{layer}.{role}") or DenseStructure(in_features=m, out_features=n)
    if (structure.out_features, structure.in_features) != (n, m):
        raise ArtifactError(
            f"layers.{layer}.{role} is {n} x {m} in the architecture but its structure in config.json is "
            f"{structure.out_features} x {structure.in_features}"
        )
    return StructuredLinear(structure, arch.has_bias(role) or f"layers.{layer}.{role}" in biases)


def structured_state(linear: str, factors: Mapping[str, Tensor], bias: Tensor | None) -> dict[str, Tensor]:
    """State-dict entries of one linear of the checkpoint, e.g. model.layers.0.attn.q.B."""
    state = {f"model.{linear}.{name}": tensor for name, tensor in factors.items()}
    if bias is not None:
        state[f"model.{linear}.bias"] = bias
    return state
