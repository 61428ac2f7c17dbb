"""Bias correction: centred second moments, and the bias that makes up for lost means."""

from __future__ import annotations

import torch
from torch import Tensor


def bias_correction(weight: Tensor, approximation: Tensor, mean: Tensor, shift: Tensor | None = None) -> Tensor:
    """What to add to the bias, (out,), when `approximation` What replaces `weight` W, both (out, in); float64.

        delta = (W - What) mu                     mu (in,) = mean of the inputs that What sees

    With it the error of the outputs has mean zero, and the squared error is tr(H E G E^T) + const with the centred G
    (`centred`): the best affine map (docs/method.md#bias-correction). `shift` (out,) is added: the mean of what the
    target of the fit has beyond W x, e.g. correction * E[y_f - W a_c + s_f - s_c] for a writer of a sequential fit.
    """
    delta = (weight.double() - approximation.double()) @ mean.double()
    return delta if shift is None else delta + shift.double()


def centred(moment: Tensor, left: Tensor, right: Tensor | None = None, share: float = 1e-2) -> Tensor:
    """E[x y^T] - (1 - share) E[x] E[y]^T in float64: the moment in which to fit where `bias_correction` follows.

    moment (n, m), left = E[x] (n,), right = E[y] (m,), or x's own mean where not given. A `share` of the mean's weight
    stays: the fit should keep the direction of a large mean, since that of new text differs a little.
    """
    other = left if right is None else right
    return moment.double() - (1 - share) * torch.outer(left.double(), other.double())
