"""How an error of a linear's output is weighed: the loss metric of each linear, by the recipe's sensitivity."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.calibration.moments import StreamMoments
from compress.linalg import damped
from compress.recipe import Recipe


def loss_metric(
    recipe: Recipe, moment: StreamMoments, role: str, weight: Tensor, measured: Mapping[str, float] | None = None
) -> Tensor:
    """H (out, out) with which tr(H E G E^T) is the predicted loss, in nats per token, of an error E of `role`.

    fisher:   H = E[g g^T] / 2, damped: the second-order expansion of the KL divergence, its half
              included (docs/method.md#the-objective).
    none:     H = I / tr(W G W^T): the squared relative error of the output; every linear's counts the same.
    measured: the same times measured[role], the loss that a relative error of this class of linears caused.

    weight (out, in) in the coordinates of `moment`; float64.
    """
    if recipe.sensitivity == "fisher":
        assert moment.gradients is not None  # collected with this sensitivity
        return damped(moment.gradients[role], recipe.metric_damping).to(weight.device) / 2
    weight = weight.double()
    energy = float(((weight @ moment.gram(role).to(weight.device)) * weight).sum())
    scale = 1.0 if measured is None else measured[role]
    identity = torch.eye(len(weight), dtype=torch.float64, device=weight.device)
    # A linear that only ever sees zeros loses nothing whatever it becomes.
    return identity * (scale / energy if energy > 0 else 1.0)
