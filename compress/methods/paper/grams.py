"""The Gram matrices that one position needs, without those of the rest of the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.architecture import SUB_BLOCKS, WRITERS
from compress.calibration.gram import GramSum
from compress.calibration.streams import Runner, embed
from compress.errors import UsageError
from compress.progress import track
from compress.rewrites.folding import FoldedModel
from compress.rewrites.rotations import Rotations


@dataclass(frozen=True)
class Grams:
    """Second moments of what the readers of a sub-block read (d, d), and of its writer's input; float64."""

    read: Tensor
    inner: Tensor


@torch.no_grad()
def position_grams(model: FoldedModel, tokens: Tensor, position: int, runner: Runner) -> dict[tuple[int, str], Grams]:
    """Moments of the blocks that meet at `position`, all that `solver.position_members` needs.

    tokens (samples, length). Runs the dense model as far as that; the stream of all tokens is in memory. Raises
    UsageError for a position that the model does not have.
    """
    arch, last = model.arch, 2 * model.arch.num_layers
    if not 0 <= position <= last:
        raise UsageError(f"position {position} is not one of the {last + 1} of this model: give 0 to {last}")
    stream, found = embed(model.ends(Rotations.none()), arch, tokens), dict[tuple[int, str], Grams]()
    for layer in track(range(min(arch.num_layers, position // 2 + 1)), description="calibrate"):
        sums: dict[str, GramSum] = {}
        if 2 * layer + 2 >= position:
            for sub, writer in WRITERS.items():
                d, inner = arch.linears()[writer]
                sums |= {f"{sub}.in": runner.gram(d), writer: runner.gram(inner)}

        def tap(place: str, value: Tensor, sums: dict[str, GramSum] = sums) -> None:
            if place in sums:
                sums[place].add(value)

        block = runner.block(layer, model.block(layer), {}, skips=False)
        for part, (x,) in runner.batches(stream):
            stream[part] = block(x, runner.rotary, runner.mask, tap=tap).cpu()
        for sub in SUB_BLOCKS if sums else ():
            found[layer, sub] = Grams(sums[f"{sub}.in"].mean(), sums[WRITERS[sub]].mean())
    return found
