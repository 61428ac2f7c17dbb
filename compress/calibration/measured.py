"""`--sensitivity measured`: what a relative error of each class of linears costs, by trying; no backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from compress.architecture import WRITERS
from compress.artifact.ledger import Keeper
from compress.calibration.gradients import head_logits
from compress.calibration.moments import StreamMoments
from compress.calibration.streams import Runner, embed
from compress.linalg import damped
from compress.progress import log, track
from compress.recipe import Recipe
from compress.rewrites.folding import FoldedModel
from compress.rewrites.rotations import Rotations
from compress.structures import LowRankStructure

SEQUENCES = 8
KEPT = 0.5  # of the full rank: errors far above rounding, and of the size that a compression makes
ROUNDING = 1e-6


@torch.no_grad()
def measured_losses(
    model: FoldedModel,
    tokens: Tensor,
    moments: Mapping[tuple[int, str], StreamMoments],
    recipe: Recipe,
    runner: Runner,
    keeper: Keeper,
) -> dict[str, float]:
    """Role -> KL divergence to the dense model, in nats per token, for one unit of summed squared relative error.

    All linears of one role are truncated to half their rank by whitened SVD, the others left as they are, and the
    model is run on the first `SEQUENCES` sequences: one pass for each role, so the time is linear in the layers.
    Each role is kept as it is measured. A role that has nothing to lose at that rank weighs as much as the others on
    average: a metric must be positive, and nothing is free. See docs/method.md#measured-sensitivity.
    """
    arch, ids = model.arch, tokens[:SEQUENCES]
    ends = {name: w.to(runner.device) for name, w in model.ends(Rotations.none()).items()}
    start = embed(model.ends(Rotations.none()), arch, ids)
    reference: Tensor | None = None

    def measure(role: str) -> float:
        nonlocal reference
        if reference is None:
            reference = _last_stream(model, start, runner, None, moments, recipe)[0]
        stream, errors = _last_stream(model, start, runner, role, moments, recipe)
        total = 0.0
        for _, (x, y) in runner.batches(reference, stream):
            for a, b in zip(x, y, strict=True):  # one sequence's logits at a time: (length, vocabulary) is large
                p, q = (head_logits(ends, arch.norm_eps, h).float().log_softmax(-1) for h in (a, b))
                total += float((p.exp() * (p - q)).sum())
        return total / ids.numel() / errors if errors > ROUNDING else 0.0

    found: dict[str, float] = {}
    for role in track(tuple(arch.linears()), description="measure"):
        found[role] = keeper.value(f"plan-measured-{role.replace('.', '-')}", partial(measure, role))
    known = [value for value in found.values() if value > ROUNDING]
    average = sum(known) / len(known) if known else 1.0
    found = {role: value if value > ROUNDING else average for role, value in found.items()}
    log("measured loss per unit of relative error: " + ", ".join(f"{r} {v:.3g}" for r, v in found.items()))
    return found


def _last_stream(
    model: FoldedModel,
    start: Tensor,
    runner: Runner,
    role: str | None,
    moments: Mapping[tuple[int, str], StreamMoments],
    recipe: Recipe,
) -> tuple[Tensor, float]:
    """The last stream with the linears of `role` truncated, and the sum of their squared relative errors."""
    x, errors = start.clone(), 0.0
    for layer in range(model.arch.num_layers):
        weights = model.block(layer)
        if role is not None:
            sub = next(sub for sub, writer in WRITERS.items() if role in (*model.arch.readers(sub), writer))
            gram = damped(moments[layer, sub].gram(role), recipe.gram_damping)
            weight = weights[f"{role}.weight"].double()
            n, m = weight.shape
            structure = LowRankStructure(m, n, max(1, int(KEPT * min(n, m))))
            approximation = structure.dense(structure.fit(weight, gram))
            lost = weight - approximation
            errors += float(((lost @ gram) * lost).sum() / ((weight @ gram) * weight).sum().clamp(min=1e-300))
            weights[f"{role}.weight"] = approximation.to(weights[f"{role}.weight"].dtype)
        block = runner.block(layer, weights, {}, skips=False)
        for part, (h,) in runner.batches(x):
            with runner.computing():
                x[part] = block(h, runner.rotary, runner.mask).cpu()
    return x, errors
