"""Fitting the factors block by block, on the activations of the model compressed so far.

Two streams run side by side: x_f of the dense (rotated) model and x_c of the compressed one. With correction b, the
target of each fit is shifted so as to undo the share b of the error made so far, by least squares on x_c:

    readers  W* = W + b W E[(h_f - h_c) h_c^T] G^-1               h = normalised stream, G = E[h_c h_c^T]
    writers  W* = W + b E[(y_f - W a_c + s_f - s_c) a_c^T] G^-1   a = input, y = output, s = the skipped stream,
                                                                  G = E[a_c a_c^T]

(derived here after SAES-SVD's sequential correction; methods 6.4). Every structure then fits W* in the metric of G.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.architecture import WRITERS
from compress.blocks import Block, StructuredLinear, rms_normalise
from compress.checkpoint import structured_state
from compress.invariance import FoldedModel, Weights, rotate_block
from compress.inner import change_value_basis, permute_neurons
from compress.planning import Moments, Plan
from compress.procrustes import damped
from compress.progress import log, track
from compress.recipe import Recipe
from compress.rotating import position_of
from compress.statistics import SUB_BLOCKS
from compress.streams import GramSum, Runner, embed, mapped, save_whole
from compress.structures import DenseStructure, SelectStructure, Structure


@dataclass(frozen=True)
class FitRecord:
    """What one linear became. relative_error = ||X(W - What)|| / ||XW|| on the inputs it was fitted on."""

    name: str
    structure: str
    parameters: int
    dense_parameters: int
    relative_error: float
    predicted_loss: float | None


class LayerFitter:
    """Fits one block after the other; `run` returns a file of state-dict entries for each, and all records.

    The two streams after each block are kept in `state`, so that a run that was interrupted goes on at the next block.
    """

    def __init__(
        self,
        model: FoldedModel,
        plan: Plan,
        recipe: Recipe,
        moments: Moments,
        tokens: Tensor,
        runner: Runner,
        state: Path,
    ) -> None:
        self.model, self.plan, self.recipe, self.moments = model, plan, recipe, moments
        self.runner, self.state, self.shape = runner, state, (*tokens.shape, model.arch.hidden_size)
        self.tokens = tokens

    def run(self) -> tuple[list[Path], list[FitRecord]]:
        """Fits all blocks; returns one safetensors file per block, in order, and all records."""
        files: list[Path] = []
        records: list[FitRecord] = []
        for layer in track(range(self.model.arch.num_layers), description="fit"):
            file, record_file = self.state / f"block-{layer}.safetensors", self.state / f"block-{layer}.json"
            if not record_file.exists():
                tensors, fresh = self._fit(layer)
                save_whole(tensors, file)
                partial = record_file.with_suffix(".partial")
                partial.write_text(json.dumps([asdict(r) for r in fresh]))
                partial.rename(record_file)  # last: its presence says that block and streams are complete
                for name in ("dense", "compressed"):
                    self._stream_file(name, layer).unlink(missing_ok=True)
            files.append(file)
            records.extend(FitRecord(**r) for r in json.loads(record_file.read_text()))
        return files, records

    def _stream_file(self, name: str, layer: int) -> Path:
        return self.state / f"fit-{name}-{layer}.f32"

    def _streams(self, layer: int) -> tuple[Tensor, Tensor]:
        """The two streams at the entry of `layer`."""
        if layer == 0:
            ends = self.model.ends(self.plan.rotations)
            x = embed(ends, self.model.arch, self.tokens)
            return x, x.clone()
        return tuple(mapped(self._stream_file(n, layer), self.shape) for n in ("dense", "compressed"))  # type: ignore[return-value]

    @torch.no_grad()
    def _fit(self, layer: int) -> tuple[dict[str, Tensor], list[FitRecord]]:
        arch, runner = self.model.arch, self.runner
        weights = rotate_block(self.rewritten(layer), arch, layer, self.plan.rotations)
        skips = self.plan.rotations.kind == "block"
        dense = runner.block(layer, weights, {}, skips)
        kept = {n: w for n, w in weights.items() if "norm" in n or "skip" in n}
        block = runner.block(layer, kept, self.plan.structures, skips)
        x_f, x_c = (x.clone() for x in self._streams(layer))
        state, records = {f"model.layers.{layer}.{n}": w for n, w in kept.items()}, []
        for sub in SUB_BLOCKS:
            for role in (*arch.readers(sub), WRITERS[sub]):
                if role == WRITERS[sub]:
                    inner = torch.empty(*self.shape[:2], arch.linears()[role][1])
                    gram, shift = self._writer_moments(sub, dense, block, x_f, x_c, inner)
                elif role == arch.readers(sub)[0]:
                    gram, shift = self._reader_moments(x_f, x_c)
                record, entries = self._fit_linear(layer, role, weights, gram, shift, block)
                state.update(entries)
                records.append(record)
            skip, writer = self._parts(sub, block)
            for part, (c, a_c) in runner.batches(x_c, inner):
                x_c[part] = (skip(c) + writer(a_c)).cpu()
        for name, stream in (("dense", x_f), ("compressed", x_c)):
            mapped(self._stream_file(name, layer + 1), self.shape).copy_(stream)
        return state, records

    def rewritten(self, layer: int) -> Weights:
        """The dense block after the exact rewrites of its inner side that the plan asks for."""
        weights, inner = self.model.block(layer), self.plan.inner.get(layer)
        if inner is not None and inner.order is not None:
            weights = permute_neurons(weights, self.model.arch, inner.order)
        if inner is not None and inner.basis is not None:
            weights = change_value_basis(weights, self.model.arch, inner.basis)
        return weights

    def _reader_moments(self, x_f: Tensor, x_c: Tensor) -> tuple[Tensor, Tensor]:
        """G and D = E[(h_f - h_c) h_c^T], both (d, d)."""
        d, eps = self.shape[-1], self.model.arch.norm_eps
        gram, gap = GramSum(d, d, self.runner.device), GramSum(d, d, self.runner.device)
        for _, (f, c) in self.runner.batches(x_f, x_c):
            h_f, h_c = rms_normalise(f, eps), rms_normalise(c, eps)
            gram.add(h_c)
            gap.add(h_f - h_c, h_c)
        return gram.mean(), gap.mean()

    def _inner(self, sub: str, block: Block, x: Tensor) -> Tensor:
        h = rms_normalise(x, self.model.arch.norm_eps)
        if sub == "attn":
            return block.attn.inner(h, self.runner.rotary, self.runner.mask)
        return block.mlp.inner(h)

    @staticmethod
    def _parts(sub: str, block: Block) -> tuple[torch.nn.Module, StructuredLinear]:
        """The skip and the writer of a sub-block."""
        return (block.attn_skip, block.attn.o) if sub == "attn" else (block.mlp_skip, block.mlp.down)

    def _writer_moments(
        self, sub: str, dense: Block, block: Block, x_f: Tensor, x_c: Tensor, inner: Tensor
    ) -> tuple[Tensor, Tensor]:
        """G (inner, inner) and R = E[(y_f - W a_c + s_f - s_c) a_c^T] (d, inner).

        On the way a_c is kept in `inner` and x_f is taken past the sub-block, in place: neither is computed twice.
        """
        skip, writer = self._parts(sub, dense)
        gram = GramSum(inner.shape[-1], inner.shape[-1], self.runner.device)
        gap = GramSum(self.shape[-1], inner.shape[-1], self.runner.device)
        for part, (f, c) in self.runner.batches(x_f, x_c):
            a_c = self._inner(sub, block, c)
            after = skip(f) + writer(self._inner(sub, dense, f))
            gram.add(a_c)
            if self.recipe.correction:
                gap.add(after - writer(a_c) - skip(c), a_c)
            inner[part], x_f[part] = a_c.cpu(), after.cpu()
        return gram.mean(), gap.mean()

    def _fit_linear(
        self, layer: int, role: str, weights: Weights, gram: Tensor, gap: Tensor, block: Block
    ) -> tuple[FitRecord, dict[str, Tensor]]:
        """Fit one linear, put its factors into `block`, return its record and state-dict entries."""
        name, recipe, arch = f"layers.{layer}.{role}", self.recipe, self.model.arch
        n, m = arch.linears()[role]
        structure: Structure = self.plan.structures.get(name) or DenseStructure(in_features=m, out_features=n)
        weight = weights[f"{role}.weight"].to(self.runner.device).double()
        gram = damped(gram, recipe.gram_damping)
        target = weight
        if recipe.correction and self.plan.structures:
            cross = gap if role in WRITERS.values() else weight @ gap  # (out, in)
            target = weight + recipe.correction * torch.linalg.solve(gram, cross.T).T
        factors = self._factors(structure, target, gram, self._metric(layer, role))
        factors = {key: value.float() for key, value in factors.items()}
        approximation = structure.dense(factors).double()
        if not torch.isfinite(approximation).all():
            raise ArithmeticError(f"the fit of {name} is not finite")
        module = block.get_submodule(role)
        bias = weights.get(f"{role}.bias")
        tensors = dict(factors) if bias is None else {**factors, "bias": bias.to(self.runner.device)}
        module.load_state_dict(tensors, assign=True)
        lost, whole = weight - approximation, ((weight @ gram) * weight).sum()
        error = float((((lost @ gram) * lost).sum() / whole.clamp(min=1e-300)).clamp(min=0).sqrt())
        record = FitRecord(
            name, structure.name, structure.parameter_count(), n * m, error, self.plan.predicted.get(name)
        )
        return record, structured_state(name, {k: v.cpu() for k, v in factors.items()}, bias)

    @staticmethod
    def _factors(structure: Structure, target: Tensor, gram: Tensor, metric: Tensor | None) -> dict[str, Tensor]:
        """The fit. Dropped outputs are made up for by who reads the others: what is kept is fitted by itself."""
        if isinstance(structure, SelectStructure) and structure.side == "out":
            stay = structure.features().to(target.device)
            return structure.reduced.fit(target[stay], gram, None if metric is None else metric[stay][:, stay])
        return structure.fit(target, gram, metric)

    def _metric(self, layer: int, role: str) -> Tensor | None:
        """The loss metric of a linear's output after the rewrites and in the rotated stream; None without gradients."""
        sub_block = role.split(".")[0]
        moment = self.moments.get((layer, sub_block))
        if moment is None or moment.gradients is None:
            return None
        metric = damped(moment.gradients[role], self.recipe.metric_damping).to(self.runner.device)
        inner = self.plan.inner.get(layer)
        if inner is not None:
            metric = inner.output_metric(role, metric)
        q = self.plan.rotations.at(position_of(layer, role)) if role in WRITERS.values() else None
        return metric if q is None else q.T.to(metric) @ metric @ q.to(metric)


def summarise(records: list[FitRecord]) -> None:
    """One line for the log."""
    dense = sum(r.structure == "dense" for r in records)
    kept = sum(r.parameters for r in records) / sum(r.dense_parameters for r in records)
    log(f"{len(records)} linears, {dense} left dense, {kept:.4f} of the projection parameters")
