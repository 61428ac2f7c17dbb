"""What is left of a linear when its inner features are cut to the leading ones: all sizes from one factorisation.

The inner side (compress/structures/select.py) is cut into groups of which the first features stay. Here they are taken
in the order of dropping, the j-th of every group together, so that what stays always is a leading part S = 1 ... k.
With G = L L^T the Cholesky factor of G_SS is the leading block of L, and H_SS is the leading block of H (derived here):

    writer   refitted to what it still reads, W' = W G_:S G_SS^-1:   M_k = W' G_SS W'^T = (W L)_:S (W L)_:S^T
    reader   cut to the outputs that are still read:                 M_k = W_S^T H_SS W_S = sym(W_S^T V_S),
                                                                     V = (2 tril(H, -1) + diag(H)) W

V_i depends on rows up to i alone, so both are running sums over the inner features. From M_k, which is (d, d) on the
stream's side, follow the losses of leading coordinates of the stream and, with the moment P on that side, the spectrum
of what pivoted low rank can do (`menus.whitened_spectrum`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from compress.allocation.menus import Linear
from compress.linalg import descending_eigenvalues


class Nested:
    """One linear in float64, whose inner side has `groups` equal groups; kept = features that stay of each group."""

    def __init__(self, linear: Linear, groups: int = 1) -> None:
        self.linear, self.groups, self.reads_stream = linear, groups, linear.side == "in"
        inner = linear.weight.shape[0 if self.reads_stream else 1]
        places = torch.arange(inner, device=linear.weight.device).reshape(groups, inner // groups)
        self._order = None if groups == 1 else places.T.reshape(-1)
        self._spectrum_sum: tuple[int, Tensor] | None = None

    @property
    def stream_moment(self) -> Tensor:
        """P (d, d): the Gram matrix of a reader, the metric of a writer."""
        return self.linear.gram if self.reads_stream else self.linear.metric

    def gains(self, z: Tensor, kept: Sequence[int]) -> Tensor:
        """The diagonals of Z M_k Z^T (len(kept), rows of Z) for rising numbers of kept features; z (rows, d)."""
        if self.reads_stream:  # (inner, rows), one step for each inner feature
            steps = self._rows @ z.T
            steps *= self._running @ z.T
        else:
            steps = (z @ self._columns).square_().T
        ends = [k * self.groups for k in kept]
        parts = [steps[start:end].sum(0) for start, end in pairwise((0, *ends))]
        return torch.stack(parts).cumsum(0)

    def total(self, z: Tensor) -> Tensor:
        """`gains` with nothing dropped (rows of Z,), at a fraction of the price."""
        x = self.linear
        if self.reads_stream:
            u = x.weight @ z.T  # (out, rows)
            return (u * (x.metric @ u)).sum(0)
        u = z @ x.weight  # (rows, in)
        return ((u @ x.gram) * u).sum(1)

    def spectrum(self, kept: int) -> Tensor:
        """Squared singular values, descending, of what is left in the metric of the fit; call with rising `kept`."""
        k = kept * self.groups
        if k < len(self.stream_moment):  # the inner side is the smaller one
            part = self._half[:k]
            if self.reads_stream:
                part = self._inner_factor[:k, :k].T @ part
            return descending_eigenvalues(part @ part.T)
        start, total = self._spectrum_sum or (0, torch.zeros_like(self.stream_moment))
        if start > k:
            start, total = 0, torch.zeros_like(self.stream_moment)
        new = self._half[start:k]
        total = total + (new.T @ (self._half_running[start:k] if self.reads_stream else new))
        self._spectrum_sum = (k, total)
        return descending_eigenvalues((total + total.T) / 2)

    @cached_property
    def _rows(self) -> Tensor:
        """A reader's weight (inner, d) in the order of dropping."""
        weight = self.linear.weight
        return weight if self._order is None else weight[self._order]

    @cached_property
    def _inner_moment(self) -> Tensor:
        """The metric of a reader, the Gram matrix of a writer, in the order of dropping."""
        moment = self.linear.metric if self.reads_stream else self.linear.gram
        return moment if self._order is None else moment[self._order][:, self._order]

    @cached_property
    def _inner_factor(self) -> Tensor:
        factor: Tensor = torch.linalg.cholesky(self._inner_moment)
        return factor

    @cached_property
    def _stream_factor(self) -> Tensor:
        factor: Tensor = torch.linalg.cholesky(self.stream_moment)
        return factor

    @cached_property
    def _running(self) -> Tensor:
        """V (inner, d) of a reader."""
        h = self._inner_moment
        found: Tensor = (2 * h.tril(-1) + h.diagonal().diag()) @ self._rows
        return found

    @cached_property
    def _columns(self) -> Tensor:
        """W L (d, inner) of a writer."""
        weight = self.linear.weight
        found: Tensor = (weight if self._order is None else weight[:, self._order]) @ self._inner_factor
        return found

    @cached_property
    def _half(self) -> Tensor:
        """(inner, d): W C with P = C C^T of a reader, (C^T W L)^T of a writer."""
        return self._rows @ self._stream_factor if self.reads_stream else self._columns.T @ self._stream_factor

    @cached_property
    def _half_running(self) -> Tensor:
        """V C (inner, d) of a reader."""
        return self._running @ self._stream_factor
