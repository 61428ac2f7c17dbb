"""Fitting the factors block by block, on the activations of the model compressed so far.

Two streams run side by side: x_f of the dense (rotated) model and x_c of the compressed one. With correction b, the
target of each fit is shifted so as to undo the share b of the error made so far, by least squares on x_c:

    readers  W* = W + b W E[(h_f - h_c) h_c^T] G^-1               h = normalised stream, G = E[h_c h_c^T]
    writers  W* = W + b E[(y_f - W a_c + s_f - s_c) a_c^T] G^-1   a = input, y = output, s = the skipped stream,
                                                                  G = E[a_c a_c^T]

(derived here after SAES-SVD's correction; docs/method.md#sequential-correction). Every structure then fits W* in the
metric of G.
With bias correction the moments are centred, and a bias makes up for what the means of both terms differ by.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from compress.allocation.plan import Plan
from compress.architecture import SUB_BLOCKS, WRITERS, extra_biases, position_of
from compress.artifact.ledger import KeptFolder
from compress.artifact.state import mapped, mapped_anew, save_whole
from compress.calibration.moments import Moments, StreamMoments
from compress.calibration.streams import Runner, embed
from compress.errors import UsageError
from compress.fit.bias import bias_correction, centred
from compress.fit.fallback import Fit, Linear, fit_linears
from compress.fit.record import FitRecord
from compress.fit.targets import FitMoments
from compress.linalg import all_finite, damped, is_singular, noted_damping
from compress.model.blocks import Block, StructuredLinear, rms_normalise, structured_state
from compress.progress import log, track
from compress.recipe import Recipe
from compress.rewrites.folding import FoldedModel
from compress.rewrites.inner import RewrittenModel
from compress.rewrites.rotations import Weights, rotate_block
from compress.structures import DenseStructure, SelectStructure, Structure, structure_from_config
from compress.structures.joint import leader_of


class LayerFitter:
    """Fits one block after the other; `run` returns a file of state-dict entries for each, and all records.

    The two streams after each block are kept in `kept`, so that a run that was interrupted goes on at the next block.
    """

    def __init__(
        self,
        model: FoldedModel,
        plan: Plan,
        recipe: Recipe,
        moments: Moments,
        tokens: Tensor,
        runner: Runner,
        kept: KeptFolder,
        ends: Weights,
    ) -> None:
        self.ends = ends
        self.model: FoldedModel = RewrittenModel(model, plan.rewrites)
        self.plan, self.recipe, self.moments = plan, recipe, moments
        self.runner, self.kept, self.shape = runner, kept, (*tokens.shape, model.arch.hidden_size)
        self.tokens = tokens
        self._last_step: tuple[FitMoments, tuple[Tensor, Tensor | None]] | None = None
        self._last_moment: tuple[tuple[int, str], StreamMoments | None] | None = None
        # A bias for every linear: one that stays dense has its share of the error made so far to make up for.
        self.biases = frozenset(extra_biases(model.arch, tuple(model.arch.linears())) if "bias" in recipe.inner else ())

    def run(self) -> tuple[list[Path], list[FitRecord]]:
        """Fits all blocks; returns one safetensors file per block, in order, and all records.

        Where a fit fails the linear is left as it is (compress/fit/fallback.py) and its entry in `plan.structures`
        changed. Raises UsageError when weights or activations are not finite.
        """
        files: list[Path] = []
        records: list[FitRecord] = []
        for layer in track(range(self.model.arch.num_layers), description="fit"):
            name = f"block-{layer}"
            if f"{name}.json" not in self.kept:
                tensors, fresh = self._fit(layer)
                save_whole(tensors, self.kept.path(f"{name}.safetensors"))
                structures = {r.name: self._structure(r.name).to_config() for r in fresh if r.failed}
                self.kept.write_value(name, {"records": [asdict(r) for r in fresh], "structures": structures})
                self.kept.keep(
                    f"{name}.safetensors", f"{name}.json", *_stream_files(layer + 1), drop=_stream_files(layer)
                )
            files.append(self.kept.path(f"{name}.safetensors"))
            found = self.kept.read_value(name)
            records.extend(FitRecord(**r) for r in found["records"])
            for linear, config in found["structures"].items():  # from an interrupted run, not in the plan
                self._replace(linear, structure_from_config(config))
        return files, records

    def _streams(self, layer: int) -> tuple[Tensor, Tensor]:
        """The two streams at the entry of `layer`."""
        if layer == 0:
            dense = self.model.ends(self.plan.rotations)
            return tuple(embed(ends, self.model.arch, self.tokens) for ends in (dense, self.ends))  # type: ignore[return-value]
        return tuple(mapped(self.kept.path(name), self.shape) for name in _stream_files(layer))  # type: ignore[return-value]

    @torch.no_grad()
    def _fit(self, layer: int) -> tuple[dict[str, Tensor], list[FitRecord]]:
        arch, runner = self.model.arch, self.runner
        weights = rotate_block(self.model.block(layer), arch, layer, self.plan.rotations)
        skips = self.plan.rotations.of_block(layer)
        dense = runner.block(layer, weights, {}, skips)
        kept = {n: w for n, w in weights.items() if "norm" in n or "skip" in n}
        block = runner.block(layer, kept, self._run_as(layer), skips, self.biases)
        x_f, x_c = (x.clone() for x in self._streams(layer))
        state, records = {f"model.layers.{layer}.{n}": w for n, w in kept.items()}, list[FitRecord]()
        for sub in SUB_BLOCKS:
            seen = self._reader_moments(x_f, x_c)
            self._require_finite(layer, sub, seen, x_f)
            for roles in self._groups(layer, sub):
                self._fit_group(layer, roles, weights, seen, block, state, records)
            inner = torch.empty(*self.shape[:2], arch.linears()[WRITERS[sub]][1])
            seen = self._writer_moments(sub, dense, block, x_f, x_c, inner)
            self._require_finite(layer, sub, seen, x_f)
            self._fit_group(layer, (WRITERS[sub],), weights, seen, block, state, records)
            skip, writer = self._parts(sub, block)
            for part, (c, a_c) in runner.batches(x_c, inner):
                with runner.computing():
                    x_c[part] = (skip(c) + writer(a_c)).cpu()
        for name, stream in zip(_stream_files(layer + 1), (x_f, x_c), strict=True):
            mapped_anew(self.kept.path(name), self.shape).copy_(stream)
        return state, records

    def _groups(self, layer: int, sub: str) -> list[tuple[str, ...]]:
        """The readers of a sub-block, each with those that share its V."""
        groups: dict[str, tuple[str, ...]] = {}
        for role in self.model.arch.readers(sub):
            leader = leader_of(self.plan.structures, f"layers.{layer}.{role}")
            name = role if leader is None else leader.split(".", 2)[2]
            groups[name] = (*groups.get(name, ()), role)
        return list(groups.values())

    def _reader_moments(self, x_f: Tensor, x_c: Tensor) -> FitMoments:
        """r = h_f - h_c."""
        d, eps = self.shape[-1], self.model.arch.norm_eps
        gram, gap = self.runner.gram(d), self.runner.gram(d)
        for _, (f, c) in self.runner.batches(x_f, x_c):
            h_f, h_c = rms_normalise(f, eps), rms_normalise(c, eps)
            gram.add(h_c)
            gap.add(h_f - h_c, h_c)
        return FitMoments.of(gram, gap)

    def _require_finite(self, layer: int, sub: str, seen: FitMoments, x_f: Tensor) -> None:
        """Raise UsageError when the dense model, or the compressed one so far, has overflown."""
        if all(all_finite(moment) for moment in (seen.gram, seen.gap)):
            return
        if not all_finite(x_f):
            raise UsageError(
                f"the activations of the source model are NaN or infinite at layers.{layer}.{sub}: its weights are "
                f"damaged or it overflows float32; check the model"
            )
        raise UsageError(
            f"the activations of the compressed model are NaN or infinite at layers.{layer}.{sub}, those of the "
            f"source model are not: raise --ratio, or set --correction 0"
        )

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
    ) -> FitMoments:
        """r = y_f - W a_c + s_f - s_c.

        On the way a_c is kept in `inner` and x_f is taken past the sub-block, in place: neither is computed twice.
        """
        skip, writer = self._parts(sub, dense)
        gram, gap = self.runner.gram(inner.shape[-1]), self.runner.gram(self.shape[-1], inner.shape[-1])
        for part, (f, c) in self.runner.batches(x_f, x_c):
            with self.runner.computing():
                a_c = self._inner(sub, block, c)
                after = skip(f) + writer(self._inner(sub, dense, f))
                error = after - writer(a_c) - skip(c) if self.recipe.correction else None
            gram.add(a_c)
            if error is not None:
                gap.add(error, a_c)
            inner[part], x_f[part] = a_c.cpu(), after.cpu()
        return FitMoments.of(gram, gap)

    def _fit_group(
        self,
        layer: int,
        roles: tuple[str, ...],
        weights: Weights,
        seen: FitMoments,
        block: Block,
        state: dict[str, Tensor],
        records: list[FitRecord],
    ) -> None:
        """Fit one linear, or the readers that share one V; put factors into `block`, entries into `state`, records."""
        names = {role: f"layers.{layer}.{role}" for role in roles}
        dense = {role: weights[f"{role}.weight"].to(self.runner.device).double() for role in roles}
        gram, targets, shifts = self._targets(dense, seen)
        linears = [Linear(self._structure(names[r]), dense[r], targets[r], self._metric(layer, r)) for r in roles]
        with noted_damping() as singular:
            fits = self._fits(layer, names, linears, gram)
        if seen.singular:
            singular.append("Gram matrix")
        for (role, name), fit in zip(names.items(), fits, strict=True):
            structure, whole, failed = fit.structure, fit.factors, fit.failed
            approximation, run = structure.dense(whole).double(), {key: whole[key] for key in structure.shapes()}
            if _drops_outputs(structure):
                # Run with all its outputs: what reads the kept ones is fitted to make up for the others (`_run_as`).
                stay, every = structure.features().to(approximation.device), dense[role] if failed else targets[role]
                approximation = every.index_copy(0, stay, approximation[stay])
                run = {"weight": approximation.float()}
            bias = weights.get(f"{role}.bias")
            if "bias" in self.recipe.inner:
                shift = None if failed else shifts[role]  # nothing is corrected by numbers that are not to be trusted
                delta = bias_correction(dense[role], approximation, seen.mean, shift).float()
                bias = delta.cpu() if bias is None else bias + delta.cpu()
            tensors = run if bias is None else {**run, "bias": bias.to(self.runner.device)}
            if failed:
                self._replace(name, structure)
                if not _drops_outputs(structure):
                    with torch.device("meta"):
                        block.set_submodule(role, StructuredLinear(structure, bias is not None))
            block.get_submodule(role).load_state_dict(tensors, assign=True)
            if bias is not None and isinstance(structure, SelectStructure):
                bias = structure.kept_bias(bias)
            state.update(structured_state(name, {k: whole[k].cpu() for k in structure.shapes()}, bias))
            n, m = approximation.shape
            error, predicted = _relative_error(dense[role], approximation, gram), self.plan.predicted.get(name)
            if failed and predicted is not None and structure.name == "dense":
                predicted = 0.0
            damping = self._damping(layer, role, structure, singular)
            size = structure.parameter_count()
            records.append(FitRecord(name, structure.name, size, n * m, error, predicted, failed, fit.note, damping))

    def _fits(self, layer: int, names: dict[str, str], linears: list[Linear], gram: Tensor) -> list[Fit]:
        """The fits, each note logged. Raises UsageError naming a weight that is not finite."""
        for name, linear in zip(names.values(), linears, strict=True):
            if not all_finite(linear.weight):
                raise UsageError(f"the weight of {name} contains NaN or infinity; check the source model")
        fits = fit_linears(linears, gram)
        for name, fit in zip(names.values(), fits, strict=True):
            if fit.note is not None:
                log(f"warning: {name} {fit.note}" if fit.failed else f"{name}: {fit.note}")
        return fits

    def _replace(self, name: str, structure: Structure) -> None:
        """Make `structure` that of a linear for the rest of the pipeline."""
        if isinstance(structure, DenseStructure):
            self.plan.structures.pop(name, None)
        else:
            self.plan.structures[name] = structure

    def _damping(self, layer: int, role: str, structure: Structure, noted: list[str]) -> str | None:
        """Which moments of a linear were singular, before the recipe's damping or in spite of it."""
        found = set(noted)
        moment = self._moment(layer, role.split(".")[0])
        if structure.name != "dense" and moment is not None and moment.gradients is not None:
            found |= {"metric"} if is_singular(moment.gradients[role]) else set()
        return ", ".join(sorted(found)) or None

    def _run_as(self, layer: int) -> dict[str, Structure]:
        """The structures as the fits of a block run them: those that drop outputs still have them all.

        With the dropped inputs a_D there to see, the writer's fit makes up for them in full (Nystroem), and only for
        the error of the stream by `correction`. The kept ones are the same, and it reads no others.
        """
        prefix = f"layers.{layer}."
        here = {name: s for name, s in self.plan.structures.items() if name.startswith(prefix)}
        return {name: s for name, s in here.items() if not _drops_outputs(s)}

    def _structure(self, name: str) -> Structure:
        n, m = self.model.arch.linears()[name.split(".", 2)[2]]
        return self.plan.structures.get(name) or DenseStructure(in_features=m, out_features=n)

    def _targets(
        self, dense: dict[str, Tensor], seen: FitMoments
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor | None]]:
        """The damped Gram matrix, W* of each linear, and the mean (out,) of what its bias should add to W x."""
        b = self.recipe.correction if self.plan.structures else 0.0
        gram, step = self._step(seen, b > 0)
        targets, shifts = dict[str, Tensor](), dict[str, Tensor | None]()
        for role, weight in dense.items():
            writes = role in WRITERS.values()
            targets[role] = weight if step is None else weight + b * (step if writes else weight @ step)
            shifts[role] = b * (seen.gap_mean if writes else weight @ seen.gap_mean) if b else None
        return gram, targets, shifts

    def _step(self, seen: FitMoments, corrects: bool) -> tuple[Tensor, Tensor | None]:
        """The damped Gram matrix G (in, in) and E[r x^T] G^-1 (rows, in), found once for all that read the same x."""
        if self._last_step is not None and self._last_step[0] is seen:
            return self._last_step[1]
        gram, gap, step = seen.gram, seen.gap, None
        if "bias" in self.recipe.inner:
            gram, gap = centred(gram, seen.mean), centred(gap, seen.gap_mean, seen.mean)
        gram = damped(gram, self.recipe.gram_damping)
        if corrects:
            factor, info = torch.linalg.cholesky_ex(gram)  # a singular G gives numbers that `fit_linears` refuses
            step = torch.cholesky_solve(gap.T, factor).T if int(info) == 0 else torch.full_like(gap, torch.nan)
        self._last_step = seen, (gram, step)
        return gram, step

    def _moment(self, layer: int, sub_block: str) -> StreamMoments | None:
        """The moments of the dense model, read from their files once for all linears of a sub-block."""
        key = layer, sub_block
        if self._last_moment is None or self._last_moment[0] != key:
            self._last_moment = key, self.moments.get(key)
        return self._last_moment[1]

    def _metric(self, layer: int, role: str) -> Tensor | None:
        """The loss metric of a linear's output after the rewrites and in the rotated stream; None without gradients."""
        sub_block = role.split(".")[0]
        moment = self._moment(layer, sub_block)
        if moment is None or moment.gradients is None:
            return None
        gradient = self.plan.rewrites.gradient_moment(moment.gradients[role], self.model.arch, layer, role)
        metric = damped(gradient, self.recipe.metric_damping).to(self.runner.device)
        q = self.plan.rotations.at(position_of(layer, role)) if role in WRITERS.values() else None
        return metric if q is None else q.T.to(metric) @ metric @ q.to(metric)


def _stream_files(layer: int) -> tuple[str, str]:
    """Files of the dense model's stream and of the compressed one's at the entry of `layer`."""
    return f"fit-dense-{layer}.f32", f"fit-compressed-{layer}.f32"


def _drops_outputs(structure: Structure) -> TypeGuard[SelectStructure]:
    return isinstance(structure, SelectStructure) and structure.side == "out"


def _relative_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """||X (W - What)|| / ||X W||; 1 where X W is nothing, as of a dead linear, and only a correction is left."""
    scale = float(weight.abs().max()) or 1.0
    seen = (gram / gram.diagonal().mean()).float()  # a figure for people: float32, scaled to be in its range
    lost, whole = (
        float(((x @ seen) * x).sum(dtype=torch.float64))
        for x in (((weight - approximation) / scale).float(), (weight / scale).float())
    )
    if whole <= 1e-20 * lost:
        return 1.0
    return (max(lost, 0.0) / whole) ** 0.5 if lost > 0 else 0.0
