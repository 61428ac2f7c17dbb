"""SliceGPT (arXiv 2401.15024) as a baseline: principal components of the stream, and plain slices of every weight.

At each position, on the network as sliced so far: C = sum x x^T of the residual stream that the norm reads, in
float64, damped by 0.01 of its mean diagonal; Q = its eigenvectors in descending order; readers keep W Q[:, :k], writers
and the embedding Q[:, :k]^T W, and the skip between two positions the k x k leading block of Q_p^T Q_{p+1}. Nothing is
refitted. RMS norms still divide by d. The head's position is rotated and not sliced.

It maps onto what a checkpoint already knows: structures `kron` with mix "leading", rotation "block", skips "slice". A
tied embedding is also the head and stays whole: its further coordinates reach the first norm, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.allocation.budget import kept_width
from compress.allocation.width import leading_structures
from compress.architecture import SUB_BLOCKS, WRITERS, Architecture
from compress.artifact.ledger import KeptFolder
from compress.artifact.state import mapped, mapped_anew, save_whole
from compress.calibration.gram import GramSum
from compress.calibration.streams import Runner, embed
from compress.fit.ends import fitted_ends
from compress.fit.record import FitRecord
from compress.linalg import damped
from compress.methods.base import Context, Fitted, Space, check_named_layers
from compress.methods.space import fitted_blocks, larger, memory_with_streams, rotation_bytes, stream_bytes
from compress.model.blocks import Block, rms_normalise
from compress.model.skips import SliceSkip
from compress.progress import track
from compress.recipe import Recipe
from compress.rewrites.folding import FoldedModel
from compress.rewrites.rotations import Rotations, Weights, rotate_block
from compress.structures import Structure

DAMPING = 0.01
"""Fraction of the mean diagonal, as published; it moves no eigenvector."""


@dataclass(frozen=True)
class Sliced:
    """A sliced model: what config.json says, a file of state-dict entries for each block, what each linear lost."""

    rotations: Rotations
    structures: dict[str, Structure]
    files: list[Path]
    records: list[FitRecord]


def principal_components(gram: Tensor) -> Tensor:
    """Eigenvectors (d, d) of a second moment, the largest eigenvalue first, float64."""
    vectors: Tensor = torch.linalg.eigh(damped(gram, DAMPING)).eigenvectors
    return vectors.flip(1)


def slice_model(model: FoldedModel, tokens: Tensor, kept: int, runner: Runner, state: KeptFolder) -> Sliced:
    """Slice every block of `model` (float32) to `kept` coordinates, calibrated on `tokens` (samples, length) int64.

    `state` holds the stream after each block and what was found there, so that an interrupted run goes on at the next
    block. Raises UsageError for a width that is not in 1 ... d.
    """
    arch, d = model.arch, model.arch.hidden_size
    structures = leading_structures(arch, kept, d)
    slicer = _Slicer(model, tokens, kept, runner, state)
    matrices: list[Tensor] = []
    errors: dict[str, float] = {}
    for layer in track(range(arch.num_layers), description="slice"):
        found, lost = slicer.block(layer)
        matrices += [found[name] for name in sorted(found, key=int)]
        errors |= lost
    skips = (SliceSkip(d, kept, kept),) * (2 * arch.num_layers - 1) + (SliceSkip(d, kept, d),)
    rotations = Rotations("block", tuple(matrices), skips)
    files, records = [], []
    for layer in range(arch.num_layers):
        file = f"block-{layer}.safetensors"
        files.append(state.path(file))
        if file not in state:
            save_whole(sliced_block(model, layer, rotations), files[-1])
            state.keep(file)
        for role, (n, m) in arch.linears().items():
            name = f"layers.{layer}.{role}"
            structure = structures.get(name)
            kind, parameters = ("dense", n * m) if structure is None else (structure.name, structure.parameter_count())
            records.append(FitRecord(name, kind, parameters, n * m, errors[name], None))
    return Sliced(rotations, structures, files, records)


def sliced_block(model: FoldedModel, layer: int, rotations: Rotations) -> dict[str, Tensor]:
    """State-dict entries of block `layer`, rotated and cut where the skips past it are."""
    arch = model.arch
    weights = rotate_block(model.block(layer), arch, layer, rotations)
    for sub, form in zip(SUB_BLOCKS, rotations.of_block(layer), strict=True):
        assert isinstance(form, SliceSkip)
        for role in arch.readers(sub):
            weights |= _named(weights.pop(f"{role}.weight")[:, : form.kept_in], role, form.kept_in < form.width)
        writer, cut = WRITERS[sub], form.kept_out < form.width
        weights |= _named(weights.pop(f"{writer}.weight")[: form.kept_out], writer, cut)
        if f"{writer}.bias" in weights:
            weights[f"{writer}.bias"][form.kept_out :] = 0
    return {f"model.layers.{layer}.{name}": tensor.contiguous() for name, tensor in weights.items()}


def _named(weight: Tensor, role: str, cut: bool) -> Weights:
    return {f"{role}.{'B' if cut else 'weight'}": weight}


class _Slicer:
    """Finds the principal components at each position, on the stream of the network sliced so far.

    The stream is kept in the source's own coordinates: to slice position p is to project what flows past it on K, the
    span of the first k columns of Q. Readers of a projected stream are those of the sliced network, W K K^T x = W x.
    """

    def __init__(self, model: FoldedModel, tokens: Tensor, kept: int, runner: Runner, state: KeptFolder) -> None:
        self.model, self.tokens, self.kept, self.runner, self.state = model, tokens, kept, runner, state
        self.shape = (*tokens.shape, model.arch.hidden_size)

    def block(self, layer: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The rotations found in block `layer` by position, and the relative error of each of its linears."""
        name = f"slice-{layer}"
        if f"{name}.json" not in self.state:
            found, errors = self._find(layer)
            save_whole(found, self.state.path(f"{name}.safetensors"))
            self.state.write_value(name, errors)
            self.state.keep(f"{name}.safetensors", f"{name}.json", _stream_file(layer + 1), drop=[_stream_file(layer)])
        return load_file(self.state.path(f"{name}.safetensors")), self.state.read_value(name)

    @torch.no_grad()
    def _find(self, layer: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        arch, weights = self.model.arch, self.model.block(layer)
        block = self.runner.block(layer, weights, {}, False)
        following = mapped_anew(self.state.path(_stream_file(layer + 1)), self.shape)
        if layer == 0:
            stream = embed(self.model.ends(Rotations.none()), arch, self.tokens)
            total = GramSum(self.shape[-1], self.shape[-1], self.runner.device)
            for _, (x,) in self.runner.batches(stream):
                total.add(x.double())
            found = {"0": principal_components(total.mean())}
            q = found["0"]
        else:
            stream, found = mapped(self.state.path(_stream_file(layer)), self.shape), {}
            q = load_file(self.state.path(f"slice-{layer - 1}.safetensors"))[str(2 * layer)].to(self.runner.device)
        errors: dict[str, float] = {}
        for sub in SUB_BLOCKS:
            position = 2 * layer + SUB_BLOCKS.index(sub)
            last = position + 1 == 2 * arch.num_layers
            whole_norm = position == 0 and arch.tied
            grams = self._past(sub, block, stream, following, q[:, : self.kept], whole_norm)
            after = principal_components(grams["stream"])
            kept_out = self.shape[-1] if last else self.kept
            for role in arch.readers(sub):
                errors[f"layers.{layer}.{role}"] = _lost(grams["read"], q[:, : self.kept], weights[f"{role}.weight"])
            errors[f"layers.{layer}.{WRITERS[sub]}"] = _lost(grams["write"], after[:, :kept_out])
            found[str(position + 1)] = q = after
            stream = following
        return {name: matrix.cpu() for name, matrix in found.items()}, errors

    def _past(
        self, sub: str, block: Block, stream: Tensor, following: Tensor, kept: Tensor, whole_norm: bool
    ) -> dict[str, Tensor]:
        """Take `stream` past a sub-block whose position keeps the columns of `kept` (d, k), into `following`.

        Returns the second moments of the normalised stream before it is cut, of what the writer adds without its bias,
        and of the stream that results. `whole_norm`: the norm sees the stream before it is cut, too.
        """
        d, eps = self.shape[-1], self.model.arch.norm_eps
        sums = {name: GramSum(d, d, self.runner.device) for name in ("read", "write", "stream")}
        projector = (kept @ kept.T).float()
        writer = block.attn.o if sub == "attn" else block.mlp.down
        for part, (x,) in self.runner.batches(stream):
            normalised, cut = rms_normalise(x, eps), x @ projector
            h = normalised @ projector if whole_norm else rms_normalise(cut, eps)
            if sub == "attn":
                out = writer(block.attn.inner(h, self.runner.rotary, self.runner.mask))
            else:
                out = writer(block.mlp.inner(h))
            after = cut + out
            sums["read"].add(normalised)
            sums["write"].add(out if writer.bias is None else out - writer.bias)
            sums["stream"].add(after.double())
            following[part] = after.cpu()
        return {name: total.mean() for name, total in sums.items()}


def _stream_file(layer: int) -> str:
    return f"slice-stream-{layer}.f32"


def _lost(gram: Tensor, kept: Tensor, weight: Tensor | None = None) -> float:
    """||W (I - K K^T) x|| / ||W x|| over x of second moment `gram` (d, d); W = I where no weight (n, d) is given."""
    dropped = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) - kept @ kept.T
    if weight is None:
        lost, whole = (dropped @ gram).trace(), gram.trace()
    else:
        w = weight.to(gram)
        left = w @ dropped
        lost, whole = ((left @ gram) * left).sum(), ((w @ gram) * w).sum()
    return float((lost / whole.clamp(min=1e-300)).clamp(min=0).sqrt())


class SliceGPT:
    """Principal components of the stream of each block."""

    name = "slicegpt"

    def check(self, arch: Architecture, recipe: Recipe) -> None:
        """Raise UsageError where even the smallest width is too much, and for names that are given other sizes."""
        check_named_layers(arch, recipe, leading_structures(arch, kept_width(arch, recipe), arch.hidden_size))

    def space(self, arch: Architecture, recipe: Recipe) -> Space:
        """See `Method.space`."""
        stream = stream_bytes(arch, recipe, few=False)
        during, after = {"streams": 2 * stream}, {"streams": stream, **fitted_blocks(arch, recipe)}
        state = {"rotations": rotation_bytes(arch, recipe), **larger(during, after)}
        return Space(state, memory_with_streams(arch, recipe, (0, 0)))

    def fit(self, context: Context) -> Fitted:
        """See `Method.fit`."""
        model, recipe, tokens = context.model, context.recipe, context.text
        found = slice_model(model, tokens, kept_width(model.arch, recipe), context.runner, context.state)
        ends, ranks = fitted_ends(model, recipe, found.rotations, tokens, {})
        return Fitted(found.rotations, found.structures, ends, found.files, found.records, ranks)
